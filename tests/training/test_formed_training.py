"""Training with formed weights: the factored form's losses, gradients and steps, over micro batches and ranks."""

import types

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES
from torch._dynamo.utils import counters

from sa3dist.adapters import adapter_parameters, formed
from sa3dist.adapters.formed import use_formed_weights
from sa3dist.model.compiled import compile_blocks
from sa3dist.model.packing import FilledPacking
from sa3dist.parallel.flat_adamw import FlatAdapters
from tests.helpers.packed_clips import adapted, inputs
from tests.helpers.recorded_step import StepSettings

FORMED = StepSettings(adapter_products="formed")


def factored_gradients(base, scores):
    found = [torch.zeros_like(value) for value in adapter_parameters(base).values()]
    for score in scores:
        gradients = torch.autograd.grad(score(base), list(adapter_parameters(base).values()))
        found = [total + value for total, value in zip(found, gradients, strict=True)]
    return found


def weighted_velocity(given, seed):
    def score(base):
        weights = torch.randn(given["x_BDT"].shape, generator=torch.Generator().manual_seed(seed))
        return (base.velocity(**given) * weights).sum()

    return score


@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
@pytest.mark.parametrize("kind", ADAPTER_TYPES)
def test_formed_weights_give_the_factored_forms_gradients_over_three_micro_batches(tiny_base, kind):
    base, given = adapted(tiny_base, kind), inputs(tiny_base)
    scores = [weighted_velocity({name: value[:clips] for name, value in given.items()}, clips) for clips in (1, 3, 2)]
    expected = factored_gradients(base, scores)
    flat = FlatAdapters(adapter_parameters(base), 1e-3, 0.01, scalars=0)
    weights = use_formed_weights(base, flat, FORMED, torch.device("cpu"))
    weights.form()
    for score in scores:
        score(base).backward()
    weights.finish()
    for (name, parameter), wanted in zip(adapter_parameters(base).items(), expected, strict=True):
        assert (parameter.grad - wanted).norm() <= 2e-5 * wanted.norm(), name


@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
@pytest.mark.parametrize("obstacle", [None, "the kernels need a CUDA device"])
@pytest.mark.parametrize("failure", [None, "dora-rows: W' is 1.0e-01 from torch's"])
def test_auto_forms_weights_where_the_kernels_serve_and_a_choice_is_obeyed(
    tiny_base, monkeypatch, caplog, obstacle, failure
):
    base = adapted(tiny_base, "dora-rows")
    flat = FlatAdapters(adapter_parameters(base), 1e-3, 0.01, scalars=0)
    monkeypatch.setattr(formed, "obstacle_to", lambda device, products: obstacle)
    monkeypatch.setattr(formed, "trial", lambda weights: failure)
    for choice in ("auto", "formed", "factored"):
        settings = types.SimpleNamespace(adapter_products=choice, mixed_precision="no")
        expected = choice == "formed" or (choice == "auto" and not obstacle and not failure)
        with caplog.at_level("INFO", "sa3dist.adapters.formed"):
            assert (use_formed_weights(base, flat, settings, torch.device("cpu")) is not None) is expected
    if reason := obstacle or failure:
        assert reason in caplog.text


@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
def test_one_program_serves_clips_with_and_without_a_filling_and_weights_kept_or_formed_per_use(tiny_base):
    base = adapted(tiny_base, "dora-rows")
    given = {name: value[:1] for name, value in inputs(tiny_base).items()}
    flat = FlatAdapters(adapter_parameters(base), 1e-3, 0.01, scalars=0)
    weights = use_formed_weights(base, flat, FORMED, torch.device("cpu"))
    memory = base.dit.transformer.memory
    packings = [FilledPacking.of([24], memory, 24, memory + 24 + extra) for extra in (0, 16, 40)]

    def passes(per_use):
        weights.allocate(per_use)
        weights.form()
        flat.zero()
        velocities = [base.velocity(**given, packing=packing) for packing in packings]
        velocities[-1].square().sum().backward()
        weights.finish()
        return [*velocities, flat.gradient.clone()]

    expected = passes(per_use=False)
    torch._dynamo.reset()
    counters.clear()
    try:
        compile_blocks(base.dit, "aot_eager")
        found = [passes(per_use=False), passes(per_use=True)]
        assert counters["stats"]["unique_graphs"] == 1
    finally:
        torch._dynamo.reset()
        compile_blocks(base.dit, None)
    for of_way in found:
        torch.testing.assert_close(of_way, expected)


@pytest.mark.parametrize("tiny_name", ["tiny-sa3-small"])
def test_blocks_that_cannot_be_compiled_run_uncompiled_unless_that_was_asked_for(tiny_base):
    base, given = adapted(tiny_base, "dora-rows"), inputs(tiny_base)
    packing = FilledPacking.of([24, 7, 16], base.dit.transformer.memory, 24, 70)
    flat = FlatAdapters(adapter_parameters(base), 1e-3, 0.01, scalars=0)
    use_formed_weights(base, flat, FORMED, torch.device("cpu")).form()

    def no_compiler(graph, examples):
        raise RuntimeError("no compiler here")

    expected = base.velocity(**given, packing=packing)
    try:
        compile_blocks(base.dit, no_compiler)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no compiler here"):
            base.velocity(**given, packing=packing)
        torch._dynamo.reset()
        compile_blocks(base.dit, no_compiler, whole=False)
        with torch._dynamo.config.patch(suppress_errors=True):
            assert torch.equal(base.velocity(**given, packing=packing), expected)
    finally:
        torch._dynamo.reset()
        compile_blocks(base.dit, None)
