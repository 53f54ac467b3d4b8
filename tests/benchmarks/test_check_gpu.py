"""Every part of gpu-check on a CPU with tiny sizes; its budgets, and what a bare machine lacks."""

import dataclasses
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import bench_adapted_linear
import check_ops
import check_ranks
import check_run
import check_step
import check_tests
import command_runs
import gpu_check
import psutil
import pytest
import results_file
import step_sides
import torch
from sa3dist_kernels import ADAPTER_TYPES
from timing import peak_bytes

from tests.helpers.golden import ROOT

CPU = torch.device("cpu")
# Absent on the machines gpu-check is for.
ABSENT = ("webdataset", "soundfile", "pydantic", "pydantic_core", "deepspeed", "diffusers", "aiohttp")
# Run by every Python process that finds it on its path: the named packages cannot be found, as if not installed.
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def results(tmp_path):
    return results_file.ResultsFile.start(tmp_path / "gpu_part.json", CPU, {})


# The program once for each part, in one process: each of its own would import torch first.
ONE_AFTER_THE_OTHER = """
import runpy, sys
program, *parts = sys.argv[1:]
sys.path.insert(0, program.rpartition("/")[0])
for part in parts:
    # The budget counts from the start of the process, which a busy machine may have spent on the parts before.
    sys.argv = [program, part, "--device", "cpu", "--tiny", "--seconds", "900"]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        print(f"{part} ended with {end.code}", flush=True)
"""


