"""Bytes from addresses: local paths, http(s) and object stores, kept on disk."""
