"""The limit on open files is raised as far as it can be; where that is not enough, a run says so at once."""

import json
import resource
import subprocess
import sys

import pytest

from sa3dist.errors import EnvironmentFailure
from sa3dist.runtime.open_files import ENOUGH, allow_open_files
from tests.helpers.golden import ROOT


@pytest.fixture
def limited(monkeypatch):
    """The limits of a process, soft and hard, as the system would hold them."""

    def held(soft, hard, may_raise=True):
        limits = [soft, hard]

        def change(_, values):
            if not may_raise:
                raise ValueError("not allowed to raise maximum limit")
            limits[:] = values

        monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
        monkeypatch.setattr(resource, "setrlimit", change)
        return limits

    return held


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(30, 4096, 4096), (1024, resource.RLIM_INFINITY, ENOUGH), (1024, 1 << 20, ENOUGH), (1 << 20, 1 << 20, 1 << 20)],
)
def test_the_limit_is_raised_as_far_as_a_run_may_need_and_the_system_allows(limited, soft, hard, raised):
    limits = limited(soft, hard)
    allow_open_files(num_workers=8)
    assert limits == [raised, hard]


def test_what_cannot_be_raised_is_enough_or_refused(limited):
    limited(256, 4096, may_raise=False)
    allow_open_files(num_workers=2)
    with pytest.raises(
        EnvironmentFailure, match=r"^ulimit -n: at most 256 open files here, num_workers=32 may need 544"
    ):
        allow_open_files(num_workers=32)


def test_a_run_that_may_open_thirty_files_ends_with_a_line_and_does_not_hang(demo_base, demo_clips, tmp_path):
    words = [f"audio_data_url={demo_clips}", f"model={demo_base}", f"output_dir={tmp_path / 'out'}", "num_workers=2"]
    command = f'ulimit -n 30; exec "{sys.executable}" -m sa3dist.train "$@"'
    ended = subprocess.run(
        ["bash", "-c", command, "run", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 70
    assert ended.stderr.startswith("ulimit -n: at most 30 open files here, num_workers=2 may need 64; raise the limit")
    assert ended.stderr.count("\n") == 1
    assert json.loads((tmp_path / "out/status.json").read_text())["exit_code"] == 70
