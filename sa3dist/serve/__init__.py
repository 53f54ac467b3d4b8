"""The HTTP endpoint of one's own: a durable job queue, the processes that run its jobs, and the web server in front."""
