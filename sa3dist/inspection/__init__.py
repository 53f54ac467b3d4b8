"""What `sa3dist inspect` measures and shows."""
