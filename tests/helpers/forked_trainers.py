"""The trainer's program in processes forked from this one, which has imported everything: real signals, real ranks."""

import atexit
import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
from pathlib import Path

import torch

from sa3dist import train
from tests.helpers.golden import THREADS
from tests.helpers.ranks import free_port


class ForkedTrainer:
    """``python -m sa3dist.train`` without the imports; used as a context, it is killed at the end.

    log         takes what it says, after what is there
    ignored     signals, as a launcher such as nohup leaves them
    variables   of its environment
    """

    def __init__(self, words, log, ignored: tuple[int, ...] = (), **variables):
        # Otherwise each would import them.
        import accelerate  # noqa: F401
        import torch._dynamo  # noqa: F401
        import transformers  # noqa: F401

        from sa3dist import pipeline  # noqa: F401

        self.log = Path(log)
        self.log.touch()
        arguments = ([str(word) for word in words], str(log), ignored, os.getcwd(), {**os.environ, **variables})
        self._process = _context().Process(target=_become_trainer, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self._process.join()

    def poll(self) -> int | None:
        """Its exit code, or the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 300) -> int:
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running after {seconds} s: {self.said()}"
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.poll() is None, self.said()
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> str:
        return self.log.read_text()


@contextlib.contextmanager
def forked_ranks(*words_of_ranks, log: Path, **variables):
    """One rank per list of words; no agent ends one for another's sake. Logs: LOG-0, LOG-1, ..."""
    places = places_of_ranks(len(words_of_ranks), free_port())
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(ForkedTrainer(words, f"{log}-{rank}", **place, **variables))
            for rank, (words, place) in enumerate(zip(words_of_ranks, places, strict=True))
        ]


def places_of_ranks(size: int, port: int) -> list[dict[str, str]]:
    """What a launch agent on one machine puts into the environment of its ranks, in their order."""
    agents = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port), **agents} for rank in range(size)]


def _context():
    """Forks of this process where it has one thread of OpenMP: a fork would wait without end for others."""
    if THREADS == 1:
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "torch._dynamo", "transformers", "sa3dist.pipeline", __name__])
    return context


def _become_trainer(words, log, ignored, directory, variables) -> None:
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    # A trainer's own processes start as on Linux by default, however this one was started.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(directory)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    # The test runner's, which are not this process's to run or to write to.
    logging.getLogger().handlers.clear()
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(THREADS)
    # Else Accelerate gives every rank a thread per core, and they spin while they wait for each other.
    os.environ |= {**variables, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(THREADS)}
    train.as_process(functools.partial(train.main, words))
