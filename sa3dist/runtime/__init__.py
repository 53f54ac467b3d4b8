"""The processes of a run: group, peers, liveness, signals, watchdog, exit status."""
