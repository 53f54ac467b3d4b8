"""What a request may hold: nothing here knows of a run."""
