"""Run a piece of work again and again in fresh processes and kill it at chosen moments, importing only once."""

import os
import signal
import subprocess
import sys
import time

_PROGRAM = """
import os, sys, traceback
exec(sys.argv[1])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            work(line.rstrip())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Killable:
    """setup: source that imports what is needed and defines work(argument). Each call runs in a forked process."""

    def __init__(self, setup):
        self._parent = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, setup],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, argument, kill_after=None):
        """Seconds the work took, and whether it was killed before its end."""
        print(argument, file=self._parent.stdin, flush=True)
        child = int(self._parent.stdout.readline())
        begin = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            # A child that has ended stays a process until its parent asks, and it asks only after this pid was told.
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                assert time.monotonic() - begin >= kill_after
        status = int(self._parent.stdout.readline())
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0
        return time.monotonic() - begin, killed

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._parent.stdin.close()
        self._parent.wait()