@pytest.fixture(scope="module")
def bare_parts(tmp_path_factory):
    """What three parts have said and written, run where the absent packages cannot be found: (text, {part: JSON})."""
    folder, parts = tmp_path_factory.mktemp("bare"), ("ops", "step", "tests")
    (folder / "sitecustomize.py").write_text(HIDE)
    paths = [str(folder), ".", "kernels"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OUT": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ONE_AFTER_THE_OTHER, "kernels/benchmarks/gpu_check.py", *parts]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, {part: json.loads((folder / f"gpu_{part}.json").read_text()) for part in parts}


def test_the_hidden_packages_are_hidden(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code, *ABSENT]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


@pytest.mark.slow
def test_ops_and_step_pass_without_the_data_stages_packages(bare_parts):
    said, contents = bare_parts
    for part in ("ops", "step"):
        assert f"{part} ended with 0\n" in said, said
        content = contents[part]
        assert (content["state"], content["passed"], content["skipped"]) == ("finished", True, [])
        assert content["rows"]
        environment = content["environment"]
        assert environment["torch"] == torch.__version__
        assert len(environment["source_sha256"]) == 64
        assert "gpu_check.py" in environment["command"]
        assert {"device", "triton", "commit", "date"} <= environment.keys()
    (without_graphs,) = contents["step"]["launched"]
    assert without_graphs["frames"] == contents["step"]["rows"][0]["frames"]
    assert without_graphs["launched_ms"] > 0
    assert without_graphs["device_ms"] == pytest.approx(contents["step"]["rows"][0]["profile"]["device_ms"], abs=1e-3)


def test_run_names_the_packages_it_lacks_and_takes_them_from_wheels(tmp_path, monkeypatch):
    monkeypatch.setattr(command_runs, "NEEDED", ("torch", "no_such_package", "nor_this"))
    monkeypatch.setattr(command_runs, "WHEELS", tmp_path)
    (tmp_path / "nor_this-1.0-py3-none-any.whl").touch()
    with pytest.raises(command_runs.CommandFailed, match="^no_such_package: not installed here"):
        command_runs.command_environment(tmp_path / "scratch", CPU)
    write_wheel(tmp_path / "nor_this-1.0-py3-none-any.whl", "nor_this")
    write_wheel(tmp_path / "no_such_package-1.0-py3-none-any.whl", "no_such_package")
    environment = command_runs.command_environment(tmp_path / "scratch", CPU)
    code = "import no_such_package, nor_this, sa3dist, sa3dist_kernels; print(nor_this.NAME)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert done.stdout == "nor_this\n", done.stderr


def write_wheel(path, name):
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"NAME = {name!r}\n")
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.mark.slow
def test_tests_part_records_every_gpu_test_of_a_file(bare_parts):
    said, content = bare_parts[0], bare_parts[1]["tests"]
    assert "tests ended with 0\n" in said, said
    outcomes = {row["test"].rpartition("::")[2]: row for row in content["rows"]}
    # bora and bora-xs in three formats and sizes, and the test of formats, by torch; Triton and waiting need CUDA.
    assert content["summary"] == {"passed": 2 * 3 * 3 + 2, "skipped": 2 * 3 * 3 + 2 + 2 * 2}
    name = "test_either_form_is_no_further_from_float64_than_the_materialised[torch-bora-bf16-odd]"
    assert outcomes[name]["outcome"] == "passed"
    assert len(outcomes[name]["errors_ours_and_materialised"]["y"]) == 2
    assert (content["files"], content["exit_code"]) == (["test_gpu_adapted_linear.py"], 0)
    assert content["processes"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_cuda_it_says_so_in_one_line_and_exits_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main(["ops"]) == 2
    said = capsys.readouterr().err
    assert "no CUDA device" in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_all_gpu_tests_are_found_for_cuda_and_this_file_is_not():
    first, *others = names = [path.name for path in check_tests.gpu_files(torch.device("cuda"))]
    assert first == "test_gpu_training.py"
    assert {"test_gpu_adapted_linear.py", "test_model_gpu.py", "test_cudnn_attention.py"} <= {*others}
    assert Path(__file__).name not in names
    assert "test_model_gpu.py" not in {path.name for path in check_tests.gpu_files(CPU)}


def test_a_failing_gpu_test_fails_the_part_and_is_recorded_with_its_reason(tmp_path, monkeypatch, results):
    bad = tmp_path / "test_gpu_bad.py"
    bad.write_text("import pytest\n@pytest.mark.gpu\ndef test_bad():\n    assert 1 == 2, 'one is not two'\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    monkeypatch.setattr(check_tests, "gpu_files", lambda device: [bad])
    monkeypatch.setattr(check_tests, "PROCESSES", 0)
    assert check_tests.run(results, results_file.Budget(60), CPU, tiny=False) is False
    assert [row["outcome"] for row in results.rows] == ["failed"]
    assert "one is not two" in results.rows[0]["why"]
    assert (results.content["files"], results.content["exit_code"]) == ([bad.name], 1)


def test_tests_that_hang_are_ended_with_the_budget(tmp_path, monkeypatch, results):
    slow = tmp_path / "test_gpu_slow.py"
    slow.write_text("import time\ntime.sleep(99)\n")
    monkeypatch.setattr(check_tests, "gpu_files", lambda device: [slow])
    monkeypatch.setattr(check_tests, "PROCESSES", 0)
    monkeypatch.setattr(check_tests, "MIN_SECONDS", 1.0)
    assert check_tests.run(results, results_file.Budget(7), CPU, tiny=False) is False
    # What the budget leaves after the end of pytest, and after what came before on a slow machine.
    assert results.content["exit_code"] in ("stopped after 2 s", "stopped after 1 s", "stopped after 0 s")


def test_a_part_without_time_left_skips_and_says_what(results):
    spent = results_file.Budget(-1)
    check_ops.run(results, spent, CPU, tiny=True)
    cases = len(check_ops.SMALL.layers) * len(check_ops.SMALL.tokens) * len(check_ops.SMALL.ranks)
    assert len(results.content["skipped"]) == cases
    assert results.rows == []
    check_step.run(results, spent, CPU, tiny=True)
    assert [entry["adapter_type"] for entry in results.content["skipped"]] == ["dora-rows", "bora-xs"]
    assert check_tests.run(results, spent, CPU, tiny=True) is False
    assert results.content["skipped"][0]["why"] == "time budget"
    assert json.loads(results.path.read_text()) == results.content


def test_a_part_that_breaks_keeps_what_it_measured_and_names_the_problem(tmp_path, monkeypatch, capsys):
    def breaks(results, budget, device, tiny):
        results.add(measured=1)
        raise RuntimeError("the device fell off")

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(check_ops, "run", breaks)
    assert gpu_check.main(["ops", "--device", "cpu", "--tiny"]) == 1
    content = json.loads((tmp_path / "gpu_ops.json").read_text())
    assert content["state"] == "failed"
    assert content["rows"] == [{"measured": 1}]
    assert content["problem"] == "RuntimeError: the device fell off"
    assert not content["passed"]
    assert "the device fell off" in capsys.readouterr().err


def test_commit_is_none_where_git_is_absent(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert results_file.commit() is None


def test_measured_layers_are_the_medium_models():
    shapes = {(fan_in, fan_out) for fan_in, fan_out, _ in check_ops.REAL.layers}
    assert shapes == {(1536, n) for n in (7680, 1536, 3072, 4608, 12288)} | {(6144, 1536)}
    assert set(check_ops.REAL.layers) == set(bench_adapted_linear.SHAPES["medium"].values())


def test_all_nine_types_are_planned_the_most_telling_first():
    first, *others = check_step.PLAN
    assert (first.adapter_type, first.in_full) == ("dora-rows", True)
    assert {group.adapter_type for group in others} == set(ADAPTER_TYPES) - {"dora-rows"}
    assert {(group.shape, group.rank, group.frames) for group in check_step.PLAN} == {("medium-base", 16, (323, 4091))}


@pytest.mark.parametrize("frames", [323, 4091])
def test_unequal_lengths_lie_around_the_equal_ones_and_within_the_model(frames):
    lengths = check_step.mix_of(frames, 24)
    assert len(set(lengths)) == 24
    assert lengths != sorted(lengths)
    assert 0.8 * frames <= min(lengths) < 0.9 * frames
    assert max(lengths) <= min(1.2 * frames, 4096)


def test_a_group_that_breaks_fails_the_part_and_is_named_and_the_others_are_measured(monkeypatch, results):
    def breaks(*_):
        raise RuntimeError("device lost\nand more")

    monkeypatch.setattr(check_step, "measure_in_full", breaks)
    assert check_step.run(results, results_file.Budget(60), CPU, tiny=True) is False
    (broken,) = results.content["failed"]
    assert (broken["adapter_type"], broken["why"]) == ("dora-rows", "RuntimeError: device lost")
    assert [(row["adapter_type"], row["frozen_ms"], row["over_frozen"]) for row in results.rows] == [
        ("bora-xs", None, None)
    ] * 2


def test_a_side_is_measured_per_use_and_keeps_its_weights_again_afterwards(monkeypatch):
    monkeypatch.setattr(step_sides, "ADAPTER_PRODUCTS", "formed")
    ours = step_sides.Side("ours", check_step.options_of(check_step.TINY_PLAN[0], tiny=True), CPU)
    ours.use(1, 6)
    assert 0 < check_step.per_use_bytes(ours, 0, CPU) < peak_bytes(ours.step, CPU)
    assert not ours.formed.per_use


def test_targets_are_held_against_the_rows_they_are_about():
    row = {"shape": "medium-base", "adapter_type": "dora-rows", "rank": 16, "frames": 323, "frozen_ms": 12.5}
    row |= {
        "ours_ms": 20.0,
        "over_frozen": 1.6,
        "unequal_over_equal": None,
        "total_bytes": 6e9,
        "per_use_total_bytes": 4e9,
    }
    long = {**row, "frames": 4091, "frozen_ms": 94.0, "ours_ms": 106.0, "total_bytes": 17e9}
    others = [{**row, "rank": 128}, {**row, "shape": "small-music-base"}]
    others += [{**row, "adapter_type": "bora", "over_frozen": 2.0}]
    # 2000 tokens, memory tokens among them.
    without_graphs = {name: row[name] for name in ("shape", "adapter_type", "rank")} | {"launched_over_device": 1.4}
    others += [{**without_graphs, "frames": frames} for frames in (323, 1936)]
    found = check_step.against_targets([row, long, *others])
    met = {(entry["adapter_type"], entry["frames"], entry["figure"]): entry["met"] for entry in found}
    assert met == {
        ("dora-rows", 323, "frozen_ms"): False,
        ("dora-rows", 323, "ours_ms"): True,
        ("dora-rows", 323, "total_bytes"): True,
        ("dora-rows", 323, "per_use_total_bytes"): True,
        ("dora-rows", 4091, "frozen_ms"): True,
        ("dora-rows", 4091, "ours_ms"): False,
        ("dora-rows", 4091, "total_bytes"): False,
        ("bora", 323, "over_frozen"): False,
        ("dora-rows", 1936, "launched_over_device"): False,
    }


@pytest.mark.slow
def test_run_runs_all_stages_and_a_resumed_loss_that_differs_fails_it(monkeypatch, results):
    monkeypatch.setattr(check_run, "largest_difference", lambda rows, others: 1e-7)
    assert check_run.run(results, results_file.Budget(300), CPU, tiny=True) is False
    rows = {row["what"]: row for row in results.rows}
    assert (results.content["failed"], results.content["skipped"]) == ([], [])
    assert not rows["resume"]["same"]
    assert rows["resume"]["every_step_once"]
    assert 0 < rows["resume"]["resumed_from"] < rows["resume"]["killed_after"]
    taken_twice = rows["resume"]["losses"][: rows["resume"]["steps_taken_twice"]]
    assert taken_twice == rows["train"]["losses"][rows["resume"]["resumed_from"] :]
    assert rows["export and reload"]["equal"]
    assert rows["export and reload"]["acts"]
    assert rows["warm start"]["startup_seconds"]["encode"] < rows["first start"]["startup_seconds"]["encode"]


def test_a_part_of_the_run_that_breaks_in_any_way_leaves_the_others(monkeypatch, results):
    def breaks(*_):
        raise StopIteration

    for name in ("killed_and_resumed", "warm_start", "reloaded"):
        monkeypatch.setattr(check_run, name, breaks)
    monkeypatch.setattr(check_run, "encoder_alone", lambda results, *_: results.add(what="encode alone"))
    monkeypatch.setattr(check_run, "against_targets", lambda rows: [])
    assert check_run.run(results, results_file.Budget(60), CPU, tiny=True) is False
    named = [entry["what"] for entry in results.content["failed"]]
    assert named == ["train and resume", "warm start", "reload"]
    assert results.rows[-1]["what"] == "encode alone"


def test_a_command_that_ends_early_is_told_with_what_it_said(tmp_path):
    environment = command_runs.command_environment(tmp_path, CPU)
    with (
        command_runs.Command(environment, tmp_path / "run", ["model=nowhere", "audio_data_url=nothing.zip"]) as command,
        pytest.raises(command_runs.CommandFailed, match="ended with 2 before step 1: .*nothing.zip"),
    ):
        command.wait_for_step(1, 120)


def test_ranks_that_drift_apart_fail():
    results = types.SimpleNamespace(add=lambda **row: None)
    row = {"step": 1, "loss": 2.0, "clips": ["a", "b"]}
    adapters = {"w": torch.ones(4)}
    pair = {"one": [row], "two": [row]}
    assert check_ranks.compare(results, pair, {"one": adapters, "two": {"w": torch.ones(4) + 1e-6}})
    assert not check_ranks.compare(results, pair, {"one": adapters, "two": {"w": torch.ones(4) + 1e-5}})
    assert not check_ranks.compare(
        results, pair | {"two": [{**row, "loss": 2.001}]}, {"one": adapters, "two": adapters}
    )
    assert not check_ranks.compare(
        results, pair | {"two": [{**row, "clips": ["b", "a"]}]}, dict.fromkeys("ab", adapters)
    )


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (1000.0, ["step", "tests", "run", "ranks", "ops"]),
        # The last does not fit any more.
        (450.0 + 30, ["step", "tests", "run"]),
    ],
)
def test_all_runs_the_parts_in_order_and_starts_none_that_would_end_too_late(monkeypatch, capsys, left, expected):
    started, clock = [], types.SimpleNamespace(left=left)

    class Process:
        def __init__(self, command, **_):
            started.append(command[command.index("--device") - 1])
            self.seconds = float(command[command.index("--seconds") + 1])

        def wait(self, limit):
            clock.left -= self.seconds
            assert limit == pytest.approx(self.seconds + gpu_check.GRACE_SECONDS, abs=1)
            return int(started[-1] == "tests")

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Process)
    budget = types.SimpleNamespace(left=lambda: clock.left)
    options = types.SimpleNamespace(device="cpu", tiny=True)
    assert gpu_check.run_all(options, budget) == 1
    assert started == expected
    said = capsys.readouterr().out
    assert "gpu-check tests: FAILED (1)" in said
    assert said.count("left out: time budget") == 5 - len(expected)


