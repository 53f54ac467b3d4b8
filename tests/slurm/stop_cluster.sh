#!/usr/bin/env bash
# Stop what start_cluster.sh started in DIRECTORY; munged stays.
set -euo pipefail
directory=${1:?usage: stop_cluster.sh DIRECTORY}
for daemon in slurmd slurmctld; do
    if [[ -e $directory/$daemon.pid ]]; then
        kill "$(< "$directory/$daemon.pid")"
    fi
done
