"""The planner: memory equal to what is really held, time that follows counts and measurements, proposals that fit."""

import dataclasses
import functools
import json

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES

from sa3dist import cli, config
from sa3dist.adapters import adapter_parameters, attach_adapter, candidate_layers
from sa3dist.commands import plan, plan_calibration
from sa3dist.commands.plan_calibration import read_results
from sa3dist.commands.plan_predict import Job, fit, predict
from sa3dist.cost_model.devices import GPUS, Device, datasheet_of, find_device
from sa3dist.cost_model.flops import Adapter, MicroBatch, count
from sa3dist.errors import ConfigError
from sa3dist.model.base import Base
from sa3dist.model.loading import known_config, meta_roots
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.random_weights import RandomWeights
from sa3dist.model.released import released_config
from sa3dist.model.tiny import tiny_config
from sa3dist.training import memory

H200 = GPUS["H200"]


@functools.cache
def plain_job(model: str) -> Job:
    made = config.build({"audio_data_url": "x.zip", "model": model, "duration": 30})
    return Job.of(made, known_config(model))


def job(model="small-music-base", **settings) -> Job:
    return plain_job(model).changed(**settings)


def timed_row(device="NVIDIA H200", factor=3.0, frames=323, kind="dora-rows") -> dict:
    """A benchmark row whose time is ``factor`` over the H200's roofline."""
    shape = parse_model_config(released_config("small-music-base"), "small")
    adapter = Adapter(ADAPTER_TYPES[kind], 16, frozenset(candidate_layers(meta_roots(shape))))
    counted = count(shape, MicroBatch((frames,), 257, 257), adapter, 2, 2)
    seconds = sum(counted.total().seconds(H200.bf16_flops, H200.bytes_per_second))
    row = {"device": device, "device_memory_bytes": 141 << 30, "shape": "small-music-base", "depth": 20, "batch": 1}
    row |= {"frames": frames, "adapter_type": kind, "rank": 16, "precision": "bf16", "ours_ms": 1e3 * factor * seconds}
    return {**row, "emulated_products": False}


