"""Starts that max_wall_time ends before their first step."""

import json

import pytest

from sa3dist import errors
from sa3dist.runtime import exit_status
from sa3dist.runtime.signals import EXIT_SECONDS, StopRequest, seconds_since_start
from sa3dist.runtime.start_limit import StartLimit
from tests.helpers.program import run, short_run, status


@pytest.fixture
def start(tmp_path):
    """Ends a start with ``failure`` after its time is over; returns its exit code and writes its status.json."""

    def start(failure=None, stop=None):
        if stop is None:
            stop = StopRequest()
            stop.limit(seconds_since_start() + EXIT_SECONDS - 1)
        limit = StartLimit(stop, tmp_path, tmp_path / "work")

        def body():
            if failure is not None:
                raise failure
            stop.raise_if_requested("encoding")

        return exit_status.run_program(body, lambda: tmp_path, lambda: 0, limit.judge)

    return start


def leave(tmp_path, name, size):
    path = tmp_path / "work" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))


def test_a_run_whose_time_never_reaches_a_step_is_refused_at_its_second_start(tmp_path, demo_base, demo_clips, capfd):
    words = [*short_run(demo_clips, demo_base, tmp_path / "work"), "max_wall_time=6"]
    assert [run(words, tmp_path / "run") for _ in range(2)] == [75, 2]
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 2
    assert said[1].startswith("max_wall_time: too short to begin, twice now")
    assert status(tmp_path / "run")["message"] == said[1]


def test_time_that_stopping_alone_takes_is_refused_at_once(tmp_path, demo_base, demo_clips, capfd):
    words = [*short_run(demo_clips, demo_base, tmp_path / "work"), f"max_wall_time={EXIT_SECONDS:g}"]
    assert run(words, tmp_path / "run") == 2
    assert capfd.readouterr().err.startswith("max_wall_time: 5 s is not more than the 5 s kept for stopping")


@pytest.mark.parametrize("name", ["latents/ab.safetensors", "downloads/.x.part"])
def test_a_start_that_leaves_more_than_the_one_before_is_worth_another(start, tmp_path, name):
    assert start() == 75
    leave(tmp_path, name, 1)
    assert start() == 75
    leave(tmp_path, name.replace("x", "y").replace("ab", "cd"), 1)
    assert start() == 75
    assert start() == 2


def test_more_of_an_unfinished_download_counts_and_other_unfinished_files_do_not(start, tmp_path):
    leave(tmp_path, "downloads/.x.part", 1)
    assert start() == 75
    leave(tmp_path, "downloads/.x.part", 2)
    assert start() == 75
    leave(tmp_path, "shards/.ab.tmp/shard-000000.tar", 2)
    leave(tmp_path, "latents/.cd.tmp", 2)
    leave(tmp_path, "streaming/ab/0-0-host-1.part", 2)
    assert start() == 2


def test_only_starts_without_a_step_and_without_a_signal_are_counted(start):
    stepped, signalled = StopRequest(), StopRequest()
    for stop in (stepped, signalled):
        stop.limit(seconds_since_start() + EXIT_SECONDS - 1)
    stepped.reserve(0.0, 0.0)
    signalled.signal_name = "SIGTERM"
    assert [start(stop=stop) for stop in (stepped, stepped, signalled, signalled)] == [75] * 4
    assert start(errors.EnvironmentFailure("full")) == 70
    assert [start(), start()] == [75, 2]


def test_all_ranks_end_with_the_verdict_of_the_first(tmp_path):
    stop = StopRequest()
    verdict = StartLimit(stop, tmp_path, tmp_path / "work").judge(errors.OutOfTime("over on rank 1"))
    # This rank has time left, but takes part in the other's end: the next start must know.
    assert isinstance(verdict, errors.OutOfTime)
    assert verdict.kept == [0, 0]
    exit_status.report(verdict, tmp_path, 0, 0.0)
    assert json.loads((tmp_path / "status.json").read_text())[exit_status.KEPT_KEY] == [0, 0]
