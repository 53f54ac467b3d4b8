"""The nine adapter types: attaching them by name, their effective weights, their file format."""
