"""Every part of gpu-check on a CPU with tiny sizes, as a bare machine without the data stages' packages runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_adapted_linear
import check_ops
import check_run
import check_step
import check_tests
import gpu_check
import pytest
import results_file
import torch

ROOT = Path(__file__).resolve().parent.parent
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


def bare_run(folder, *words):
    """gpu_check.py in a process that lacks the absent packages: (exit code, stderr, its JSON or None)."""
    (folder / "bare").mkdir(exist_ok=True)
    (folder / "bare/sitecustomize.py").write_text(HIDE)
    paths = [str(folder / "bare"), ".", "kernels"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OUT": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "kernels/benchmarks/gpu_check.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    path = folder / f"gpu_{words[0]}.json"
    return done.returncode, done.stderr, json.loads(path.read_text()) if path.exists() else None


def test_the_hidden_packages_are_hidden(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code, *ABSENT]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


@pytest.mark.slow
def test_ops_step_and_run_pass_without_the_data_stages_packages(tmp_path):
    for part in ("ops", "step", "run"):
        code, errors, content = bare_run(tmp_path, part, "--device", "cpu", "--tiny")
        assert code == 0, errors
        assert (content["state"], content["passed"], content["skipped"]) == ("finished", True, [])
        assert content["rows"]
        environment = content["environment"]
        assert environment["torch"] == torch.__version__
        assert len(environment["source_sha256"]) == 64
        assert "gpu_check.py" in environment["command"]
        assert {"device", "triton", "commit", "date"} <= environment.keys()


@pytest.mark.slow
def test_tests_part_records_every_gpu_test_of_a_file(tmp_path):
    code, errors, content = bare_run(tmp_path, "tests", "--device", "cpu", "--tiny")
    assert code == 0, errors
    outcomes = {row["test"].rpartition("::")[2]: row for row in content["rows"]}
    # bora and bora-xs in three formats and sizes, and the test of formats, by torch; Triton and waiting need CUDA.
    assert content["summary"] == {"passed": 2 * 3 * 3 + 2, "skipped": 2 * 3 * 3 + 2 + 2 * 2}
    name = "test_factored_form_is_no_further_from_float64_than_the_materialised[torch-bora-bf16-odd]"
    assert outcomes[name]["outcome"] == "passed"
    assert len(outcomes[name]["errors_ours_and_materialised"]["y"]) == 2
    assert content["files"] == [{"file": "test_gpu_adapted_linear.py", "exit_code": 0}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_cuda_it_says_so_in_one_line_and_exits_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main(["ops"]) == 2
    said = capsys.readouterr().err
    assert "no CUDA device" in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_all_gpu_tests_are_found_for_cuda_and_this_file_is_not():
    names = {path.name for path in check_tests.gpu_files(torch.device("cuda"))}
    assert {"test_gpu_adapted_linear.py", "test_gpu_training.py", "test_model_gpu.py"} <= names
    assert Path(__file__).name not in names
    assert "test_model_gpu.py" not in {path.name for path in check_tests.gpu_files(CPU)}


def test_a_failing_gpu_test_fails_the_part_and_is_recorded_with_its_reason(tmp_path, monkeypatch, results):
    bad = tmp_path / "test_gpu_bad.py"
    bad.write_text("import pytest\n@pytest.mark.gpu\ndef test_bad():\n    assert 1 == 2, 'one is not two'\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    monkeypatch.setattr(check_tests, "gpu_files", lambda device: [bad])
    assert check_tests.run(results, results_file.Budget(60), CPU, tiny=False) is False
    assert [row["outcome"] for row in results.rows] == ["failed"]
    assert "one is not two" in results.rows[0]["why"]
    assert results.content["files"] == [{"file": bad.name, "exit_code": 1}]


def test_a_part_without_time_left_skips_and_says_what(results):
    spent = results_file.Budget(-1)
    check_ops.run(results, spent, CPU, tiny=True)
    cases = len(check_ops.SMALL.layers) * len(check_ops.SMALL.tokens) * len(check_ops.SMALL.ranks)
    assert len(results.content["skipped"]) == cases
    assert results.rows == []
    check_step.run(results, spent, CPU, tiny=True)
    assert [entry["shape"] for entry in results.content["skipped"]] == ["tiny-medium", "tiny-small"]
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


def test_floor_is_the_larger_of_arithmetic_and_traffic():
    ceilings = {"matmul_tflops": 800.0, "copy_gb_per_s": 4000.0}
    # 4 N I O operations; N large: arithmetic decides. Weight read twice; N = 1: traffic decides.
    assert check_ops.floor_ms((1536, 12288, True), 4160, 2, ceilings) == pytest.approx(4 * 4160 * 1536 * 12288 / 8e11)
    one = check_ops.floor_ms((1536, 12288, True), 1, 2, ceilings)
    assert one == pytest.approx(2 * 2 * (1536 * 12288 + 1536 + 12288) / 4e9)


def test_measured_layers_are_the_medium_models():
    shapes = {(fan_in, fan_out) for fan_in, fan_out, _ in check_ops.REAL.layers}
    assert shapes == {(1536, n) for n in (7680, 1536, 3072, 4608, 12288)} | {(6144, 1536)}
    assert set(check_ops.REAL.layers) == set(bench_adapted_linear.SHAPES["medium"].values())


def test_the_most_telling_steps_come_first():
    first, second = check_step.PLAN[:2]
    assert (first.shape, first.adapter_type, first.frames[:2]) == ("medium-base", "dora-rows", (323, 4091))
    assert (second.shape, second.adapter_type, second.frames[0]) == ("small-music-base", "dora-rows", 323)
    planned = {(g.shape, g.adapter_type, g.rank) for g in check_step.PLAN}
    types = ("lora", "dora-rows", "dora-cols", "bora", "dora-rows-xs")
    kinds = [(name, rank) for name in types for rank in (16, 128)]
    assert planned == {(shape, *kind) for shape in ("medium-base", "small-music-base") for kind in kinds}


def test_a_group_that_breaks_fails_the_part_and_is_named_and_the_others_are_measured(monkeypatch, results):
    measure, asked = check_step.measure, []

    def breaks_once(group, *others):
        asked.append(group)
        if len(asked) == 1:
            raise RuntimeError("device lost\nand more")
        measure(group, *others)

    monkeypatch.setattr(check_step, "measure", breaks_once)
    assert check_step.run(results, results_file.Budget(60), CPU, tiny=True) is False
    (broken,) = results.content["failed"]
    assert (broken["shape"], broken["why"]) == (check_step.TINY_PLAN[0].shape, "RuntimeError: device lost")
    assert {row["shape"] for row in results.rows} == {check_step.TINY_PLAN[1].shape}


def test_targets_are_held_against_the_rows_they_are_about():
    row = {"shape": "medium-base", "adapter_type": "dora-rows", "rank": 16, "frames": 323, "ratio": 9.0}
    row |= {
        "ratio_from_audio": None,
        "named_share": None,
        "over_frozen": 1.2,
        "over_floor": 1.5,
        "recomputing_total_bytes": 30e9,
    }
    others = [{**row, "rank": 128}, {**row, "shape": "small-music-base"}]
    found = check_step.against_targets([row, *others, {**row, "frames": 4091, "ratio": 2.1, "ratio_from_audio": 4.5}])
    met = {(entry["frames"], entry["figure"]): entry["met"] for entry in found}
    assert met == {
        (323, "ratio"): True,
        (323, "over_frozen"): False,
        (4091, "ratio"): False,
        (4091, "ratio_from_audio"): True,
        (4091, "over_frozen"): False,
        (4091, "over_floor"): True,
        (4091, "recomputing_total_bytes"): False,
    }


def test_resumed_losses_that_differ_fail_the_run(monkeypatch, results):
    monkeypatch.setattr(check_run, "largest_difference", lambda rows, others: 0.1)
    assert check_run.run(results, results_file.Budget(60), CPU, tiny=True) is False
    resumed = next(row for row in results.rows if row["what"] == "resume")
    assert not resumed["same"]
    assert resumed["losses"] == results.rows[0]["losses"][check_run.TINY.save_every :]


def test_a_changed_base_weight_changes_the_checksum():
    base = check_run.make_base("tiny-small", 2, CPU, torch.bfloat16)
    before = check_run.weights_checksum(base)
    assert check_run.weights_checksum(base) == before
    with torch.no_grad():
        base.dit.transformer.layers[1].ff.ff[2].weight[3, 5] *= 1.01
    assert check_run.weights_checksum(base) != before
