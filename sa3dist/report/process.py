"""The process that writes a run's report during training, with low priority and a time limit."""

import os
import signal
import sys
from pathlib import Path

# Limit, so that the machine is free soon after the run, however long its clips are.
MOST_SECONDS = 300


def main(folder: str, audio: str) -> None:
    """Write the report of the run in ``folder``. audio: "inside" or "beside"."""
    for number in (signal.SIGTERM, signal.SIGALRM):
        # An exception, so that a temporary file is removed.
        signal.signal(number, lambda *_: sys.exit("stopped"))
    signal.alarm(MOST_SECONDS)
    os.nice(10)
    from sa3dist.errors import first_line
    from sa3dist.report.page import PAGE_NAME, write_report

    try:
        write_report([Path(folder)], Path(folder) / PAGE_NAME, inside=audio == "inside")
    except Exception as failure:
        sys.exit(f"{type(failure).__name__}: {first_line(failure)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
