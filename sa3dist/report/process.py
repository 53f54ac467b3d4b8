"""The process that writes a run's page during the run: with low priority and a time limit."""

import os
import signal
import sys
from pathlib import Path

# The limit, however long the run's clips are: others may be waiting for the machine.
MOST_SECONDS = 300


def main(folder: str, audio: str) -> None:
    """Write the page of the run in ``folder``. audio: "inside" or "beside"."""
    for number in (signal.SIGTERM, signal.SIGALRM):
        # Raise, so that a half-written page is removed.
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
