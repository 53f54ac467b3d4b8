#!/usr/bin/env bash
# Stop what start_cluster.sh started in DIRECTORY; munged stays.
set -euo pipefail
directory=${1:?usage: stop_cluster.sh DIRECTORY}
for file in "$directory"/slurm*.pid; do
    kill "$(< "$file")"
done
