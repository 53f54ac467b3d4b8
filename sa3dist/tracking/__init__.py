"""Experiment trackers, which get rows and previews in addition to metrics.jsonl."""
