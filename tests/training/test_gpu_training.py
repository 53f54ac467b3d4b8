"""The training step on CUDA: the reference's recorded steps, recomputation, AdamW, no waiting, and equal bits twice."""

import contextlib
import dataclasses
import math
import os
import subprocess
import sys
import traceback
import warnings

import pytest
import torch

import sa3dist
from sa3dist.adapters import adapter_parameters, attach_adapter
from sa3dist.errors import EnvironmentFailure
from sa3dist.model.compiled import compile_elementwise
from sa3dist.parallel.flat_adamw import BETAS, EPSILON, MOMENTS, FlatAdapters
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training.graph_recorder import Recorder
from sa3dist.training.loss import micro_batch_loss
from sa3dist.training.run_plan import RunPlan
from sa3dist.training.trainer import Trainer
from tests.helpers.golden import ROOT, golden
from tests.helpers.gpu_steps import make_trained
from tests.helpers.recorded_step import StepSettings, make_batch, recorded_run, shifted, shorten_second_clip

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["dora-rows", "bora-xs"])
def run(request):
    return recorded_run(request.param)


@pytest.fixture(autouse=True)
def _exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def gradients_of(base, batch, settings):
    """Loss and every adapter gradient of one micro batch."""
    parameters = adapter_parameters(base)
    loss = micro_batch_loss(base, batch, settings)["loss"]
    return loss.detach(), dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_of_three_steps_are_the_references(device, run, checkpointing):
    _, recorded, described = run
    base = sa3dist.load_base(golden("tiny-sa3"), device=device)
    sa3dist.load_adapter(base, golden("training") / described["checkpoint"])
    base.gradient_checkpointing = checkpointing
    flat = FlatAdapters(adapter_parameters(base), learning_rate=1e-4, weight_decay=0.01, scalars=0)
    batch = make_batch(base, recorded).to(device)
    losses = []
    for step in range(3):
        flat.zero()
        loss = micro_batch_loss(base, batch, StepSettings("no"))["loss"]
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            for name, parameter in flat.parameters.items():
                expected = recorded[f"grad.{name}"]
                atol = 2e-3 * expected.abs().max().item() + 1e-12
                torch.testing.assert_close(parameter.grad.cpu(), expected, rtol=0, atol=atol, msg=name)
        flat.step()
    assert losses == pytest.approx(described["losses_of_3_steps_same_inputs"], rel=1e-4)


