"""One short case of every program here and in tests/slurm: their long series run by hand, and must still run then.

What changes the machine (namespaces, their links, a Slurm cluster) runs only where SA3_REQUIRE_TOOLS=1 asks for it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.forked_programs import ForkedPrograms
from tests.helpers.golden import ROOT
from tests.helpers.program import ENVIRONMENT

SURVIVAL, SLURM = ROOT / "tests/survival", ROOT / "tests/slurm"
ASKED_FOR = os.environ.get("SA3_REQUIRE_TOOLS") == "1"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """One for all: what one program has made and encoded the next one finds."""
    return tmp_path_factory.mktemp("series")


@pytest.fixture(scope="module")
def said_by():
    """What a program writes to stdout, by its path and words; it has to end with 0."""
    with ForkedPrograms() as programs:

        def run(program: Path, *words) -> str:
            code, out, err = programs.run(program, *words)
            assert code == 0, f"{out}\n{err}"
            return out

        yield run


def figures(said: str) -> dict:
    """The JSON object that a series ends with."""
    return json.loads(said[re.search(r"^\{$", said, re.MULTILINE).start() :])


def require(*tools: str) -> None:
    """Skip what was not asked for; fail where it was and the machine cannot."""
    if not ASKED_FOR:
        pytest.skip(f"needs root and {', '.join(tools)}, and changes the machine: SA3_REQUIRE_TOOLS=1 runs it")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    assert not missing
    assert os.geteuid() == 0, "needs root"


@pytest.mark.slow
def test_a_run_killed_inside_a_save_and_started_again_gives_the_undisturbed_file(said_by, directory):
    # This seed's one kill is of rank 1, inside a save.
    found = figures(said_by(SURVIVAL / "kill_series.py", directory, "--runs", 1, "--seed", 4, "--steps", 12))
    assert (found["identical"], found["runs"], found["kills"], found["kills_of_one_rank"]) == (1, 1, 1, 1)
    assert found["end_seconds_worst"] < 60


@pytest.mark.slow
def test_a_run_with_everything_on_that_is_killed_inside_a_preview_gives_the_file_of_one_with_everything_off(
    said_by, directory
):
    words = ["--runs", 1, "--processes", 1, "--steps", 4, "--terms", 0, "--seed", 1]
    found = figures(said_by(SURVIVAL / "watched_series.py", directory, *words))
    assert (found["watched_is_alone"], found["identical"], found["moments"]["preview"]) == (True, 1, 1)


@pytest.mark.slow
def test_a_signal_in_a_step_ends_with_75_and_the_run_can_be_continued(said_by, directory):
    words = ["--target", "rank", "--phase", "step", "--runs", 1, "--clips", 8, "--steps", 20]
    found = figures(said_by(SURVIVAL / "sigterm_series.py", directory, *words))["rank"]
    assert (found["as_promised"], found["runs"], found["resumed_identical"]) == (1, 1, 1)


@pytest.mark.slow
def test_a_killed_rank_ends_its_peer_with_a_line_that_names_it(said_by, directory):
    (found,) = map(json.loads, said_by(SURVIVAL / "failures.py", directory, "killed rank 1").splitlines())
    assert found["good"]
    assert found["codes"] == {"0": 70, "1": -9}


@pytest.mark.slow
def test_jobs_of_an_endpoint_that_is_killed_end_once_with_the_undisturbed_file(demo_base, demo_clips, tmp_path):
    pytest.importorskip("sqlalchemy")
    # Made already: the program would import the text encoder for a base.
    (tmp_path / "base").symlink_to(demo_base)
    (tmp_path / "clips.zip").symlink_to(demo_clips)
    # A process of its own: what it starts is told from it by the environment. One kill of the scheduler, one of all.
    words = [sys.executable, SURVIVAL / "serve_kills.py", tmp_path, "--events", "2", "--gap", "4", "6", "--lease", "4"]
    said = subprocess.run(
        [*words, "--steps", "10", "--slots", "1"], env=ENVIRONMENT, check=True, capture_output=True, text=True
    ).stdout
    found = figures(said)
    assert found["jobs"] == found["succeeded"] == found["ended_once"] == found["identical"]
    assert (found["overlaps"], found["processes_left"]) == ([], [])
    assert sum(found["events"].values()) == 2


@pytest.mark.slow
def test_a_polled_server_answers_all_keeps_its_order_and_its_memory(tmp_path):
    if shutil.which("wrk") is None:
        pytest.skip("needs wrk; make test-services runs the program for a minute")
    words = ["--seconds", "3", "--jobs", "120", "--connections", "40", "--rate", "100"]
    command = [sys.executable, SURVIVAL / "serve_load.py", tmp_path / "load", *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    found = figures(done.stdout)
    assert done.returncode == 0, found
    assert (found["accepted"], found["in_order"], found["errors"]) == (120, True, 0)
    assert found["requests"] > 0


@pytest.mark.slow
def test_two_ranks_train_as_one(said_by, directory):
    words = ["--steps", 2, "--only", "ddp-2-no", "--out", directory / "sizes"]
    one, two = map(json.loads, said_by(SURVIVAL / "world_sizes.py", *words).splitlines())
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["ok"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_a_run_under_deepspeed(said_by, directory):
    pytest.importorskip("deepspeed")
    words = ["--stage", 3, "--case", "not finite", "--products", "per_use"]
    (found,) = map(json.loads, said_by(SURVIVAL / "zero_failures.py", directory, *words).splitlines())
    assert (found["ok"], found["exit_code"]) == (True, 70)


@pytest.mark.slow
def test_the_memory_of_encoding_is_measured(said_by, demo_base):
    found = json.loads(said_by(SURVIVAL / "encode_memory.py", demo_base, "--seconds", "2"))
    # The tiny base's short clip takes a few megabytes at most.
    assert 0 <= found["grown_mb"]["2 s"] < 100


def test_the_tables_of_the_scaling_model_have_a_row_for_every_base_and_network(said_by):
    table = said_by(SURVIVAL / "scaling_check.py", "tables")
    rows = [
        line for line in table.splitlines() if re.match(r"\| (small-music|medium), (16|128) \| (Infini|25 G)", line)
    ]
    # Two bases, two ranks, two networks, three modes.
    assert len(rows) == 2 * 2 * 2 * 3
    shares = [int(share) for line in rows for share in re.findall(r"\b\d+(?= /| \|$)", line.partition("zero")[2])]
    assert all(0 < share <= 100 for share in shares)


@pytest.mark.parametrize(
    "program",
    [
        *("namespaces.py", "overlap.py", "serve_web.py", "serve_load.py"),
        *("../slurm/try_scripts.py", "../slurm/try_endpoint.py"),
    ],
)
def test_what_runs_only_on_demand_says_how(said_by, program):
    assert "usage: " in said_by(SURVIVAL / program, "--help")


@pytest.mark.slow
def test_two_hosts_survive_the_loss_of_one(said_by, directory):
    require("ip", "bridge", "tc", "unshare")
    said = said_by(SURVIVAL / "namespaces.py", directory, "killed-1")
    assert said.splitlines()[-1] == "all as promised"


@pytest.mark.slow
def test_pid_1_of_a_container_hears_a_signal(said_by, directory):
    require("unshare")
    words = ["--target", "pid1", "--phase", "step", "--runs", 1, "--clips", 8]
    found = figures(said_by(SURVIVAL / "sigterm_series.py", directory, *words))["pid1"]
    assert (found["as_promised"], found["runs"]) == (1, 1)


@pytest.mark.slow
def test_bytes_and_overlap_are_measured_between_two_hosts(said_by, directory):
    require("ip", "bridge", "tc", "unshare")
    counted = json.loads(said_by(SURVIVAL / "scaling_check.py", "count", directory, "ddp"))
    assert counted["sent_over_counted"] == pytest.approx(1, abs=0.1)
    row = json.loads(said_by(SURVIVAL / "overlap.py", "--megabits", 1000, "--backward", 0.1, "--elements", 80_000))
    assert row["whole"] > row["backward_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("program", [["try_scripts.py", "--only", "ends"], ["try_endpoint.py"]])
def test_runs_under_a_real_slurm_end_as_they_should(tmp_path, program):
    require("slurmctld", "slurmd", "sbatch", "munged")
    cluster = tmp_path / "cluster"
    subprocess.run([SLURM / "start_cluster.sh", cluster], check=True)
    try:
        words = [sys.executable, SLURM / program[0], tmp_path / "work", *program[1:]]
        environment = ENVIRONMENT | {"SLURM_CONF": str(cluster / "slurm.conf")}
        said = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout
    finally:
        subprocess.run([SLURM / "stop_cluster.sh", cluster], check=True)
    assert said.startswith("ok  ")
