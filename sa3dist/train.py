"""Every stage in order, started by `accelerate launch -m sa3dist.train`, by torchrun or by plain python."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sa3dist.errors import ConfigError
from sa3dist.runtime import cuda_driver, lease
from sa3dist.runtime.lasting_imports import lasting_imports
from sa3dist.runtime.own_process import as_process
from sa3dist.runtime.signals import StopRequest

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
    made.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml|REQUEST.json|key=value",
        help="if a key appears twice, the later value counts",
    )
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
    from sa3dist.runtime import launcher
    from sa3dist.runtime.exit_status import run_program
    from sa3dist.runtime.open_files import allow_open_files
    from sa3dist.runtime.start_limit import StartLimit
    from sa3dist.training.compile_processes import end_all, start_early

    arguments, unknown = parser(program, about).parse_known_intermixed_args(argv)
    _log_to_stderr(launcher.dist_rank_from_environment() == 0)
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
            stop.judge = StartLimit(stop, settings.output_dir, settings.work_dir).judge
        if arguments.print_config:
            import yaml

            print(yaml.safe_dump(settings.as_dict(), sort_keys=False), end="")
            return
        launcher.check()
        allow_open_files(settings.num_workers)
        if not launcher.has_peers():
            stop.raise_if_requested("starting")
        started = start_early(settings, launcher.dist_rank_from_environment()) if trains else {}
        try:
            _run_connected(settings, stop, stages, running, started)
        finally:
            end_all(started)

    code = run_program(
        body,
        lambda: None if arguments.print_config else config.output_dir_of(values),
        lambda: running[0].step if running else 0,
        lambda failure: stop.judge(failure),
    )
    if running:
        running[0].on_exit()
    return code


def _log_to_stderr(is_main: bool) -> None:
    logging.basicConfig(format="sa3dist: %(message)s", stream=sys.stderr)
    # It prints its own lines; propagated, each would appear twice.
    logging.getLogger("huggingface_hub").propagate = False
    logging.getLogger("sa3dist").setLevel(logging.INFO if is_main else logging.ERROR)


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
            reason = leave(group, stop.judge(failure), watchdog.told)
            if reason is failure:
                raise
            raise reason from failure
    disconnect()


def recording(settings: Settings, group: Group) -> contextlib.AbstractContextManager[None]:
    """Keep the run's warnings in warnings.jsonl on rank 0; a run that continues appends to the earlier ones."""
    from sa3dist.report.recorder import recorded_warnings
    from sa3dist.runtime.launcher import requeued_job
    from sa3dist.training import checkpoint

    begins = (settings.resume == "never" and requeued_job() is None) or not checkpoint.list_all(settings.output_dir)
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


if __name__ == "__main__":
    as_process(main)
