"""Every stage in order, started by `accelerate launch -m sa3dist.train`, by torchrun or by plain python."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import faulthandler
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from sa3dist.errors import EXIT_ENVIRONMENT, ConfigError
from sa3dist.runtime import cuda_driver, lease
from sa3dist.runtime.exact_products import keep_products_exact
from sa3dist.runtime.lasting_imports import lasting_imports
from sa3dist.runtime.signals import StopRequest, kill_loaders

if TYPE_CHECKING:
    from sa3dist.pipeline import Run
    from sa3dist.runtime.process_group import Group
    from sa3dist.runtime.watchdog import Watchdog
    from sa3dist.settings import Settings
    from sa3dist.training.compile_processes import Compiling


def all_stages(run: Run) -> None:
    """Run every stage in order. The result is the last line on rank 0's stdout."""
    run.check()
    run.begin_compiling()
    base = run.open_base()
    encoded = run.encode(base, run.shard())
    run.prepare(base, encoded)
    run.train(base, encoded)
    run.export(base)


def parser(program: str, about: str) -> argparse.ArgumentParser:
    """Command line of every program that takes a run's settings."""
    from sa3dist import config

    made = argparse.ArgumentParser(
        prog=program,
        description=about,
        epilog="Keys, in CONFIG.yaml, REQUEST.json or as key=value:\n" + config.help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("words", nargs="*", metavar="CONFIG.yaml|REQUEST.json|key=value", help="later words win")
    made.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and exit")
    return made


def run_stages(
    program: str, about: str, stages: Callable[[Run], None], argv: Sequence[str] | None, trains: bool
) -> int:
    """Read the settings, join the other processes and run ``stages``. Returns the exit code.

    trains   whether the stages include the training: only then is compiling ahead worth it
    """
    # Before the slow imports: a signal that arrives during them must not kill the process.
    stop = StopRequest().install()
    lease.watch()
    # When the store's host is lost, torch's C++ stack traces would bury the one line that names the host.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from sa3dist import config
    from sa3dist.data.remote.public_addresses import PUBLIC_ONLY_VARIABLE
    from sa3dist.runtime.exit_status import dist_rank_from_environment, has_peers, run_program
    from sa3dist.training.compile_processes import end_all, start_early

    arguments, unknown = parser(program, about).parse_known_intermixed_args(argv)
    logging.basicConfig(format="sa3dist: %(message)s", stream=sys.stderr)
    # It prints its own lines; propagated, each would appear twice.
    logging.getLogger("huggingface_hub").propagate = False
    logging.getLogger("sa3dist").setLevel(logging.INFO if dist_rank_from_environment() == 0 else logging.ERROR)
    values: dict = {}
    running: list[Run] = []

    def body() -> None:
        config.read_arguments(arguments.words, values)
        if unknown:
            raise ConfigError(f"{' '.join(unknown)}: unknown option; settings are given as key=value")
        settings = config.build(values)
        if settings.public_addresses_only:
            os.environ[PUBLIC_ONLY_VARIABLE] = "1"
        if settings.max_wall_time is not None:
            stop.limit(settings.max_wall_time)
        if arguments.print_config:
            import yaml

            print(yaml.safe_dump(settings.as_dict(), sort_keys=False), end="")
            return
        if not has_peers():
            stop.raise_if_requested("starting")
        started = start_early(settings, dist_rank_from_environment()) if trains else {}
        try:
            _run_connected(settings, stop, stages, running, started)
        finally:
            end_all(started)

    code = run_program(
        body,
        lambda: None if arguments.print_config else config.output_dir_of(values),
        lambda: running[0].step if running else 0,
    )
    if running:
        running[0].leave()
    return code


def _run_connected(
    settings: Settings,
    stop: StopRequest,
    stages: Callable[[Run], None],
    running: list[Run],
    started: dict[str, Compiling],
) -> None:
    """Join the other processes and run ``stages`` with them.

    running   receives the run once it exists
    started   processes that can compile ahead; the run removes those it uses
    """
    cuda_driver.start()
    with lasting_imports():
        from sa3dist.pipeline import Run
        from sa3dist.runtime.peers import GOODBYE_SECONDS, leave, part
        from sa3dist.runtime.process_group import connect, disconnect
        from sa3dist.runtime.watchdog import Watchdog
        from sa3dist.training.acceleration import make_deterministic

    if settings.deterministic:
        make_deterministic()
    with Watchdog(stop, settings.output_dir) as watchdog:
        group = connect(settings.step_timeout)
        watchdog.watch(group)
        try:
            # Not before connect: the peers of a rank that left earlier would wait for it there.
            stop.raise_if_requested("starting")
            out_of_memory_at_step = take_output_dir(group, settings.output_dir, stop, watchdog)
            running.append(Run(settings, group, stop, out_of_memory_at_step, started))
            with recording(settings, group):
                stages(running[0])
            part(group, GOODBYE_SECONDS)
        except Exception as failure:
            reason = leave(group, failure, watchdog.told)
            if reason is failure:
                raise
            raise reason from failure
    disconnect()


def recording(settings: Settings, group: Group) -> contextlib.AbstractContextManager[None]:
    """Keep the run's warnings in warnings.jsonl on rank 0; a run that continues appends to the earlier ones."""
    from sa3dist.report.recorder import recorded_warnings
    from sa3dist.training import checkpoint

    begins = settings.resume == "never" or not checkpoint.list_all(settings.output_dir)
    return recorded_warnings(settings.output_dir, begins) if group.is_main else contextlib.nullcontext()


def take_output_dir(group: Group, directory: Path, stop: StopRequest, watchdog: Watchdog) -> int | None:
    """Lock the output directory before anything is written to it.

    watchdog   its heartbeat.json is renewed together with the lock
    Returns, on all ranks, what ``forget_status`` found. Raises InUse, on all ranks, when another run holds the lock.
    """
    from sa3dist.runtime import run_lock
    from sa3dist.runtime.exit_status import forget_status
    from sa3dist.runtime.process_group import main_process_first

    def take() -> str | None:
        check_stop = functools.partial(stop.raise_if_requested, "waiting for output_dir")
        return run_lock.take(directory, check_stop, watchdog.heartbeat.renew)

    run_lock.adopt(directory, main_process_first(group, "lock", take, stop))
    return main_process_first(group, "forget-status", lambda: forget_status(directory), stop)


def main(argv: Sequence[str] | None = None) -> int:
    about = "Train a Stable Audio 3 LoRA from captioned audio."
    return run_stages("sa3dist.train", about, all_stages, argv, trains=True)


# Limit for the exit functions of libraries.
EXIT_FUNCTIONS_SECONDS = 30.0
# Errors of a write to a terminal or pipe that nobody reads any more.
NO_READER = {errno.EIO, errno.EPIPE, errno.ENXIO}


class Lasting:
    """A text stream that discards its output once its reader is gone, instead of raising.

    The run goes on, saves, and writes how it ended to its files, as under nohup.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as failure:
            self._let_go(failure)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as failure:
            self._let_go(failure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _let_go(self, failure: OSError) -> None:
        if failure.errno not in NO_READER:
            failure.filename = self._stream.name
            raise failure
        # Replace the stream's own file descriptor: what is still buffered then goes to /dev/null too, at exit at the
        # latest.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def as_process(program: Callable[[], int]) -> NoReturn:
    """Run ``program`` as this process's only work and exit with its code. A crash below Python prints its stack.

    Ends with 70 when stdout or stderr cannot be written, for example on a full disk.
    """
    # In this order: otherwise a file of the run could get the number of a closed stream, and libraries would print into
    # it.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        # stderr may have no file descriptor.
        faulthandler.enable()
    try:
        keep_products_exact()
        code = program() if _stands_in_a_folder() else EXIT_ENVIRONMENT
        sys.stdout.flush()
    except OSError as failure:
        if failure.filename not in ("<stdout>", "<stderr>"):
            raise
        code = EXIT_ENVIRONMENT
        with contextlib.suppress(OSError):
            print(f"{failure.filename}: cannot write ({failure.strerror})", file=sys.stderr, flush=True)
    end_process(code)


def _stands_in_a_folder() -> bool:
    try:
        os.getcwd()
    except OSError as failure:
        # Without this check MKL ends the process while torch is imported, with exit code 2, the code of a user's
        # mistake.
        print(f"the folder one stands in is gone ({failure.strerror}); cd to one that is there", file=sys.stderr)
        return False
    return True


def end_process(code: int) -> NoReturn:
    """Exit without tearing the interpreter down; the system frees the memory.

    The teardown collects what DeepSpeed leaves: five seconds, half a minute on a busy machine, which is as long as
    launch agents wait between SIGTERM and SIGKILL. A thread that hangs in a torch operator would abort it.
    """
    kill_loaders()
    _flush()
    # An exit function may wait without limit, for a server that does not answer.
    limit = threading.Timer(EXIT_FUNCTIONS_SECONDS, os._exit, [code])
    limit.daemon = True
    limit.start()
    atexit._run_exitfuncs()
    limit.cancel()
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # ``as_process`` has already reported a stream that cannot be written.
        with contextlib.suppress(OSError):
            stream.flush()


if __name__ == "__main__":
    as_process(main)
