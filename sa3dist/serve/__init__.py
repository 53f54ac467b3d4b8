"""The HTTP endpoint: a web server, a durable job queue, and the processes that run its jobs."""
