"""Shared by cluster executors: how a submitted run has ended, from its status.json.

A runner may be lost at any moment. A note next to the run tells the next runner that a run was submitted, and which
status.json existed before.
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

# How often to query the cluster's scheduler, which serves all its users.
POLL_SECONDS = 3.0
ANSWER_SECONDS = 60
# A status written on a node may become visible here with a delay.
STATUS_SECONDS = 10.0
NOTE_NAME = "submitted.json"


class ClusterRun:
    """The run of one attempt on a cluster. The jobs' folder must have the same path on all its nodes."""

    def __init__(self, attempt: Attempt) -> None:
        self._note = attempt.folder / NOTE_NAME
        self._status = attempt.run / STATUS_NAME
        self._polled_at = self._gone_at = 0.0

    def note(self, **values: Any) -> None:
        """Write the note; called before and after submitting."""
        before = identity_of(self._status)
        write_json(self._note, {"status_before": before} | read_json(self._note) | values)

    def noted(self, name: str) -> str:
        """A value given to ``note``."""
        return str(read_json(self._note).get(name, ""))

    def has_ended(self) -> bool:
        """Whether it has written a status since it was submitted."""
        note, status = read_json(self._note), identity_of(self._status)
        return "status_before" in note and status is not None and list(status) != note["status_before"]

    def exit_code(self, is_there: Callable[[], bool], asked_to_stop: bool, otherwise: Callable[[], int]) -> int | None:
        """Its exit code; None while it exists, or its status may still appear.

        is_there    whether the run is queued or running on the cluster; called every POLL_SECONDS
        otherwise   gives the exit code of a run without a status: it never began, was killed, or its node is lost
        """
        now = time.monotonic()
        if now - self._polled_at < POLL_SECONDS:
            return None
        self._polled_at = now
        if is_there():
            self._gone_at = 0.0
            return None
        self._gone_at = self._gone_at or now
        if self.has_ended():
            code = int(read_json(self._status).get("exit_code", -signal.SIGKILL))
            # The cluster restarts interrupted runs. If it did not, somebody has removed the run: a lost attempt.
            code = -signal.SIGTERM if code == EXIT_INTERRUPTED and not asked_to_stop else code
        elif now - self._gone_at > STATUS_SECONDS:
            code = otherwise()
        else:
            return None
        # The next attempt submits another run.
        self._note.unlink(missing_ok=True)
        return code
