"""Validation: the choice of held-out clips, the fixed set made from them, and the loss on it during a run."""
