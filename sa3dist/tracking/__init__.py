"""Trackers: where else, beside metrics.jsonl, rows and previews go."""
