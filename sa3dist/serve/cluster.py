"""What the executors of clusters share: how a run that was submitted once has ended, as its status.json says.

A shepherd may be lost at any moment. The note beside the run tells the next one that there is something to look for,
and which status is older than that.
"""

import signal
import time
from collections.abc import Callable
from typing import Any

from sa3dist.errors import EXIT_INTERRUPTED
from sa3dist.formats import STATUS_NAME, write_json
from sa3dist.serve.attempts import read_json
from sa3dist.serve.executor import Attempt
from sa3dist.supervise import identity_of

# How often a cluster's scheduler is asked, which it answers for everybody.
POLL_SECONDS = 3.0
ANSWER_SECONDS = 60
# A status written on a node may take a moment to be seen here.
STATUS_SECONDS = 10.0
NOTE_NAME = "submitted.json"


class Submitted:
    """The run of one attempt on a cluster. The jobs' folder has to be the same on all its nodes."""

    def __init__(self, attempt: Attempt) -> None:
        self._note = attempt.folder / NOTE_NAME
        self._status = attempt.run / STATUS_NAME
        self._asked_at = self._left_at = 0.0

    def note(self, **values: Any) -> None:
        """Write, before and after it is submitted, that it is."""
        before = identity_of(self._status)
        write_json(self._note, {"status_before": before} | read_json(self._note) | values)

    def noted(self, name: str) -> str:
        """What ``note`` was given."""
        return str(read_json(self._note).get(name, ""))

    def has_ended(self) -> bool:
        """Whether it has said how it ended since it was submitted."""
        noted, found = read_json(self._note), identity_of(self._status)
        return "status_before" in noted and found is not None and list(found) != noted["status_before"]

    def exit_code(self, is_there: Callable[[], bool], asked_to_stop: bool, otherwise: Callable[[], int]) -> int | None:
        """How it ended; None while it is there, or its status may still come.

        is_there    whether the cluster runs it, or will; asked now and then
        otherwise   how it ended where it has not said so: it never began, was killed, or its node is lost
        """
        now = time.monotonic()
        if now - self._asked_at < POLL_SECONDS:
            return None
        self._asked_at = now
        if is_there():
            self._left_at = 0.0
            return None
        self._left_at = self._left_at or now
        if self.has_ended():
            code = int(read_json(self._status).get("exit_code", -signal.SIGKILL))
            # The cluster starts interrupted runs again, unless somebody has taken this one away: a lost attempt.
            code = -signal.SIGTERM if code == EXIT_INTERRUPTED and not asked_to_stop else code
        elif now - self._left_at > STATUS_SECONDS:
            code = otherwise()
        else:
            return None
        # The next attempt is another run.
        self._note.unlink(missing_ok=True)
        return code
