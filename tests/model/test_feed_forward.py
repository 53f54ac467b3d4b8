"""The feed-forward's gate as one function: the gradients of its parts, and less that is kept."""

import collections
import functools

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

import sa3dist
from sa3dist.adapters import adapter_parameters
from sa3dist.adapters.formed import use_formed_weights
from sa3dist.model import compiled, dit
from sa3dist.model.blocks import FeedForward
from sa3dist.model.compiled import compile_blocks
from sa3dist.model.packing import FilledPacking
from sa3dist.parallel.flat_adamw import FlatAdapters
from tests.helpers.packed_clips import FRAMES, inputs
from tests.helpers.recorded_step import StepSettings

LAYERS = {"both": None, "projection": ["ff.ff.0"], "last": ["ff.ff.2"], "neither": ["self_attn"]}


@pytest.fixture
def one_clip(tiny_base):
    given = {name: value[:1] for name, value in inputs(tiny_base).items()}
    memory = tiny_base.dit.transformer.memory
    return given | {"packing": FilledPacking.of([FRAMES], memory, FRAMES, memory + FRAMES + 5)}


def formed(base, kind, include):
    """The base on formed weights; a function that gives velocity and adapter gradients of a pass."""
    # The prompt projection stands before what these tests hand in.
    sa3dist.attach_adapter(base, adapter_type=kind, rank=4, include=include, exclude=["conditioners.prompt"])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(base).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    flat = FlatAdapters(adapter_parameters(base), 1e-3, 0.01, scalars=0)
    weights = use_formed_weights(base, flat, StepSettings(adapter_products="formed"), torch.device("cpu"))
    weights.form()

    def passes(given):
        flat.zero()
        velocity = base.velocity(**given)
        velocity.square().sum().backward()
        weights.finish()
        return [velocity.detach(), *(parameter.grad.clone() for parameter in adapter_parameters(base).values())]

    return passes


@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
@pytest.mark.parametrize(
    ("kind", "which"),
    [("dora-rows", "both"), ("bora-xs", "both"), ("lora", "projection"), ("dora-cols", "last"), ("lora", "neither")],
)
@pytest.mark.parametrize("recomputed", [0, 1])
def test_the_fused_gate_function_gives_the_gradients_of_its_parts(
    tiny_base, one_clip, monkeypatch, kind, which, recomputed
):
    tiny_base.recomputed_blocks = recomputed
    passes = formed(tiny_base, kind, LAYERS[which])
    found = passes(one_clip)
    monkeypatch.setattr(dit, "FUSED_GATE", False)
    for ours, theirs in zip(found, passes(one_clip), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9


def kept_by_the_compiler(base, run):
    """Numbers of values in what a compiled block's forward graph makes for its backward graph."""
    sizes = []

    def compile_forward(graph, _):
        # The first output is the block's; what entered the graph is kept anyway.
        (outputs,) = graph.graph.output_node().args
        made = [node.meta["val"] for node in outputs[1:] if node.op != "placeholder"]
        sizes.append(collections.Counter(int(value.numel()) for value in made if isinstance(value, torch.Tensor)))
        return make_boxed_func(graph.forward)

    def backend(graph, examples):
        return aot_module_simplified(
            graph, examples, compile_forward, lambda graph, _: make_boxed_func(graph.forward),
            partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        )  # fmt: skip

    torch._dynamo.reset()
    try:
        compile_blocks(base.dit, backend)
        result = run()
    finally:
        torch._dynamo.reset()
        compile_blocks(base.dit, None)
    (kept,) = sizes
    return kept, result


@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
def test_a_compiled_block_keeps_one_value_less_than_with_the_gates_parts(tiny_base, one_clip, monkeypatch):
    # Otherwise the compiler makes what its own gate gives again, too.
    monkeypatch.setattr(compiled, "RECOMPUTE_NORMS", False)
    # Of this type the projection's own layer keeps no output.
    passes = formed(tiny_base, "lora", LAYERS["both"])
    inner = tiny_base.dit.transformer.layers[0].ff.ff[2].weight.shape[1]
    tokens, expected, kept = one_clip["packing"].table_5K.shape[1], passes(one_clip), {}
    for as_one in (True, False):
        monkeypatch.setattr(dit, "FUSED_GATE", as_one)
        kept[as_one], found = kept_by_the_compiler(tiny_base, lambda: passes(one_clip))
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9
    assert kept[False] - kept[True] == {tokens * inner: 1}
    assert not kept[True] - kept[False]


@pytest.mark.parametrize("sinusoidal", [True, False])
def test_a_gate_of_another_kind_stays_as_it_is(sinusoidal):
    torch.manual_seed(0)
    feed_forward, x = FeedForward(8, 3.0, sinusoidal), torch.randn(5, 8, requires_grad=True)
    expected, found = feed_forward(x), feed_forward(x, fused_gate=True)
    torch.testing.assert_close(found, expected)
    score = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, score) for y in (found, expected)))
    saved = {node.name() for node in functions_behind(found)}
    assert ("_GateBackward" in saved) is not sinusoidal


def functions_behind(value):
    waiting, seen = [value.grad_fn], []
    while waiting:
        node = waiting.pop()
        seen.append(node)
        waiting += [following for following, _ in node.next_functions if following is not None]
    return seen
