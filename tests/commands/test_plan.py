"""The planner: memory equal to what is really held, time that follows counts and measurements, proposals that fit."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES

from sa3dist import cli, config
from sa3dist.adapters import adapter_parameters, attach_adapter, candidate_layers
from sa3dist.commands import plan, plan_calibration
from sa3dist.commands.plan_calibration import RESULTS
from sa3dist.commands.plan_predict import Job, fit, plan_memory, predict
from sa3dist.cost_model.devices import GPUS, Device, datasheet_of, find_device
from sa3dist.cost_model.fake_network import AdapterShape, BatchShape, FakeNetwork, Numerics
from sa3dist.errors import ConfigError
from sa3dist.model.base import Base
from sa3dist.model.loading import known_config, meta_roots
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.random_weights import RandomWeights
from sa3dist.model.released import released_config
from sa3dist.model.tiny import tiny_config
from sa3dist.training import memory

H200 = GPUS["H200"]
NO_RESULTS = Path("no such folder")


@functools.cache
def plain_job(model: str) -> Job:
    made = config.build({"audio_data_url": "x.zip", "model": model, "duration": 30})
    return Job.of(made, known_config(model))


def job(model="small-music-base", **settings) -> Job:
    return plain_job(model).changed(**settings)


@pytest.fixture(scope="module", autouse=True)
def _counted_once():
    """Of one network and batch a count is the same for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeNetwork, "count", functools.cache(FakeNetwork.count))
        found, whole = {}, plan_calibration._roofline

        def roofline(row, device):
            known = row["shape"], row["batch"], row["frames"], row["adapter_type"], device
            if known not in found:
                found[known] = whole(row, device)
            return found[known]

        patch.setattr(plan_calibration, "_roofline", roofline)
        yield


@functools.cache
def roofline_seconds(frames: int, kind: str) -> float:
    shape = parse_model_config(released_config("small-music-base"), "small")
    adapter = AdapterShape(ADAPTER_TYPES[kind], 16, frozenset(candidate_layers(meta_roots(shape))), formed=True)
    counted = FakeNetwork(shape, adapter, Numerics(torch.bfloat16, autocast=True)).count(BatchShape(1, frames))
    work = counted.total().seconds(H200.bf16_flops, H200.bytes_per_second)
    # W0 read and W' written, once more over both for each norm: before they are written, and in FINISH.
    passes = {"dora-rows": 4, "bora": 6}[kind]
    weights = 2 * sum(layer.weight.numel() for layer in candidate_layers(meta_roots(shape)).values())
    return sum(work) + passes * weights / H200.bytes_per_second


def timed_row(device="NVIDIA H200", factor=3.0, frames=323, kind="dora-rows") -> dict:
    """A benchmark row whose time is ``factor`` over the H200's roofline."""
    seconds = roofline_seconds(frames, kind)
    row = {"device": device, "device_memory_bytes": 141 << 30, "shape": "small-music-base", "depth": 20, "batch": 1}
    return row | {
        "frames": frames,
        "adapter_type": kind,
        "rank": 16,
        "precision": "bf16",
        "ours_ms": 1e3 * factor * seconds,
    }


def results(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "step.json").write_text(json.dumps({"environment": {}, "rows": rows}))
    return folder


def test_predicted_memory_is_what_base_and_adapter_really_hold(monkeypatch):
    shape = parse_model_config(tiny_config("medium", depth=2), "tiny")
    base = Base(shape, RandomWeights(shape, 1), "cpu", torch.float32, text_source=None, encoder=False)
    attach_adapter(base, adapter_type="bora", rank=3, include=["layers."])
    settings = config.build(
        {"audio_data_url": "x", "adapter_type": "bora", "rank": 3, "include": ["layers."], "base_precision": "fp32"}
    )
    found = plan_memory(Job.of(settings, shape), H200).bytes
    trained = {id(parameter) for parameter in adapter_parameters(base).values()}
    frozen = [p for root in base.adapter_roots for p in root.parameters() if id(p) not in trained]
    frozen.append(base.dit.transformer.rotary_pos_emb.inv_freq)
    constants = [value for root in base.adapter_roots for name, value in root.named_buffers() if "squares" in name]
    assert found["base"] == 4 * sum(value.numel() for value in frozen)
    values = sum(value.numel() for value in adapter_parameters(base).values())
    # Value, gradient and two moments, and the norms of the frozen weights.
    assert found["adapter and optimiser"] == 16 * values + 4 * sum(value.numel() for value in constants)


