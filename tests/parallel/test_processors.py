"""Nothing a run is made of depends on the processor: tables, bases, and what ranks on different processors end up with.

Other instructions stand for another processor: torch's kernels for the oldest one round differently.
"""

import json
import subprocess
import sys

import pytest
import torch

import sa3dist
from sa3dist import train
from sa3dist.adapters import adapted_layers, adapter_parameters, svd_bases
from sa3dist.errors import EnvironmentFailure
from sa3dist.model.loading import load_base
from sa3dist.training import checkpoint, rank_checks
from tests.helpers.forked_trainers import ForkedTrainer, places_of_ranks
from tests.helpers.golden import ROOT, golden
from tests.helpers.processors import computed
from tests.helpers.program import ENVIRONMENT, command, rows, run, status
from tests.helpers.ranks import free_port, run_ranks

OTHER = {"ATEN_CPU_CAPABILITY": "default"}

found_here = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch has no other kernels for this CPU"
)


@found_here
def test_frequencies_and_singular_bases_are_the_same_under_other_instructions(tmp_path):
    load = "import torch; from tests.helpers.processors import computed"
    program = f"{load}; torch.save(computed(), {str(tmp_path / 'found')!r})"
    environment = {**ENVIRONMENT, **OTHER, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{ROOT}"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
    here, there = computed(), torch.load(tmp_path / "found")
    # Otherwise nothing was tried.
    assert not torch.equal(here.pop("rounding"), there.pop("rounding"))
    assert here.keys() == there.keys()
    for name, value in here.items():
        # Bases are rounded to float32 once: two values on either side of a boundary may part.
        torch.testing.assert_close(there[name], value, rtol=0, atol=0 if name.startswith("table") else 6e-8)


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_an_environment_that_rounds_float32_products_is_overruled_and_named(name):
    program = """
from sa3dist import train
def products():
    import torch
    torch.manual_seed(0)
    audio, weight = torch.randn(1, 64, 400), torch.randn(64, 64, 5)
    exact = torch.nn.functional.conv1d(audio.double(), weight.double())
    error = (torch.nn.functional.conv1d(audio, weight) - exact).norm() / exact.norm()
    print(error.item(), torch.get_float32_matmul_precision())
    return 0
train.as_process(products)
"""
    environment = {**ENVIRONMENT, name: "BF16", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    error, precision = done.stdout.split()
    assert float(error) < 1e-6
    assert precision == "highest"
    assert [line.split()[1] for line in done.stderr.splitlines()] == [
        "ONEDNN_DEFAULT_FPMATH_MODE=BF16",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1",
    ]


@found_here
@pytest.mark.slow
def test_ranks_on_different_processors_train_one_model(words, tmp_path):
    output_dir, port = tmp_path / "run", free_port()
    # What the other one encodes has other bits, and is not for the runs of other tests.
    words += [f"work_dir={tmp_path / 'work'}", f"output_dir={output_dir}"]
    words += ["adapter_type=bora-xs", "number_of_steps=3", "save_every=1"]
    here, there = places_of_ranks(2, port)
    # Torch reads which instructions to use when it is imported.
    other = subprocess.Popen(command(*words), env=ENVIRONMENT | there | OTHER, stderr=subprocess.PIPE, text=True)
    with ForkedTrainer(words, tmp_path / "said", **here) as one:
        said = other.communicate(timeout=120)[1]
        # At every save the ranks' adapters are compared to the last bit.
        assert [one.wait(60), other.returncode] == [0, 0], one.said() + said
        assert "round AdamW steps differently" in one.said()
    assert len(rows(output_dir)) == 3


def begin_apart(group):
    """How rank 1 fares when what it begins with is one bit from rank 0's, by what that is."""
    base = load_base(golden("tiny-sa3"), encoder=False)
    sa3dist.attach_adapter(base, adapter_type="lora-xs", rank=3)
    changed = {
        "adapters": next(iter(adapter_parameters(base).values())).data,
        "frequency": base.dit.transformer.rotary_pos_emb.inv_freq,
        "bases": list(adapted_layers(base).values())[-1].adapter.right_IR,
        "nothing": torch.zeros(1),
    }
    said = {}
    for what, tensor in changed.items():
        kept = tensor.clone()
        if group.dist_rank == 1:
            tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(9.0))
        try:
            rank_checks.check_same_start(group, 0, base, adapter_parameters(base))
        except EnvironmentFailure as failure:
            said[what] = str(failure)
        tensor.copy_(kept)
    return said


def test_ranks_that_begin_one_bit_apart_are_refused_on_all_of_them_by_name():
    here, there = run_ranks(2, begin_apart)
    assert here == there
    assert list(here) == ["adapters", "frequency", "bases"]
    assert here["frequency"].startswith("step 0: the frequency tables of rank 1 on host-1 are not those of rank 0 on")
    assert "singular bases of rank 1" in here["bases"]


def test_kept_bases_of_another_method_are_not_taken(tmp_path, monkeypatch):
    cache = svd_bases.BasesCache(tmp_path, "a base", torch.device("cpu"))
    weight = torch.randn(12, 9)
    left, _ = cache("layer", weight, 3)
    old = cache.path("layer", 3)
    monkeypatch.setattr(svd_bases, "METHOD", "another")
    assert cache.path("layer", 3) != old
    assert torch.equal(cache("layer", weight, 3)[0], left)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("held", [None, "float32"])
def test_a_run_with_other_bases_is_not_continued_but_may_be_started_from(words, tmp_path, capfd, held):
    output_dir = tmp_path / "run"
    more = ["adapter_type=lora-xs", "include=[to_qkv]", "duration=1"]
    assert run(words, output_dir, *more, "number_of_steps=1") == 0
    saved = checkpoint.load(checkpoint.path_of(output_dir, 1))
    assert saved.state["identity"].pop("singular_bases") == svd_bases.METHOD
    if held:
        saved.state["identity"]["singular_bases"] = held
    checkpoint.save(output_dir, saved, keep=1)
    before = sorted(path for path in output_dir.rglob("*") if path.name != "status.json")
    capfd.readouterr()
    assert run(words, output_dir, *more, "number_of_steps=2") == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"singular_bases {held or 'found as earlier versions did'!r}, this run has 'float64'; use another" in said
    assert status(output_dir)["exit_code"] == 2
    assert sorted(path for path in output_dir.rglob("*") if path.name != "status.json") == before
    start = f"lora_checkpoint_url={output_dir / 'lora.safetensors'}"
    assert train.main([*words, *more, "number_of_steps=1", start, f"output_dir={tmp_path / 'new'}"]) == 0


def test_a_checkpoint_without_singular_bases_says_nothing_of_them(words, tmp_path):
    assert run(words, tmp_path / "run", "adapter_type=lora", "number_of_steps=1", "duration=1") == 0
    state = json.loads((checkpoint.path_of(tmp_path / "run", 1) / "state.json").read_text())
    assert "singular_bases" not in state["identity"]
