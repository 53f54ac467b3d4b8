#!/bin/sh
# Health check: has the program written anything lately?   alive.sh MINUTES DIRECTORY...
# Give it output_dir and work_dir: preparation writes to one, training to the other.
set -eu
minutes=$1
shift
# The first start makes the directories; find complains of those still missing.
[ -n "$(find "$@" -mmin "-$minutes" -print -quit 2> /dev/null || true)" ]
