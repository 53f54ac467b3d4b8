"""One page per run: what a run's folder holds, as one HTML file that needs nothing else."""
