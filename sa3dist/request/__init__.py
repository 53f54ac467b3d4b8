"""The fields of a request; nothing here depends on a run."""