def test_time_follows_the_device_the_length_and_the_ranks():
    short, long = (predict(job(duration=seconds), H200, NO_RESULTS) for seconds in (10, 60))
    assert 3 < long.flops / short.flops < 6
    half = dataclasses.replace(H200, bf16_flops=H200.bf16_flops / 2, bytes_per_second=H200.bytes_per_second / 2)
    slow = predict(job(duration=60), half, NO_RESULTS)
    for part in ("compute", "memory bandwidth"):
        assert slow.seconds[part] == pytest.approx(2 * long.seconds[part])
    accumulated = predict(job(duration=60, gradient_accumulation_steps=3), H200, NO_RESULTS)
    assert accumulated.seconds["compute"] == pytest.approx(3 * long.seconds["compute"])
    four = dataclasses.replace(job(), ranks=4, link_bytes_per_second=25e9 / 8)
    # The trained numbers of the small model's adapter, in float32, over the link twice but for a rank's own share.
    assert predict(four, H200, NO_RESULTS).seconds["network"] == pytest.approx(
        2 * 3 / 4 * 4 * 10.71e6 / (25e9 / 8), rel=1e-3
    )


def test_graphs_are_planned_where_a_run_records_them_and_their_values_fit_twice_and_are_no_part_of_the_peak():
    small, launched = (predict(job(cuda_graphs=choice), H200, NO_RESULTS) for choice in ("auto", "off"))
    assert small.seconds["host"] == 0 < launched.seconds["host"]
    again = small.memory.bytes["kept for the backward pass"] + small.memory.bytes["working"]
    assert (small.memory.recorded_bytes, launched.memory.recorded_bytes) == (again, 0)
    assert small.memory.peak_bytes == launched.memory.peak_bytes
    tight = dataclasses.replace(H200, memory_bytes=(launched.memory.peak_bytes + again / 2) / memory.USABLE_SHARE)
    assert plan_memory(job(), tight) == launched.memory


def test_a_gpu_without_bfloat16_units_is_planned_without_the_kernels_that_need_them():
    assert [name for name, device in GPUS.items() if not device.runs_kernels] == ["T4"]
    turing = GPUS["T4"]
    with_kernels = dataclasses.replace(turing, bf16_flops=8 * turing.bf16_flops)
    plain, formed = (plan_memory(job(gradient_checkpointing="off"), device).bytes for device in (turing, with_kernels))
    assert plain["formed weights"] == 0 < formed["formed weights"]
    assert plain["kept for the backward pass"] > formed["kept for the backward pass"]
    assert plan_memory(job(adapter_products="factored"), H200).bytes["formed weights"] == 0


def test_weights_formed_per_use_take_the_memory_of_a_block_and_time_for_every_pass():
    changes = {"model": "medium-base", "batch_size": 1, "adapter_type": "dora-rows", "gradient_checkpointing": "on"}
    kept, again = (predict(job(**changes, adapter_products=way), H200, NO_RESULTS) for way in ("formed", "per_use"))
    assert (kept.memory.per_use, again.memory.per_use) == (False, True)
    saved = {name: value - again.memory.bytes[name] for name, value in kept.memory.bytes.items()}
    shared = saved.pop("formed weights")
    assert set(saved.values()) == {0}
    # Of 24 equal blocks 23, in bfloat16, with R rows and columns for L' and R'.
    block = {name: fans for name, fans in plain_job("medium-base").fans.items() if "transformer.layers.7." in name}
    assert shared == 23 * 2 * sum(fan_out * fan_in + 16 * (fan_out + fan_in) for fan_out, fan_in in block.values())
    assert again.memory.peak_bytes < 4.5e9
    assert again.step_seconds > kept.step_seconds
    # What a card must have to keep them, and to form them per use.
    for device_bytes, expected in ((1.01 * kept.memory.peak_bytes, False), (0.99 * kept.memory.peak_bytes, True)):
        device = dataclasses.replace(H200, memory_bytes=device_bytes / memory.USABLE_SHARE)
        found = plan_memory(job(**changes), device)
        assert (found.per_use, found.fits, found.recomputed_blocks) == (expected, True, 24)
        assert not plan_memory(job(**changes | {"gradient_checkpointing": "off"}), device).per_use
        proposed = {"adapter_products": "per_use"} if expected else {}
        assert fit(job(**changes, adapter_products="formed"), device) == proposed


def test_recomputing_costs_time_and_saves_memory():
    kept, again = (predict(job(gradient_checkpointing=choice), H200, NO_RESULTS) for choice in ("off", "on"))
    assert (kept.memory.recomputed_blocks, again.memory.recomputed_blocks) == (0, 20)
    assert again.step_seconds > 1.15 * kept.step_seconds
    assert again.memory.peak_bytes < kept.memory.peak_bytes


