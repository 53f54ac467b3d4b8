#!/bin/sh
# Health check: has the run got on lately?   alive.sh MINUTES DIRECTORY...
# DIRECTORY is output_dir, or the folder that holds those of several runs. The program renews heartbeat.json there while
# it gets on, and not otherwise; a step that hangs it ends by itself (step_timeout).
set -eu
minutes=$1
shift
# The first start makes the directories; find complains of those still missing.
[ -n "$(find "$@" -maxdepth 2 -name heartbeat.json -mmin "-$minutes" -print -quit 2> /dev/null || true)" ]
