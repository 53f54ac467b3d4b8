#!/bin/sh
# Health check: has the run made progress in the last MINUTES?   alive.sh MINUTES DIRECTORY...
# DIRECTORY is an output_dir, or a folder of several. The run renews heartbeat.json there only while it makes progress. It
# ends a hanging step itself (step_timeout).
set -eu
minutes=$1
shift
# Before the first start directories may be missing, which find reports as errors: ignore them.
[ -n "$(find "$@" -maxdepth 2 -name heartbeat.json -mmin "-$minutes" -print -quit 2> /dev/null || true)" ]
