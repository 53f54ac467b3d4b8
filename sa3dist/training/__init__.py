"""The trainer, its loss, checkpoints, resume, schedule, metrics and memory."""
