"""Validation: hold out clips, make a fixed set of crops from them, and evaluate the loss on it during training."""
