"""Checkpoints written beside the training: one background thread, one save in flight."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Saver:
    """Runs saves in a thread. What goes wrong there is raised where the training asks next.

    seconds   what the last save took
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, write: Callable[[], None], done: Callable[[], None]) -> None:
        """Run ``write``, then ``done`` however it ended, in the background. Waits for the save before, if any."""
        self.wait()

        def work() -> None:
            begin = time.perf_counter()
            try:
                write()
            except Exception as failure:
                self._failure = failure
            finally:
                self.seconds = time.perf_counter() - begin
                done()

        # Not a daemon: the interpreter does not end before the rename.
        self._thread = threading.Thread(target=work, name="save")
        self._thread.start()

    def check(self) -> None:
        """Raise what made a save fail, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Return when no save is in flight; raises what made the last one fail."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def close(self) -> None:
        """Let a save in flight finish on the way out of a run that ends for another reason."""
        try:
            self.wait()
        except Exception as failure:
            log.error("a save failed as well: %s", failure)
