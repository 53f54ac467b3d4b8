"""What a run sounds like: generated clips and their files."""