def results(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "step.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_results(folder, here=None)


def test_predicted_memory_is_what_base_and_adapter_really_hold(monkeypatch):
    shape = parse_model_config(tiny_config("medium", depth=2), "tiny")
    base = Base(shape, RandomWeights(shape, 1), "cpu", torch.float32, text_source=None, encoder=False)
    attach_adapter(base, adapter_type="bora", rank=3, include=["layers."])
    settings = config.build(
        {"audio_data_url": "x", "adapter_type": "bora", "rank": 3, "include": ["layers."], "base_precision": "fp32"}
    )
    found = predict(Job.of(settings, shape), H200, []).bytes
    trained = {id(parameter) for parameter in adapter_parameters(base).values()}
    frozen = [p for root in base.adapter_roots for p in root.parameters() if id(p) not in trained]
    frozen.append(base.dit.transformer.rotary_pos_emb.inv_freq)
    constants = [value for root in base.adapter_roots for name, value in root.named_buffers() if "squares" in name]
    assert found["base"] == 4 * sum(value.numel() for value in frozen)
    values = sum(value.numel() for value in adapter_parameters(base).values())
    # Value, gradient and two moments, and the norms of the frozen weights.
    assert found["adapter and optimiser"] == 16 * values + 4 * sum(value.numel() for value in constants)


def test_time_follows_the_device_the_length_and_the_ranks():
    short, long = (predict(job(duration=seconds), H200, []) for seconds in (10, 60))
    assert 3 < long.flops / short.flops < 6
    half = dataclasses.replace(H200, bf16_flops=H200.bf16_flops / 2, bytes_per_second=H200.bytes_per_second / 2)
    slow = predict(job(duration=60), half, [])
    for part in ("compute", "memory bandwidth"):
        assert slow.seconds[part] == pytest.approx(2 * long.seconds[part])
    accumulated = predict(job(duration=60, gradient_accumulation_steps=3), H200, [])
    assert accumulated.seconds["compute"] == pytest.approx(3 * long.seconds["compute"])
    four = dataclasses.replace(job(), ranks=4, link_bytes_per_second=25e9 / 8)
    # The trained numbers of the small model's adapter, in float32, over the link twice but for a rank's own share.
    assert predict(four, H200, []).seconds["network"] == pytest.approx(2 * 3 / 4 * 4 * 10.71e6 / (25e9 / 8), rel=1e-3)


def test_passes_are_planned_as_graphs_where_a_run_records_them_and_their_values_fit_twice():
    small = predict(job(duration=30), H200, [])
    launched = predict(job(duration=30, cuda_graphs="off"), H200, [])
    assert small.seconds["host"] == 0 < launched.seconds["host"]
    again = small.bytes["kept for the backward pass"] + small.bytes["working"]
    assert small.peak_bytes == pytest.approx(launched.peak_bytes + again)
    tight = dataclasses.replace(H200, memory_bytes=(launched.peak_bytes + again / 2) / memory.USABLE_SHARE)
    assert predict(job(duration=30), tight, []).bytes == launched.bytes


def test_a_gpu_without_bfloat16_units_is_planned_without_the_kernels_that_need_them():
    assert [name for name, device in GPUS.items() if not device.runs_kernels] == ["T4"]
    turing = GPUS["T4"]
    with_kernels = dataclasses.replace(turing, bf16_flops=8 * turing.bf16_flops)
    plain, fused = (predict(job(gradient_checkpointing="off"), device, []) for device in (turing, with_kernels))
    assert plain.bytes["kept for the backward pass"] > fused.bytes["kept for the backward pass"]


def test_recomputing_costs_time_and_saves_memory():
    kept, again = (predict(job(gradient_checkpointing=choice), H200, []) for choice in ("off", "on"))
    assert (kept.recomputed_blocks, again.recomputed_blocks) == (0, 20)
    assert again.step_seconds > 1.2 * kept.step_seconds
    assert again.peak_bytes < kept.peak_bytes


def test_measured_steps_calibrate_their_device_and_are_carried_over_to_others(tmp_path):
    without = predict(job(), H200, [])
    assert "datasheet only" in without.factor.evidence
    measured = results(tmp_path / "own", timed_row(factor=3.0))
    own, other = (predict(job(), device, measured) for device in (H200, GPUS["A100-80"]))
    assert own.factor.value == pytest.approx(3)
    assert own.seconds["compute"] == pytest.approx(3 / plan_calibration.ASSUMED_FACTOR * without.seconds["compute"])
    assert own.factor.evidence == "calibrated by 1 step timed on H200 (step.jsonl)"
    assert "carried over from another device" in other.factor.evidence
    # The nearest measurement counts most, and how far they are apart is told.
    near = results(tmp_path / "two", timed_row(factor=2.0, frames=323), timed_row(factor=4.0, frames=4091))
    factor = predict(job(), H200, near).factor
    assert 2 < factor.value < 2.2
    assert factor.spread == (pytest.approx(2 / factor.value), pytest.approx(4 / factor.value))


def test_results_of_other_kinds_are_left_out(tmp_path):
    emulated = {**timed_row(), "emulated_products": True}
    of_a_cpu = {**timed_row(device="x86_64"), "device_memory_bytes": None, "cpu_capability": "AVX2"}
    of_a_layer = {"ours_ms": {"median": 2.0}, "fan_in": 8}
    assert results(tmp_path, emulated, of_a_cpu, of_a_layer, {"samples_per_second": 3}) == []
    here = Device("this CPU", 1e10, 1e11, 1e11, 1e10, "measured here", on_gpu=False)
    (only,) = read_results(tmp_path, here)
    assert only.device == "a CPU (AVX2)"
    assert predict(job(), here, [only]).factor.value == pytest.approx(only.factor)


def test_a_measured_gpu_is_calibrated_against_its_own_measured_ceilings(tmp_path):
    here = dataclasses.replace(H200, name="NVIDIA H200", bf16_flops=H200.bf16_flops / 2, source="measured here")
    results(tmp_path, timed_row(factor=3.0))
    (only,) = read_results(tmp_path, here)
    planned = predict(job(batch_size=1), here, [only])
    assert planned.factor.evidence == "calibrated by 1 step timed on NVIDIA H200 (step.jsonl)"
    # Whatever the ceilings are, the step that was timed is predicted to take the time it took.
    expected = timed_row(factor=3.0)["ours_ms"] / 1e3
    assert planned.step_seconds == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "gigabytes"),
    [({"batch_size": 4, "duration": 120}, 3.0), ({"gradient_checkpointing": "off", "duration": 120}, 3.0)],
)
def test_a_proposal_fits_and_keeps_the_clips_per_step(settings, gigabytes):
    asked = job(**settings)
    device = Device("small", gigabytes * 1e9, 1e14, 1e13, 1e12, "made up")
    assert not predict(job(**{**settings, "gradient_checkpointing": "off"}), device, []).fits
    changes, prediction = fit(asked, device, [])
    assert prediction.fits
    assert prediction.peak_bytes <= device.memory_bytes
    changed = asked.settings.model_copy(update=changes)
    assert "duration" not in changes
    assert changed.batch_size * changed.accumulation(1) == asked.settings.batch_size
    assert fit(asked, Device("tiny", 1e9, 1e14, 1e13, 1e12, "made up"), []) is None


def test_shorter_crops_are_the_last_resort():
    asked = job(model="medium-base", duration=None, base_precision="fp32", mixed_precision="no")
    changes, prediction = fit(asked, Device("small", 5.2e9, 1e14, 1e13, 1e12, "made up"), [])
    assert changes["base_precision"] == "bf16"
    assert 1 <= changes["duration"] < 380
    assert prediction.recomputed_blocks == 24


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_devices_are_found_as_drivers_and_people_name_them(name, found):
    assert datasheet_of(name) is GPUS[found]
    assert find_device(found.lower()) is GPUS[found]
    assert datasheet_of("x86_64") is None
    assert find_device("4090") is GPUS["RTX-4090"]


def test_amounts_of_memory_are_read_as_written():
    assert [plan.parse_bytes(text) for text in ("24GB", "24", "1.5gib")] == [24e9, 24e9, 1.5 * 2**30]
    with pytest.raises(ConfigError, match="is no amount of memory"):
        plan.parse_bytes("lots")


def test_the_command_says_what_its_figures_rest_on(tmp_path, capsys):
    words = ["plan", "model=small-music-base", "batch_size=4", "duration=120", "--gpu", "H200", "--fit", "2.5GB"]
    assert cli.main([*words, "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "datasheet only" in printed
    assert "https://www.nvidia.com" in printed
    assert "change    batch_size=" in printed
    assert cli.main([*words, "--results", str(tmp_path), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["fits"]
    assert described["peak_bytes"] == pytest.approx(sum(described["bytes"].values()))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpu", "H2000"], "is not in the table"),
        (["rnak=4", "--gpu", "H200"], "did you mean rank?"),
        (["--fit", "1GB", "--gpu", "H200"], "nothing fits 1 GB"),
        (["include=[nothing]", "--gpu", "H200"], "matches none of"),
        (["--ranks", "0", "--gpu", "H200"], "expected positive numbers"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(capsys, words, expected):
    assert cli.main(["plan", *words]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.strip().splitlines()) == 1
