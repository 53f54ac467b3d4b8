"""Compiled programs called without AOTAutograd's wrapping: the same bits, and when they are not."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from sa3dist.adapters import adapter_parameters
from sa3dist.adapters.formed import use_formed_weights
from sa3dist.model import compiled
from sa3dist.model.lean_programs import lean
from sa3dist.model.packing import FilledPacking
from sa3dist.parallel.flat_adamw import FlatAdapters
from tests.helpers.packed_clips import adapted, inputs
from tests.helpers.recorded_step import StepSettings

LEAN, TORCHS = "_LeanBackward", "CompiledFunctionBackward"


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
@pytest.mark.parametrize(("precision", "recomputed"), [("bf16", 0), ("no", 2)])
def test_blocks_give_the_bits_they_give_as_torch_calls_them(tiny_base, monkeypatch, precision, recomputed):
    base, given = adapted(tiny_base, "dora-rows"), inputs(tiny_base)
    base.recomputed_blocks = recomputed
    flat = FlatAdapters(adapter_parameters(base), 1e-3, 0.01, scalars=0)
    settings = StepSettings(adapter_products="formed", mixed_precision=precision)
    use_formed_weights(base, flat, settings, torch.device("cpu")).form()
    packing = FilledPacking.of([24, 7, 16], base.dit.transformer.memory, 24, 70)
    called, way = [], "torch's"

    def backend_of(name):
        # Compiled once, called both ways.
        def backend(graph, examples):
            torchs = torch._dynamo.lookup_backend(name)(graph, examples)
            programs = {"torch's": torchs, "ours": lean(lambda *_: torchs)(graph, examples)}
            return lambda *given: programs[way](*given)

        return backend

    monkeypatch.setattr(compiled, "lean", backend_of)
    compiled.compile_blocks(base.dit, "aot_eager")
    run_block = base.dit.transformer.run_block

    def noting(*arguments):
        made = run_block(*arguments)
        called.append(type(made.grad_fn).__name__)
        return made

    base.dit.transformer.run_block = noting

    def velocity_and_gradient():
        flat.zero()
        called.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            velocity = base.velocity(**given, packing=packing)
        velocity.square().sum().backward()
        return velocity.detach(), flat.gradient.clone()

    expected = velocity_and_gradient()
    assert set(called) == {TORCHS}
    assert expected[1].any()
    way = "ours"
    for pass_ in range(3):
        found = velocity_and_gradient()
        # The first block's program is made by its call.
        assert called[0] == (LEAN if pass_ else TORCHS)
        assert set(called[1:]) == {LEAN}
        assert all(torch.equal(ours, torchs) for ours, torchs in zip(found, expected, strict=True))


def changes_its_argument(x, y):
    y.add_(1)
    return x * y


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "function",
    [lambda x, y: (x * y, x + y), lambda x, y: x.view(3, 2), lambda x, y: x.t() * y.t(), changes_its_argument],
)
def test_what_does_more_than_give_one_new_tensor_is_called_as_torch_does(function):
    ours = torch.compile(function, backend=lean("aot_eager"), fullgraph=True)
    drawn = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    found = {}
    for run in (function, ours):
        for repeat in range(3):
            x, y = drawn[0].clone().requires_grad_(), drawn[1].clone()
            made = run(x, y)
            made = made if isinstance(made, tuple) else (made,)
            sum(value.square().sum() for value in made).backward()
            found[run is ours, repeat] = *made, x.grad, y
    for repeat in range(3):
        torch.testing.assert_close(found[True, repeat], found[False, repeat], rtol=0, atol=0)
    assert not any(value.grad_fn is not None and type(value.grad_fn).__name__ == LEAN for value in found[True, 2])


@pytest.mark.usefixtures("_fresh_compiler")
def test_without_the_parts_of_torch_that_it_needs_programs_are_called_as_torch_does(caplog):
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward))

    def of_another_torch(graph, examples):
        compiled = backend(graph, examples)

        def run(*given):
            (made,) = compiled(*given)
            # Of a function that is not AOTAutograd's.
            return (made * 1,)

        return run

    function = torch.compile(lambda x: x.exp(), backend=lean(of_another_torch))
    x = torch.ones(3, requires_grad=True)
    with caplog.at_level("INFO", "sa3dist.model.lean_programs"):
        for _ in range(3):
            x.grad = None
            function(x).sum().backward()
            assert torch.equal(x.grad, x.detach().exp())
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_second_backward_pass_of_one_call_is_refused():
    function = torch.compile(lambda x: x.exp().sin(), backend=lean("aot_eager"), fullgraph=True)
    x = torch.ones(3, requires_grad=True)
    # Where no length varies the backward program is compiled when it is first needed.
    for _ in range(2):
        function(x).sum().backward()
    made = function(x)
    assert type(made.grad_fn).__name__ == LEAN
    made.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs only once"):
        made.sum().backward()
