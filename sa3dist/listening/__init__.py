"""What a run sounds like: previews during training, audio files, spectrograms."""
