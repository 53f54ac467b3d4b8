"""What a run's adapters do to the weights, against float64, and what its health is called."""

import itertools
import json
import logging
import math

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES, frozen_constants
from torch import nn

from sa3dist import cli, loop
from sa3dist.adapters.layers import AdaptedLayer, AdapterTensors
from sa3dist.listening import health, health_numbers
from sa3dist.listening.health import Health
from sa3dist.listening.health_numbers import LayerHealth, effective_rank, measure_layer, singular_values, summary
from sa3dist.listening.verdict import RULES, VERDICTS, judge
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training.loss import micro_batch_loss
from sa3dist.training.observers import Observation, Observer
from tests.helpers.golden import ROOT
from tests.helpers.layer_cases import make_layer
from tests.helpers.program import rows, run, short_run
from tests.helpers.recorded_step import shifted
from tests.helpers.same_runs import assert_same_training
from tests.helpers.trainers import make_settings, make_trainer

CPU = Group(0, 1, torch.device("cpu"))


def adapted(kind, size, fan_out=37, fan_in=23, rank=5, scale=1.7):
    """A float32 layer of weights of that size, with random tensors: half of the magnitudes are negative."""
    weight, _, params, frozen, _, _ = make_layer(kind, 1, fan_out, fan_in, rank, dtype=torch.float32)
    layer = nn.Linear(fan_in, fan_out)
    with torch.no_grad():
        # Matrices only: they grow with the weight; a magnitude does so by itself.
        layer.weight.copy_(size * weight)
        trained = {name: size * value.detach() for name, value in params.items() if name != "lora_A"}
        trained |= {name: value.detach() for name, value in params.items() if name == "lora_A"}
    bases = (frozen.left_OR, frozen.right_IR) if kind.xs else ()
    return AdaptedLayer(layer, kind, AdapterTensors(trained, frozen_constants(layer.weight, *bases)), scale)


def oracle(layer):
    """Ratio, effective rank and gains from whole matrices in float64."""
    trained = {name: value.detach().double() for name, value in layer.trained().items()}
    frozen, weight = layer.adapter.frozen, layer.weight.detach().double()
    if layer.kind.xs:
        update = frozen.left_OR.double() @ trained["M_xs"] @ frozen.right_IR.double().T
    else:
        update = trained["lora_B"] @ trained["lora_A"]
    shares = torch.linalg.svdvals(update)[: len(trained.get("M_xs", trained.get("lora_A")))]
    shares = shares / shares.sum()
    v, gains = weight + layer.scale * update, []
    if layer.kind.rows:
        gains.append(trained[layer.kind.row_magnitude] / v.norm(dim=1))
        v = gains[0][:, None] * v
    if layer.kind.cols:
        gains.append(trained[layer.kind.col_magnitude] / v.norm(dim=0))
    ratio = layer.scale * update.norm() / weight.norm()
    return float(ratio), float(torch.exp(-(shares * shares.log()).sum())), torch.cat(gains) if gains else None


@pytest.mark.parametrize("size", [1.0, 3e4])
@pytest.mark.parametrize("name", ADAPTER_TYPES)
def test_ratio_rank_and_drift_are_those_of_whole_matrices_in_float64(name, size, monkeypatch):
    # Blocks that do not divide the rows.
    monkeypatch.setattr(health_numbers, "BLOCK_ELEMENTS", 5 * 23)
    layer = adapted(ADAPTER_TYPES[name], size)
    found, (ratio, rank, gains) = measure_layer(layer), oracle(layer)
    assert found.update_ratio == pytest.approx(ratio, rel=1e-5)
    assert found.effective_rank == pytest.approx(rank, rel=1e-5)
    if gains is None:
        assert found.gains is None
    else:
        assert (gains < 0).any()
        torch.testing.assert_close(torch.from_numpy(found.gains), gains, rtol=1e-4, atol=1e-6)


def test_rows_of_zeros_and_adapters_that_moved_nothing_say_nothing():
    layer = adapted(ADAPTER_TYPES["dora-rows"], 1.0)
    with torch.no_grad():
        layer.weight[3] = 0
        layer.trained()["lora_B"].zero_()
        layer.trained()["magnitude"].copy_(layer.weight.norm(dim=1))
    found = measure_layer(layer)
    assert (found.update_ratio, found.effective_rank) == (0, 0)
    assert found.gains.shape == (36,)
    assert abs(found.gains - 1).max() < 1e-6


