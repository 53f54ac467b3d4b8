"""Trackers: further destinations of rows and previews, beside metrics.jsonl."""
