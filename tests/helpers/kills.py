"""Run a piece of work again and again in fresh processes and kill it at chosen moments, importing only once."""

import multiprocessing
import os
import signal
import time
import traceback

from tests.helpers.golden import THREADS


class Killable:
    """setup: source that imports what is needed and defines work(argument). Each call runs in a forked process."""

    def __init__(self, setup):
        # Of this process where it has one thread of OpenMP, which has imported everything.
        context = multiprocessing.get_context("fork" if THREADS == 1 else "spawn")
        self._pipe, theirs = context.Pipe()
        self._parent = context.Process(target=_fork_again_and_again, args=(setup, theirs))
        self._parent.start()
        theirs.close()

    def run(self, argument, kill_after=None):
        """Seconds the work took, and whether it was killed before its end."""
        self._pipe.send(str(argument))
        child = self._pipe.recv()
        begin = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            # A child that has ended stays a process until its parent asks, and it asks only after this pid was told.
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                assert time.monotonic() - begin >= kill_after
        status = self._pipe.recv()
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0
        return time.monotonic() - begin, killed

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pipe.send(None)
        self._parent.join()


def _fork_again_and_again(setup, pipe):
    # Threads of OpenMP would not be in the forks.
    os.environ["OMP_NUM_THREADS"] = "1"
    names = {}
    exec(setup, names)
    while (argument := pipe.recv()) is not None:
        child = os.fork()
        if child == 0:
            try:
                names["work"](argument)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        pipe.send(child)
        pipe.send(os.waitpid(child, 0)[1])