def test_a_part_killed_by_all_says_so_in_its_file_and_keeps_its_rows(tmp_path, monkeypatch):
    class Hanging:
        def __init__(self, command, **_):
            part = command[command.index("--device") - 1]
            results_file.ResultsFile.start(gpu_check.results_path(part), CPU, {}).add(measured=1)

        def wait(self, limit):
            raise subprocess.TimeoutExpired("part", limit)

    monkeypatch.setenv("OUT", str(tmp_path))
    there = types.SimpleNamespace(Popen=Hanging, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu_check, "subprocess", there)
    monkeypatch.setattr(gpu_check, "kill_tree", lambda process: None)
    assert gpu_check.run_all(types.SimpleNamespace(device="cpu", tiny=True), results_file.Budget(900)) == 1
    for part in gpu_check.PARTS:
        content = json.loads((tmp_path / f"gpu_{part}.json").read_text())
        assert (content["state"], content["passed"]) == ("killed at the end of its time", False)
        assert content["rows"] == [{"measured": 1}]


def test_a_part_that_hangs_is_killed_with_what_it_has_started(tmp_path):
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
    code += "; print('ready', flush=True); time.sleep(99)"
    mark = tmp_path / "late"
    inner = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    process = subprocess.Popen([sys.executable, "-c", code, inner], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    members = psutil.Process(process.pid).children(recursive=True)
    gpu_check.kill_tree(process)
    assert process.returncode == -9
    gone, alive = psutil.wait_procs(members, timeout=30)
    assert (len(gone), alive) == (1, [])


HANGING_PART = """
import subprocess, sys, time
import check_ops, gpu_check

def run(results, budget, device, tiny):
    results.add(measured=subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"]).pid)
    time.sleep(99)

check_ops.run, gpu_check.LATE_SECONDS = run, 0.5
gpu_check.main(["ops", "--device", "cpu", "--tiny", "--seconds", "0.5"])
"""


def test_a_part_that_hangs_ends_itself_and_what_it_has_started_and_says_where_it_was(tmp_path):
    paths = [str(ROOT / "kernels" / "benchmarks"), str(ROOT), str(ROOT / "kernels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OUT": str(tmp_path)}
    command = [sys.executable, "-c", HANGING_PART]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'File "<string>", line 7 in run' in done.stderr
    content = json.loads((tmp_path / "gpu_ops.json").read_text())
    assert (content["state"], content["passed"]) == ("killed at the end of its time", False)
    ((child,),) = (row.values() for row in content["rows"])
    # Without its parent it stays a zombie where nobody waits for it.
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_choice_of_the_compiler_that_fails_is_named_and_the_others_are_timed(tmp_path, monkeypatch):
    import bench_compiler

    def measured(name, options, device):
        yield {"choice": name}
        if name == "norms saved":
            raise RuntimeError("no such choice here")

    monkeypatch.setattr(bench_compiler, "measured", measured)
    words = ["--device", "cpu", "--out", str(tmp_path / "out.json"), "--choice", "norms saved", "default"]
    assert bench_compiler.main(words) == 1
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["failed"] == {"norms saved": "RuntimeError: no such choice here"}
    assert [row["choice"] for row in content["rows"]] == ["norms saved", "default"]


def test_types_are_compiled_ahead_by_processes_that_may_fail(tmp_path, monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    group = check_step.TINY_PLAN[-1]
    unknown = dataclasses.replace(group, shape="no-such-shape", adapter_type="lora")
    results = results_file.ResultsFile.start(tmp_path / "gpu_step.json", CPU, {})
    check_step.compile_ahead(results, results_file.Budget(60), (group, unknown), CPU)
    assert results.content["compiled_ahead"]["exit_codes"] == {group.adapter_type: 0, "lora": 1}
