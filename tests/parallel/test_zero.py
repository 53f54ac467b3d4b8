"""DeepSpeed ZeRO as the program runs it: two ranks against one process, and one checkpoint passed on between modes."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa3dist import export, train
from sa3dist.adapters import AdapterConfig
from sa3dist.adapters.header import HEADER_KEYS
from sa3dist.errors import EnvironmentFailure
from sa3dist.runtime.deepspeed_launch import FILE_VARIABLE, USE_VARIABLE
from sa3dist.runtime.signals import SIGNALS
from tests.helpers.forked_trainers import forked_ranks
from tests.helpers.golden import ROOT
from tests.helpers.program import ENVIRONMENT
from tests.helpers.zero_ranks import import_deepspeed

CLIPS_PER_STEP = 4


@pytest.fixture(scope="module")
def loud_base(demo_base, tmp_path_factory):
    """The demo's base with a last layer that makes every gradient large: DeepSpeed clips unless it is told not to."""
    loud = shutil.copytree(demo_base, tmp_path_factory.mktemp("loud") / "base")
    tensors = load_file(loud / "model.safetensors")
    (last,) = [name for name in tensors if name.endswith("transformer.project_out.weight")]
    save_file(tensors | {last: 40 * tensors[last]}, loud / "model.safetensors")
    return loud


@pytest.fixture(scope="module")
def common(loud_base, demo_clips, demo_work):
    # rank 3: tensors whose size no number of ranks divides; bora: every kind of tensor.
    return [
        f"audio_data_url={demo_clips}",
        f"model={loud_base}",
        f"work_dir={demo_work}",
        "adapter_type=bora",
        "rank=3",
        "learning_rate=1e-3",
        "base_precision=fp32",
        "mixed_precision=no",
        "duration=2",
        "log_every=1",
        "num_workers=0",
        "report=false",
        "gradient_checkpointing=off",
    ]


def alone(common, output_dir, steps):
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    words = [f"gradient_accumulation_steps={CLIPS_PER_STEP}", f"number_of_steps={steps}", f"output_dir={output_dir}"]
    assert train.main([*common, *words, "keep_checkpoints=9", "save_every=2"]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def straight(common, tmp_path_factory):
    """Five steps of one process, each of four accumulated micro batches."""
    output_dir = tmp_path_factory.mktemp("straight") / "run"
    alone(common, output_dir, 5)
    return output_dir


def words_of_two(output_dir, steps):
    accumulation = CLIPS_PER_STEP // 2
    return [f"number_of_steps={steps}", f"output_dir={output_dir}", f"gradient_accumulation_steps={accumulation}"]


def launch_two(launcher, words, cwd):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, *launcher, "-m", "sa3dist.train", *words],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr


def rows(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_course(found, expected, step):
    """Losses and gradient norms of every step, and the whole state after ``step``, within 1e-5."""
    for one, other in zip(rows(found)[:step], rows(expected)[:step], strict=True):
        for key in ("loss", "loss_gen", "loss_ctx", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-5), (one["step"], key)
    for name in ("adapter", "moments"):
        states = [load_file(path / f"checkpoints/step-{step:08d}/{name}.safetensors") for path in (found, expected)]
        assert states[0].keys() == states[1].keys()
        assert all(value.numel() and value.dtype == torch.float32 for value in states[0].values())
        difference, size = (
            torch.stack([part.double().square().sum() for part in parts]).sum().sqrt()
            for parts in ([states[0][key] - value for key, value in states[1].items()], states[1].values())
        )
        assert difference <= 1e-5 * size, name
    if step == len(rows(found)):
        adapters = load_file(found / f"checkpoints/step-{step:08d}/adapter.safetensors")
        published = load_file(found / "lora.safetensors")
        assert published.keys() == adapters.keys()
        assert all(torch.equal(published[key], value.half()) for key, value in adapters.items())


@pytest.mark.slow
def test_one_course_through_zero_2_then_zero_3_then_one_process(common, straight, tmp_path):
    import_deepspeed()
    run = tmp_path / "run"
    # The shipped files, from a directory that does not hold them.
    zero2 = ["--config_file", str(ROOT / "configs/accelerate/zero2.yaml")]
    launch_two(zero2, [*common, *words_of_two(run, steps=2)], cwd=tmp_path)
    assert_same_course(run, straight, 2)
    assert min(row["grad_norm"] for row in rows(straight)) > 100

    # Everything divided, nothing kept whole; and a file that asks for 16 bits.
    divided = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100000}
    (tmp_path / "divided.json").write_text(json.dumps({"zero_optimization": divided, "bf16": {"enabled": True}}))
    asked = {USE_VARIABLE: "true", FILE_VARIABLE: str(tmp_path / "divided.json")}
    words = [*common, *words_of_two(run, steps=4)]
    with forked_ranks(words, words, log=tmp_path / "said", **asked) as ranks:
        assert [rank.wait(500) for rank in ranks] == [0, 0], ranks[0].said()
        assert "bf16.enabled is turned off" in ranks[0].said()
    assert rows(run)[2]["resumed_from"] == 2
    assert_same_course(run, straight, 4)

    alone(common, run, 5)
    assert rows(run)[4]["resumed_from"] == 4
    assert_same_course(run, straight, 5)


@pytest.mark.parametrize("damage", ["empty", "nan", "infinite"])
def test_a_tensor_that_was_not_gathered_or_is_not_finite_is_never_published(tmp_path, damage):
    tensors = {f"model.a.parametrizations.weight.0.{name}": torch.ones(4, 4) for name in ("lora_A", "lora_B")}
    config = AdapterConfig(rank=4, alpha=4, adapter_type="lora")
    description = {**dict.fromkeys(HEADER_KEYS, "x"), "step": 1, "settings": {"name": "a run"}}
    description["lora_config"] = {"rank": 4, "alpha": 4, "adapter_type": "lora"}
    export.publish(config, tensors, tmp_path, description)
    before = (tmp_path / "lora.safetensors").read_bytes()
    values = {"empty": torch.empty(0), "nan": torch.full((4, 4), torch.nan), "infinite": torch.full((4, 4), torch.inf)}
    damaged = {**tensors, "model.a.parametrizations.weight.0.lora_B": values[damage]}
    with pytest.raises(EnvironmentFailure, match="lora_B"):
        export.publish(config, damaged, tmp_path, description)
    assert (tmp_path / "lora.safetensors").read_bytes() == before


def test_a_run_whose_engine_gathers_nothing_ends_before_it_saves(common, tmp_path, monkeypatch, capfd):
    from sa3dist.parallel.ddp import FlatEngine

    whole = FlatEngine.adapters
    monkeypatch.setattr(
        FlatEngine, "adapters", lambda self: {**whole(self), next(iter(self.parameters)): torch.empty(0)}
    )
    assert train.main([*common, "number_of_steps=1", f"output_dir={tmp_path / 'run'}"]) == 70
    assert "lora_A is empty or not finite" in capfd.readouterr().err
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert not (tmp_path / "run/lora.safetensors").exists()
