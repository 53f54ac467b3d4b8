"""Checked clips from what people bring: archives, folders, captions, audio, shards."""