def test_a_step_timed_on_a_gpu_says_how_fast_it_is_and_nothing_of_other_gpus(tmp_path):
    without = predict(job(), H200, NO_RESULTS)
    assert "datasheet only: a factor of 2.5 over the roofline is assumed" in without.factor.evidence
    folder = results(tmp_path, timed_row(factor=2.0, frames=323), timed_row(factor=4.0, frames=4091))
    own, long, other = (
        predict(job(duration=seconds, batch_size=1), device, folder)
        for seconds, device in ((30, H200), (380, H200), (30, GPUS["A100-80"]))
    )
    assert own.factor.value == pytest.approx(2)
    assert own.factor.evidence.startswith("a step timed on this GPU (step.json: small-music-base, 1 x 323 frames,")
    assert long.factor.value == pytest.approx(4)
    assert other.factor.evidence == without.factor.evidence
    # The step that was timed is predicted to take the time it took.
    assert own.step_seconds == pytest.approx(timed_row(factor=2.0)["ours_ms"] / 1e3, rel=0.02)


def test_of_equally_long_steps_the_one_of_the_same_adapter_type_counts(tmp_path):
    folder = results(tmp_path, timed_row(factor=2.0), timed_row(factor=5.0, kind="bora"))
    assert predict(job(adapter_type="bora", batch_size=1), H200, folder).factor.value == pytest.approx(5)


def test_results_of_other_kinds_are_left_out(tmp_path):
    of_a_cpu = {**timed_row(device="x86_64"), "device_memory_bytes": None, "cpu_capability": "AVX2"}
    results(tmp_path, of_a_cpu, {"ours_ms": {"median": 2.0}, "fan_in": 8}, {"samples_per_second": 3})
    (tmp_path / "other.json").write_text("[1, 2]")
    here = Device("this CPU", 1e10, 1e11, 1e11, 1e10, "measured here", on_gpu=False)
    for device, factor in ((H200, 2.5), (here, 1.3)):
        assert predict(job(), device, tmp_path).factor.value == factor
    (tmp_path / "torn.json").write_text('{"rows"')
    with pytest.raises(ConfigError, match="torn.json is not valid JSON"):
        predict(job(), H200, tmp_path)


def test_a_measured_gpu_is_held_against_its_own_measured_ceilings(tmp_path):
    here = dataclasses.replace(H200, name="NVIDIA H200", bf16_flops=H200.bf16_flops / 2, source="measured here")
    planned = predict(job(batch_size=1), here, results(tmp_path, timed_row(factor=3.0)))
    assert planned.factor.measured
    # Whatever the ceilings are, the step that was timed is predicted to take the time it took.
    assert planned.step_seconds == pytest.approx(timed_row(factor=3.0)["ours_ms"] / 1e3, rel=0.02)


def of_an_h100(row) -> Job:
    """The run whose step that row of gpu_step.json timed."""
    lengths = {"duration": row["frames"] * 4096 / 44100, "batch_size": 1}
    return job(model="medium-base", adapter_type=row["adapter_type"], **lengths)


def measured_steps(adapter_type):
    rows = json.loads((RESULTS / "gpu_step.json").read_text())["rows"]
    found = [row for row in rows if row["adapter_type"] == adapter_type]
    assert {row["frames"] for row in found} == {323, 4091}
    return found


def test_the_committed_measurements_say_how_fast_an_h100_is():
    for row in measured_steps("dora-rows"):
        planned = predict(of_an_h100(row), GPUS["H100"], RESULTS)
        assert "gpu_step.json" in planned.factor.evidence
        assert 1e3 * planned.step_seconds == pytest.approx(row["ours_ms"], rel=0.001)


# Of the eight measured: one that is formed with fewer passes than its neighbour, one with more, one of the -xs types.
@pytest.mark.parametrize("adapter_type", ["dora-cols-xs", "bora", "lora-xs"])
def test_steps_that_were_left_out_of_the_measurements_are_predicted(tmp_path, adapter_type):
    content = json.loads((RESULTS / "gpu_step.json").read_text())
    content["rows"] = [row for row in content["rows"] if row["adapter_type"] != adapter_type]
    (tmp_path / "gpu_step.json").write_text(json.dumps(content))
    for row in measured_steps(adapter_type):
        planned = predict(of_an_h100(row), GPUS["H100"], tmp_path)
        assert 1e3 * planned.step_seconds == pytest.approx(row["ours_ms"], rel=0.06)


