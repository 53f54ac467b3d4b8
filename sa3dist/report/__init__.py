"""One page per run: the content of a run's folder as one self-contained HTML file."""