def test_effective_rank_counts_directions_of_equal_size():
    left, right = torch.linalg.qr(torch.randn(50, 4, dtype=torch.float64))[0], torch.eye(4, 30, dtype=torch.float64)
    assert effective_rank(singular_values(left, right)) == pytest.approx(4)
    left[:, 1:] = left[:, :1]
    assert effective_rank(singular_values(left, right)) == pytest.approx(1, abs=1e-5)
    assert math.isnan(effective_rank(singular_values(left / 0, right)))


def test_a_row_has_the_layers_that_learn_most_first_and_no_number_that_json_lacks():
    layers = {"quiet": (0.1, [1.0]), "broken": (math.nan, [math.nan]), "loud": (0.2, [0.5, -0.5])}
    named = [(name, LayerHealth(ratio, 2.0, torch.tensor(gains).numpy())) for name, (ratio, gains) in layers.items()]
    row = summary(named)
    assert [layer["name"] for layer in row["layers"]] == ["broken", "loud", "quiet"]
    assert row["update_ratio"] is row["layers"][0]["update_ratio"] is None
    assert judge(json.loads(json.dumps(row, allow_nan=False)), {})[0] == "exploding"
    row = summary([named[0], named[2]])
    assert (row["update_ratio"], row["effective_rank"]) == (0.15, 2.0)
    assert row["drift"] == {"mean": 0.333333, "p5": -0.4, "p95": 0.95, "negative": 0.333333}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.verdict}: {rule.number}")
def test_each_rule_decides_from_its_threshold_on_and_stands_in_the_docs(rule):
    name = {"drift": "mean", "negative": "negative"}.get(rule.number)
    healthy = {"update_ratio": 0.18, "drift": {"mean": 0.984, "negative": 0.0}, "layers": [{"update_ratio": 0.18}]}
    losses = {"training": 1.0, "validation": 1.0, "gain": -0.1}
    assert judge(healthy, losses)[0] == "healthy"

    def verdict(value):
        row, known = json.loads(json.dumps(healthy)), dict(losses)
        if name:
            row["drift"][name] = value
        elif rule.number == "update_ratio":
            row["update_ratio"] = value
        elif rule.number == "change":
            row |= {"update_ratio": value, "drift": {"mean": 1 - value / 2, "negative": 0.0}}
        elif rule.number == "not_finite":
            row["layers"] *= 2
            row["layers"][0] = {"update_ratio": None if value >= 1 else 0.1}
        elif rule.number == "training_over_validation":
            known["training"] = value
        else:
            known["gain"] = 1 - 1 / value
        return judge(row, known)[0]

    beyond, before = (rule.threshold * factor for factor in ((1.001, 0.999) if rule.above else (0.999, 1.001)))
    assert verdict(beyond) == rule.verdict
    # What stands behind it in the list is milder, or nothing.
    assert VERDICTS.index(verdict(before)) > VERDICTS.index(rule.verdict)
    table = [line for line in (ROOT / "docs/listening.md").read_text().splitlines() if f"| {rule.verdict} |" in line]
    assert any(f" {rule.threshold:g} " in line for line in table)


class HeldOut(Observer):
    """Validation on one micro batch that is not trained on, as rows of metrics.jsonl."""

    def __init__(self, trainer, batch):
        self.trainer, self.batch = trainer, batch
        self.first = self.loss()

    @torch.no_grad()
    def loss(self):
        return float(micro_batch_loss(self.trainer.base, self.batch, self.trainer.settings)["loss"])

    def after_step(self, step, stop):
        loss = self.loss()
        return Observation(step, 0.0, row={"val/loss": loss, "val/gain": loss - self.first})


def verdicts(tmp_path, steps, learns_by_heart=False, **settings):
    """Verdicts at the saves of a real training, with another micro batch held out."""
    trainer, batch = make_trainer(CPU, steps, make_settings(output_dir=tmp_path, **settings))
    held_out = HeldOut(trainer, shifted(batch, 77))
    # Ever the same noise can be learned by heart; in a real run it is new in every step, as here.
    batches = itertools.repeat(batch) if learns_by_heart else (shifted(batch, number) for number in itertools.count())
    observers = [held_out, Health(trainer.base, CPU, tmp_path, 0)]
    loop.train(trainer, batches, StopRequest(), tmp_path, None, observers=observers)
    return [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]


def test_a_run_that_learns_its_clips_by_heart_is_called_overfit(tmp_path):
    found = verdicts(tmp_path, 60, learns_by_heart=True, learning_rate=2e-2, save_every=20)
    assert found[-1]["verdict"] == "overfit"
    assert any(reason.startswith("training loss is 0.") for reason in found[-1]["reasons"])


