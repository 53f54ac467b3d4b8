"""The step benchmark compares like with like: equal losses and gradients, and a baseline that does form W'."""

import json
from pkgutil import resolve_name

import bench_step
import encoding_side
import pytest
import step_sides
import torch
from sa3dist_kernels import ADAPTER_TYPES
from torch.utils._python_dispatch import TorchDispatchMode

from sa3dist import adapters
from sa3dist.adapters.layers import AdaptedLayer
from tests.helpers.host_recorder import HostRecorder, NothingAsked

CPU = torch.device("cpu")
FRAMES = 10


def options_for(adapter_type, precision="fp32", shape="tiny-medium", **others):
    words = ["--shape", shape, "--depth", "2", "--frames", str(FRAMES), "--adapter-type", adapter_type, "--rank", "4"]
    words += ["--precision", precision, "--repeats", "1", "--device", "cpu", "--skip-memory"]
    return bench_step.parse(words + [word for pair in others.items() for word in pair])


class WeightSizedResults(TorchDispatchMode):
    """Counts the operations that return a new tensor of a given shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = torch.Size(shape), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        fresh = isinstance(out, torch.Tensor) and out.shape == self.shape and not function.is_view
        self.count += bool(fresh)
        return out


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
def test_losses_and_gradients_of_both_sides_agree_in_float32(adapter_type):
    options = options_for(adapter_type)
    sides = {name: step_sides.Side(name, options, CPU) for name in ("ours", "baseline")}
    losses = {}
    for name, side in sides.items():
        side.use(1, FRAMES)
        # Some context is given, so that the local branch has gradients too.
        side.batch["inpaint_mask"][..., :3] = 1
        side.has_context = True
        losses[name] = side.step().item()
    assert losses["ours"] == pytest.approx(losses["baseline"], rel=1e-5)
    ours, baseline = (sides[name].gradients() for name in ("ours", "baseline"))
    assert ours.keys() == baseline.keys()
    assert bench_step.gradient_distance(ours, baseline) < 1e-4
    for name, value in baseline.items():
        assert value.abs().max() > 0, name
        # Tensor by tensor: a small one must not hide behind the sum.
        assert (ours[name] - value).norm() <= 1e-3 * value.norm() + 1e-7, name


@pytest.mark.parametrize("shape", ["tiny-medium", "tiny-small"])
def test_a_row_of_results_is_complete_and_agrees_in_bf16(shape):
    options = options_for("dora-rows", "bf16", shape)
    row = bench_step.compare(options, bench_step.make_sides(options, CPU), CPU)
    assert row["losses_agree"]
    assert row["gradients_agree"]
    assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"], rel=0.05)
    assert row["over_frozen"] == pytest.approx(row["ours_ms"] / row["frozen_ms"], rel=0.05)
    assert (row["frames"], row["depth"], row["rank"]) == (FRAMES, 2, 4)
    assert "agree" in bench_step.line(row)
    # A ratio that owes something to emulated bf16 says so.
    assert row["emulated_products"] is not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert json.loads(json.dumps(row)) == row


def test_baseline_forms_the_weight_in_forward_recompute_and_backward_and_ours_never_does():
    options = options_for("dora-rows")
    counts = {}
    for side_name in ("ours", "baseline"):
        side = step_sides.Side(side_name, options, CPU)
        side.use(1, FRAMES)
        # ff.ff.0.proj: two halves of twice the width of 128. No activation has as many rows.
        with WeightSizedResults((512, 128)) as watch:
            side.step()
        counts[side_name] = watch.count
    assert counts["ours"] == 0
    # Two blocks have such a layer; B A, its sum with W0 and the scaled rows make three, forward and recomputed, and as
    # many at least come in the backward pass.
    assert counts["baseline"] >= 2 * 3 * 3


def test_baseline_recomputes_every_block_and_trains_the_same_tensors_from_the_same_values():
    options = options_for("bora")
    ours, baseline = (step_sides.Side(name, options, CPU) for name in ("ours", "baseline"))
    assert baseline.base.gradient_checkpointing
    assert not ours.base.gradient_checkpointing
    assert ours.trained.keys() == baseline.trained.keys() == adapters.adapter_parameters(ours.base).keys()
    for name, value in ours.trained.items():
        assert torch.equal(value, baseline.trained[name])
        assert value.data_ptr() != baseline.trained[name].data_ptr()
    assert not any(isinstance(module, AdaptedLayer) for module in baseline.base.modules())


def test_frozen_side_has_no_adapter_and_reaches_its_inputs():
    side = step_sides.Side("frozen", options_for("dora-rows"), CPU)
    side.use(1, FRAMES)
    side.step()
    assert adapters.adapter_parameters(side.base) == {}
    for name in step_sides.INPUTS:
        assert side.batch[name].grad is not None, name
    assert all(parameter.grad is None for parameter in side.base.parameters())


def test_from_audio_adds_what_encoding_the_whole_clip_and_its_caption_takes():
    options = options_for("dora-rows", shape="tiny-small")
    options.from_audio = True
    row = bench_step.compare(options, bench_step.make_sides(options, CPU), CPU)
    assert row["encoding_ms"] > 0
    expected = (row["baseline_ms"] + row["encoding_ms"]) / row["ours_ms"]
    assert row["ratio_from_audio"] == pytest.approx(expected, rel=0.01)
    assert "from audio" in bench_step.line(row)


def test_what_is_encoded_is_the_whole_clip_by_encoders_of_the_released_sizes(monkeypatch):
    base = step_sides.make_base("tiny-small", 2, CPU, torch.float32)
    seen = []
    monkeypatch.setattr(base, "encode_audio", lambda audio: seen.append(audio.shape))
    made = encoding_side.Encoding(base, FRAMES, 2)
    # What the encoder is given inside it is seen nowhere else.
    made._text.register_forward_hook(lambda module, given, out: seen.append(out.last_hidden_state.shape))
    made.step()
    assert seen == [(2, 2, FRAMES * 4096), (2, base.prompt_tokens, 768)]
    matrices = [value for value in made._text.parameters() if value.ndim == 2]
    # 12 layers of four 768 x 768 projections and three of 768 x 2048, and the embedding.
    assert sum(value.numel() for value in matrices) == 12 * (4 * 768**2 + 3 * 768 * 2048) + 1000 * 768


@pytest.mark.parametrize("side_name", ["ours", "frozen"])
def test_sides_that_may_be_recorded_ask_no_tensor_for_its_value(side_name):
    side = step_sides.Side(side_name, options_for("dora-rows"), CPU)
    side.use(1, FRAMES)
    # Raises at the first value that is asked for.
    with NothingAsked():
        (loss,) = side.passes()
    assert loss.isfinite()


def test_recorded_sides_compute_the_same_and_the_baseline_is_never_recorded(monkeypatch):
    monkeypatch.setattr(step_sides, "Recorder", lambda device: HostRecorder())
    options = options_for("dora-rows")
    options.cuda_graphs = "on"
    sides = bench_step.make_sides(options, CPU)
    row = bench_step.compare(options, sides, CPU)
    assert row["graphed"]
    assert [side.replay is not None for side in sides.values()] == [True, False, True]
    assert row["gradient_distance"] < 1e-4
    options.cuda_graphs = "off"
    ordinary = bench_step.compare(options, bench_step.make_sides(options, CPU), CPU)
    assert not ordinary["graphed"]
    assert row["ours_loss"] == pytest.approx(ordinary["ours_loss"], rel=1e-6)


def test_random_weights_are_the_same_wherever_they_are_read():
    base = step_sides.make_base("tiny-small", 2, CPU, torch.float32)
    for name in list(adapters.candidate_layers(base.adapter_roots))[::7]:
        assert torch.equal(base.fp32_weight(name), adapters.candidate_layers(base.adapter_roots)[name].weight)


@pytest.mark.slow
def test_the_program_measures_memory_in_fresh_processes_and_writes_json(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--shape", "tiny-small", "--depth", "2", "--frames", "400", "--rank", "4", "--precision", "fp32"]
    words += ["--repeats", "1", "--device", "cpu", "--json", str(tmp_path / "out.jsonl")]
    assert bench_step.main(words) == 0
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["losses_agree"]
    # 416 tokens of 128 channels through two blocks: some megabytes, far from the load's hundreds.
    assert 1e6 < row["frozen_step_bytes"] < 1e9
    assert 1e6 < row["ours_step_bytes"] < 1e9
    assert row["torch"] == torch.__version__
    assert "dora-rows" in capfd.readouterr().out


def test_the_compiler_knows_every_choice_that_is_tried_and_only_there():
    import bench_compiler

    from sa3dist.model import compiled

    def constants(choices):
        return {name: resolve_name(name) for name in choices if name.startswith(bench_compiler.OURS)}

    for choices in bench_compiler.CHOICES.values():
        before, apart = dict(compiled.INDUCTOR_OPTIONS), bench_compiler.OURS
        ours = constants(choices)
        with bench_compiler.chosen(choices):
            tried = {key: value for key, value in choices.items() if not key.startswith(apart)}
            assert before | tried == compiled.INDUCTOR_OPTIONS
            known = torch._inductor.config.get_config_copy()
            assert compiled.INDUCTOR_OPTIONS.keys() <= known.keys()
            assert constants(choices) == {name: choices[name] for name in ours}
        assert before == compiled.INDUCTOR_OPTIONS
        assert constants(choices) == ours


def test_a_block_is_planned_for_a_device_that_is_not_there(capsys):
    import plan_block

    assert plan_block.main(["--frames", "323"]) == 0
    found = capsys.readouterr().out
    assert found.count("sa3dist.joined_raw_sums") == found.count("sa3dist.self_attention_gradient") == 1
    # Sums over tokens of several lengths: the graph is planned for any.
    assert found.count("sa3dist.token_sums") == 2
    # 151 before the gradient behind attention was one operation, 102 before the sums over tokens were.
    assert float(found.rpartition("own kernels: ")[2].split(",")[0]) < 80
