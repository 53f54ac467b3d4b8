"""The rectified-flow training step as pure functions of tensors and explicit generators."""