def test_a_healthy_run_is_called_healthy(tmp_path):
    found = verdicts(tmp_path, 20, learning_rate=2e-4, save_every=10)
    assert [(row["step"], row["verdict"], row["reasons"]) for row in found] == [
        (step, "healthy", ["no threshold is reached"]) for step in (10, 20)
    ]


def test_a_run_whose_learning_rate_moves_nothing_has_learned_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        (found,) = verdicts(tmp_path, 2, learning_rate=1e-12)
    assert found["verdict"] == "nothing learned"
    assert found["reasons"][0].startswith("weights have moved by ")
    assert "health at step 2: nothing learned" in caplog.text


@pytest.fixture(scope="module")
def short_words(demo_clips, demo_base, demo_work):
    return [*short_run(demo_clips, demo_base, demo_work), "save_every=2"]


@pytest.fixture(scope="module")
def watched(short_words, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("watched") / "run"
    assert run(short_words, output_dir) == 0
    return output_dir


def test_health_is_written_at_every_save_and_changes_no_bit_of_the_training(short_words, watched, tmp_path):
    found = [json.loads(line) for line in (watched / "health.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [2, 4, 6]
    assert found[-1].keys() == {*("step", "drift", "update_ratio", "effective_rank", "layers", "verdict", "reasons")}
    assert found[0]["update_ratio"] < found[1]["update_ratio"] < found[2]["update_ratio"]
    assert 1 <= found[-1]["effective_rank"] <= 4
    assert found[-1]["drift"]["p5"] <= found[-1]["drift"]["mean"] <= found[-1]["drift"]["p95"]
    assert [row["step"] for row in rows(watched) if row.get("health_seconds", 0) > 0] == [3, 5]
    assert run(short_words, tmp_path / "run", "health=false") == 0
    assert not (tmp_path / "run/health.jsonl").exists()
    assert_same_training(watched, tmp_path / "run")


@pytest.mark.parametrize("source", ["", "lora.safetensors"])
def test_the_command_says_of_a_run_and_of_its_file_what_the_last_save_said(watched, source, capsys):
    row = json.loads((watched / "health.jsonl").read_text().splitlines()[-1])
    assert cli.main(["health", str(watched / source), "--layers", "2"]) == 0
    verdict, drift, means, head, *layers = capsys.readouterr().out.splitlines()
    assert verdict == f"{row['verdict']}: {'; '.join(row['reasons'])}"
    # The file has float16.
    assert float(means.split()[2].rstrip(",")) == pytest.approx(row["update_ratio"], rel=1e-2)
    assert float(drift.split()[1]) == pytest.approx(row["drift"]["mean"], abs=1e-3)
    assert [line.split()[-1] for line in layers] == [layer["name"] for layer in row["layers"][:2]]
    assert head.startswith("update ratio eff. rank     drift  layer")
    for layers in ("-1", "0", "1.5", "9" * 20):
        assert cli.main(["health", str(watched / source), f"--layers={layers}"]) == 2
        assert f"--layers: '{layers}' is not a number from 1" in capsys.readouterr().err


def test_a_start_that_continues_drops_rows_past_its_checkpoint(short_words, watched, tmp_path):
    output_dir = tmp_path / "run"
    assert run(short_words, output_dir, "number_of_steps=4") == 0
    with (output_dir / "health.jsonl").open("a") as file:
        # As a start leaves it that was killed later on, in the middle of a line.
        file.write('{"step": 6, "verdict": "overfit"}\n{"step": 8, "ver')
    assert run(short_words, output_dir) == 0
    assert (output_dir / "health.jsonl").read_text() == (watched / "health.jsonl").read_text()


def test_health_that_fails_is_said_once_and_the_run_goes_on(short_words, tmp_path, monkeypatch, caplog):
    def broken(layer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(health, "measure_layer", broken)
    assert run(short_words, tmp_path / "run") == 0
    said = [record.getMessage() for record in caplog.records if "health of" in record.getMessage()]
    assert said == ["health of step 2 left out: OSError: [Errno 28] No space left on device; training goes on"]


def test_a_row_that_a_kill_has_torn_is_passed_over_and_later_ones_are_read(tmp_path):
    path, losses = tmp_path / "metrics.jsonl", health.Losses(tmp_path / "metrics.jsonl")
    assert losses.read() == {}
    path.write_text('{"step": 1, "loss": 2.0}\n' * health.FEWEST_LOSSES + '{"step": 2, "lo')
    assert losses.read() == {"training": 2.0}
    with path.open("a") as file:
        file.write('\n[]\n{"step": 3, "val/loss": 5.0, "val/gain": null}\n')
    assert losses.read() == {"training": 2.0, "validation": 5.0}