@pytest.mark.parametrize("adapter_type", ["bora", "bora-xs"])
def test_an_adapter_initialised_on_the_device_is_the_one_of_the_cpu(device, adapter_type):
    made = []
    for where in ("cpu", device):
        # In bfloat16: norms must come from the file's float32 weights, not from those in memory.
        base = sa3dist.load_base(golden("tiny-sa3"), device=where, dtype=torch.bfloat16)
        attach_adapter(base, adapter_type, rank=3)
        layers = sa3dist.adapters.adapted_layers(base).values()
        constants = [value for layer in layers for value in layer.adapter.buffers()]
        made.append([*adapter_parameters(base).values(), *constants])
    for expected, found in zip(*made, strict=True):
        assert (found.device.type, found.dtype) == (device.type, torch.float32)
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("adapter_type", ["lora", "dora-cols", "bora", "dora-rows-xs"])
def test_bf16_step_stays_near_float32(device, adapter_type, record_property):
    expected_loss, expected = gradients_of(*make_trained("cpu", adapter_type), StepSettings("no"))
    loss, found = gradients_of(*make_trained(device, adapter_type, torch.bfloat16), StepSettings("bf16"))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.02)
    squares = [((found[name].cpu() - value).square().sum(), value.square().sum()) for name, value in expected.items()]
    distance = math.sqrt(sum(float(a) for a, _ in squares) / sum(float(b) for _, b in squares))
    record_property("gradient_distance", distance)
    assert distance < 0.1


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_recomputed_blocks_give_the_same_gradients(device, mixed_precision):
    dtype = torch.float32 if mixed_precision == "no" else torch.bfloat16
    base, batch = make_trained(device, "bora", dtype)
    loss, kept = gradients_of(base, batch, StepSettings(mixed_precision))
    base.gradient_checkpointing = True
    loss_again, recomputed = gradients_of(base, batch, StepSettings(mixed_precision))
    assert torch.equal(loss, loss_again)
    # The same operations on the same values: only the order in which a device adds may differ.
    tolerance = 1e-5 if mixed_precision == "no" else 1e-2
    for name, value in kept.items():
        torch.testing.assert_close(recomputed[name], value, rtol=0, atol=tolerance * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_content_of_padded_frames_changes_no_loss(device, mixed_precision):
    base, batch = make_trained(device, "dora-rows", torch.float32 if mixed_precision == "no" else torch.bfloat16)
    frames = batch.noised_BDT.shape[2]
    batch.keep_BT = torch.arange(frames, device=device)[None] < torch.tensor([[frames], [frames - 5]], device=device)
    loss = micro_batch_loss(base, batch, StepSettings(mixed_precision))["loss"]
    padding = ~batch.keep_BT[:, None]
    batch.noised_BDT = torch.where(padding, 50.0, batch.noised_BDT)
    batch.target_BDT = torch.where(padding, math.nan, batch.target_BDT)
    changed = micro_batch_loss(base, batch, StepSettings(mixed_precision))["loss"]
    assert torch.equal(loss, changed)
    batch.keep_BT = None
    assert not torch.equal(loss, micro_batch_loss(base, batch, StepSettings(mixed_precision))["loss"])


def test_flat_adamw_is_adamw_in_float64(device):
    draw = torch.Generator().manual_seed(2)
    start = {"a": torch.randn(7, 5, generator=draw), "b": torch.randn(11, generator=draw)}
    parameters = {name: torch.nn.Parameter(value.clone().to(device)) for name, value in start.items()}
    flat = FlatAdapters(parameters, learning_rate=1e-2, weight_decay=0.1, scalars=1)
    expected = {name: value.double() for name, value in start.items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(1, 6):
        flat.zero()
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape, generator=draw)
            parameter.grad += gradient.to(device)
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient.double()
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient.double().square()
            mean, spread = first[name] / (1 - BETAS[0] ** step), (second[name] / (1 - BETAS[1] ** step)).sqrt()
            expected[name] = expected[name] * (1 - 1e-2 * 0.1) - 1e-2 * mean / (spread + EPSILON)
        flat.step()
    for name, parameter in parameters.items():
        assert parameter.data_ptr() >= flat.values.data_ptr()
        torch.testing.assert_close(parameter.detach().cpu().double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("adapter_type", ["lora", "dora-rows", "bora"])
def test_packed_clips_train_as_padded_ones(device, adapter_type, mixed_precision):
    dtype = torch.float32 if mixed_precision == "no" else torch.bfloat16
    base, batch = make_trained(device, adapter_type, dtype)
    loss, found = gradients_of(base, shorten_second_clip(batch), StepSettings(mixed_precision))
    batch.packing = None
    padded_loss, expected = gradients_of(base, batch, StepSettings(mixed_precision))
    relative, tolerance = (1e-5, 1e-4) if mixed_precision == "no" else (0.02, 0.1)
    assert loss.item() == pytest.approx(padded_loss.item(), rel=relative)
    squares = [((found[name] - value).square().sum(), value.square().sum()) for name, value in expected.items()]
    assert math.sqrt(sum(float(a) for a, _ in squares) / sum(float(b) for _, b in squares)) < tolerance


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_compiled_step_is_the_uncompiled_one_and_never_waits(device, mixed_precision, packed):
    dtype = torch.float32 if mixed_precision == "no" else torch.bfloat16
    base, batch = make_trained(device, "dora-rows", dtype)
    batch = shorten_second_clip(batch) if packed else batch
    loss, expected = gradients_of(base, batch, StepSettings(mixed_precision))
    compile_elementwise(base.dit)
    gradients_of(base, batch, StepSettings(mixed_precision))
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        compiled_loss, found = gradients_of(base, batch, StepSettings(mixed_precision))
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    relative, tolerance = (1e-5, 1e-4) if mixed_precision == "no" else (0.02, 0.1)
    assert compiled_loss.item() == pytest.approx(loss.item(), rel=relative)
    squares = [((found[name] - value).square().sum(), value.square().sum()) for name, value in expected.items()]
    assert math.sqrt(sum(float(a) for a, _ in squares) / sum(float(b) for _, b in squares)) < tolerance


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter_type", ["lora", "dora-rows", "bora", "dora-cols-xs"])
def test_forward_and_backward_never_wait_for_the_device(device, adapter_type, checkpointing, packed):
    if device.type != "cuda":
        pytest.skip("only a CUDA device can be waited for")
    base, batch = make_trained(device, adapter_type, torch.bfloat16)
    batch = shorten_second_clip(batch) if packed else batch
    base.gradient_checkpointing = checkpointing
    # The first step uploads the frequency table and picks kernels.
    gradients_of(base, batch, StepSettings("bf16"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, gradients = gradients_of(base, batch, StepSettings("bf16"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
    assert all(value.isfinite().all() for value in gradients.values())


@contextlib.contextmanager
def waits_for(device):
    """Gives a list that fills with the stack of every operation that makes the host wait for the device."""
    found = []

    def note(message, *_):
        if "called a synchronizing CUDA operation" in str(message):
            # Without this function and the warnings module above it.
            found.append("".join(traceback.format_stack(limit=10)[:-1]))

    wait = torch.cuda.Event.synchronize

    def synchronize(event):
        # CUDA's own list of what waits leaves this one out.
        note("called a synchronizing CUDA operation")
        torch.cuda.set_sync_debug_mode("default")
        wait(event)
        torch.cuda.set_sync_debug_mode("warn")

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        warnings.showwarning = note
        patch.setattr(torch.cuda.Event, "synchronize", synchronize)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def test_a_whole_step_waits_once(device):
    base, batch = make_trained(device, "dora-rows", torch.bfloat16)
    work = RunPlan(9, 2, 2, 4, 42, {}, ["a", "b"])
    trainer = Trainer(base, adapter_parameters(base), StepSettings("bf16"), work, Group(0, 1, device))
    stop = StopRequest()
    losses = [trainer.take_step(iter([batch, batch]), stop)["loss"]]
    with waits_for(device) as waits:
        losses.append(trainer.take_step(iter([batch, batch]), stop)["loss"])
    # The figures of the step come to the host together.
    expected = 1 if device.type == "cuda" else 0
    assert len(waits) == expected, f"the step waited {len(waits)} times:\n\n" + "\n".join(waits)
    assert losses[1] < losses[0]


def test_a_step_that_is_not_finite_was_not_taken_by_the_device_either(device):
    courses = []
    for spoilt in (False, True):
        base, batch = make_trained(device, "dora-rows")
        work = RunPlan(9, 2, 2, 4, 42, {}, ["a", "b"])
        trainer = Trainer(base, adapter_parameters(base), StepSettings(), work, Group(0, 1, device))
        trainer.take_step(iter([batch, batch]), StopRequest())
        before = _held(trainer)
        if spoilt:
            bad = dataclasses.replace(batch, target_BDT=batch.target_BDT * math.nan)
            with pytest.raises(EnvironmentFailure, match=r"step 2: the loss of clip a, b is not finite"):
                trainer.take_step(iter([batch, bad]), StopRequest())
            assert all(torch.equal(value, held) for value, held in zip(_held(trainer), before, strict=True))
        trainer.take_step(iter([batch, batch]), StopRequest())
        courses.append(_held(trainer))
    assert not torch.equal(courses[0][0], before[0])
    # Atomic additions in a backward pass may differ from one run to the next.
    for value, expected in zip(*courses, strict=True):
        torch.testing.assert_close(value, expected)


def _held(trainer):
    """Copies of values, moments and the count of steps."""
    flat = trainer.engine.flat
    state = flat.optimizer.state
    return [held.detach().clone() for held in (flat.values, *(state[name] for name in ("step", *MOMENTS)))]


def test_a_wait_is_told_with_the_line_that_waits(device):
    if device.type != "cuda":
        pytest.skip("only a CUDA device can be waited for")
    values = torch.ones(3, device=device)
    with waits_for(device) as waits:
        values.fill_(2)
        values.sum().item()
    (where,) = waits
    assert "values.sum().item()" in where


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("adapter_type", ["lora", "dora-rows", "bora", "dora-cols-xs"])
def test_steps_replayed_as_cuda_graphs_are_the_ordinary_steps(device, adapter_type, compiled, record_property):
    if device.type != "cuda":
        pytest.skip("only a CUDA device records graphs")
    losses, adapters = {}, {}
    for graphed in (False, True):
        base, batch = make_trained(device, adapter_type, torch.bfloat16)
        if compiled:
            compile_elementwise(base.dit)
        work = RunPlan(9, 2, 2, 4, 42, {}, ["a", "b"])
        trainer = Trainer(base, adapter_parameters(base), StepSettings("bf16"), work, Group(0, 1, device))
        if graphed:
            trainer.record_graphs(Recorder(device))
        batches = iter(
            shifted(shorten_second_clip(batch.clone()) if number % 3 == 2 else batch, number) for number in range(18)
        )
        losses[graphed] = [trainer.take_step(batches, StopRequest())["loss"] for _ in range(9)]
        adapters[graphed] = trainer.engine.adapters()
        assert (trainer.graphs.shapes if graphed else 2) == 2, "no replay was found equal: see the warning"
    assert len(set(losses[False])) == 9
    assert losses[True] == pytest.approx(losses[False], rel=5e-3)
    moved = torch.cat([(adapters[True][name] - value).flatten() for name, value in adapters[False].items()])
    record_property("largest_difference", moved.abs().max().item())
    # The sign of a gradient that is all rounding moves an entry by one learning rate a step.
    assert moved.abs().max() <= 2.1 * 9 * StepSettings().learning_rate
    assert moved.abs().mean() <= 0.2 * StepSettings().learning_rate


class Asking(Recorder):
    """Records passes that ask for values, which no graph can hold."""

    def record(self, function):
        return super().record(lambda: tuple(torch.tensor(loss.item()) for loss in function()))


def test_a_recording_that_fails_leaves_training_as_it_was(device, caplog):
    if device.type != "cuda":
        pytest.skip("only a CUDA device records graphs")
    losses = {}
    for graphed in (False, True):
        base, batch = make_trained(device, "dora-rows", torch.bfloat16)
        work = RunPlan(4, 1, 2, 2, 42, {}, ["a", "b"])
        trainer = Trainer(base, adapter_parameters(base), StepSettings("bf16"), work, Group(0, 1, device))
        if graphed:
            trainer.record_graphs(Asking(device))
        losses[graphed] = [trainer.take_step(iter([batch]), StopRequest())["loss"] for _ in range(4)]
    assert caplog.text.count("training goes on without them") == 1
    assert losses[True] == pytest.approx(losses[False], rel=5e-3)
    # Nothing takes that recording to be under way.
    torch.cuda.empty_cache()
    assert torch.rand(1, device=device) < 1
    assert Recorder(device).record(lambda: (torch.ones(2, device=device) + 1,))()[0].tolist() == [2, 2]


@pytest.mark.parametrize("ways", [("plain", "plain"), ("compiled", "recorded")])
def test_deterministic_mode_gives_equal_bits_in_two_processes(device, ways, tmp_path):
    code = "from tests.helpers.gpu_steps import trained_digest; print(trained_digest({!r}, {!r}))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    # cuBLAS reads its variable when a process first uses it.
    environment = {**os.environ, "PYTHONPATH": paths, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    processes = []
    for number, way in enumerate(ways):
        # Each compiles for itself, beside the other: a lent device's time is short.
        own = environment | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / str(number))}
        command = [sys.executable, "-c", code.format(device.type, way)]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, text=True))
    digests = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64


def test_a_launchers_wish_for_dynamo_does_not_round_products_to_tf32(device):
    if device.type != "cuda":
        pytest.skip("Accelerate turns TF32 on beside a CUDA device only")
    code = (
        "import torch; from sa3dist.runtime.process_group import connect; connect(60.0); "
        "print(torch.backends.cuda.matmul.allow_tf32)"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == ["False"]