def test_a_step_of_a_run_between_the_timed_lengths_is_predicted():
    rows = json.loads((RESULTS / "gpu_run.json").read_text())["rows"]
    (trained,) = [row for row in rows if row["what"] == "train"]
    # Its clips are up to 12 s long, its shapes filled up.
    planned = predict(job(model="medium-base", duration=12, batch_size=1), GPUS["H100"], RESULTS)
    assert planned.step_seconds == pytest.approx(trained["step_seconds"]["median"], rel=0.15)


@pytest.mark.parametrize(
    ("settings", "gigabytes"),
    [({"batch_size": 4, "duration": 120}, 4.0), ({"gradient_checkpointing": "off", "duration": 120}, 4.0)],
)
def test_a_proposal_fits_and_keeps_the_clips_per_step(settings, gigabytes):
    asked = job(**settings)
    device = Device("small", gigabytes * 1e9, 1e14, 1e13, 1e12, "made up")
    assert not plan_memory(job(**{**settings, "gradient_checkpointing": "off"}), device).fits
    changes = fit(asked, device)
    planned = plan_memory(asked.changed(**changes), device)
    assert planned.fits
    assert planned.peak_bytes <= device.memory_bytes
    changed = asked.settings.model_copy(update=changes)
    assert "duration" not in changes
    assert changed.batch_size * changed.accumulation(1) == asked.settings.batch_size
    assert fit(asked, Device("tiny", 1e9, 1e14, 1e13, 1e12, "made up")) is None


def test_shorter_crops_are_the_last_resort():
    asked = job(model="medium-base", duration=None, base_precision="fp32", mixed_precision="no")
    device = Device("small", 6e9, 1e14, 1e13, 1e12, "made up")
    changes = fit(asked, device)
    assert changes["base_precision"] == "bf16"
    assert 1 <= changes["duration"] < 380
    assert plan_memory(asked.changed(**changes), device).recomputed_blocks == 24


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
    words = ["plan", "model=small-music-base", "batch_size=4", "duration=120", "--gpu", "H200", "--fit", "3GB"]
    assert cli.main([*words, "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "datasheet only" in printed
    assert "https://www.nvidia.com" in printed
    assert "change    batch_size=" in printed
    assert cli.main([*words, "--results", str(tmp_path), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["fits"]
    assert described["peak_bytes"] == pytest.approx(sum(described["bytes"].values()))


def test_a_plan_for_several_processes_says_that_they_use_ddp_and_what_it_leaves_out(capsys):
    words = ["plan", "model=small-music-base", "duration=30", "--gpu", "H200"]
    assert cli.main(words) == 0
    assert "ZeRO-3" not in capsys.readouterr().out
    assert cli.main([*words, "--ranks", "8"]) == 0
    printed = capsys.readouterr().out
    held = plan_memory(job(batch_size=1, duration=30), H200).bytes
    divided = (held["base"] + held["adapter and optimiser"]) / 1e9
    assert "ranks     8; with DDP each holds all of this; the network is not counted without --link-gbit" in printed
    assert f"ZeRO-3 is not planned: it divides base, adapter and optimiser ({divided:.1f} GB)" in printed
    assert cli.main([*words, "--ranks", "8", "--link-gbit", "25", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["mode"], described["ranks"]) == ("ddp", 8)
    assert described["seconds"]["network"] > 0
    # A card that it does not fit: also with one process.
    assert cli.main([*words, "gradient_checkpointing=off", "duration=380", "batch_size=8", "--gpu", "T4"]) == 0
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed
    assert "ZeRO-3 is not planned" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpu", "H2000"], "is not in the table"),
        (["rnak=4", "--gpu", "H200"], "did you mean rank?"),
        (["--fit", "1GB", "--gpu", "H200"], "nothing fits 1 GB"),
        (["include=[nothing]", "--gpu", "H200"], "matches none of"),
        *((["--ranks", n, "--gpu", "H200"], f"--ranks: '{n}' is not a number from 1") for n in ("0", "9" * 40, "two")),
        *((["--link-gbit", x, "--gpu", "H200"], f"'{x}' is not a number from") for x in ("0", "nan", "inf", "1e-320")),
        (["--fit", "9" * 400, "--gpu", "H200"], "is no amount of memory"),
        (["gradient_accumulation_steps=99999999999999"], "expected a whole number, 1..100000"),
        (["--results", "/no/such", "--gpu", "H200"], "--results: /no/such is no folder"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(capsys, words, expected):
    assert cli.main(["plan", *words]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.strip().splitlines()) == 1
