"""The pass that joins raw sums in a compiled backward graph: one operation, the same gradients."""

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES, formed_linear
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

from tests.helpers.layer_cases import relative_error

pytest.importorskip("triton")
from sa3dist_kernels.joined_sums import JOINED, SINGLE, JoinedSums  # noqa: E402

WIDTHS = (18, 20, 16, 24)
RANK = 3


def leaves_and_weights(kind):
    draw = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    leaves, weights = [], []
    for fan_in, fan_out in zip(WIDTHS, WIDTHS[1:], strict=False):
        count = sum(torch.Size(shape).numel() for shape in kind.parameter_shapes(fan_out, fan_in, RANK).values())
        leaves.append(torch.zeros(count, requires_grad=True))
        weights.append((normal(fan_out, fan_in), normal(fan_out, RANK), normal(RANK, fan_in)))
    return leaves, weights


def gradients(kind, x, leaves, weights, backend):
    def layers(x, leaves):
        for leaf, weight in zip(leaves, weights, strict=True):
            x = formed_linear(x, leaf, *weight, kind).sin()
        return x.square().sum()

    torch._dynamo.reset()
    run = layers if backend is None else torch.compile(layers, backend=backend, fullgraph=True)
    return torch.autograd.grad(run(x, leaves), [x, *leaves])


@pytest.mark.parametrize("name", ["lora", "bora", "dora-cols-xs"])
def test_a_graphs_layers_have_one_operation_for_their_sums_and_the_same_gradients(name):
    kind = ADAPTER_TYPES[name]
    leaves, weights = leaves_and_weights(kind)
    x = torch.randn(7, WIDTHS[0], requires_grad=True)
    seen = []

    def compile_backward(graph, _):
        before = [node.target for node in graph.graph.nodes]
        JoinedSums()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        seen.append((before.count(SINGLE), [node.target for node in graph.graph.nodes]))
        return make_boxed_func(graph.forward)

    def backend(graph, examples):
        forward = lambda graph, _: make_boxed_func(graph.forward)  # noqa: E731
        return aot_module_simplified(graph, examples, fw_compiler=forward, bw_compiler=compile_backward)

    found = gradients(kind, x, leaves, weights, backend)
    ((layers, after),) = seen
    assert (layers, after.count(SINGLE), after.count(JOINED)) == (len(leaves), 0, 1)
    for ours, theirs in zip(found, gradients(kind, x, leaves, weights, None), strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_sums_that_are_read_at_once_stay_where_they_are():
    graph = torch.fx.Graph()
    given = [graph.placeholder(name) for name in ("x", "dx", "dy", "z", "left", "right")]
    made = [graph.call_function(SINGLE, (*given, "lora", "torch")) for _ in range(3)]
    read = graph.call_function(torch.ops.aten.neg.default, (made[0],))
    for node in made:
        node.meta["val"] = torch.empty(5)
    graph.output((read, *made[1:]))
    JoinedSums()(graph)
    targets = [node.target for node in graph.nodes]
    assert (targets.count(SINGLE), targets.count(JOINED)) == (1, 1)
