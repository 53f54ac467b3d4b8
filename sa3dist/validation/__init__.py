"""Validation: which clips are held out, the fixed set made of them, and the loss on it while a run trains."""
