"""Compiled stretches: the same velocity and gradients, one compilation whatever the lengths, and when they are used."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

from sa3dist import train
from sa3dist.adapters import adapter_parameters
from sa3dist.errors import ConfigError
from sa3dist.model import compiled
from sa3dist.model.packing import Packing
from tests.helpers.packed_clips import adapted, inputs
from tests.helpers.processors import trust_instructions
from tests.helpers.program import rows

# Four functions, for several padded clips and for one packed list.
COMPILATIONS = 8
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    compiled.compiled_elementwise.cache_clear()
    counters.clear()
    yield
    torch._dynamo.reset()


def mask_of(*lengths):
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def cut(given, frames):
    """The inputs with so many frames."""
    sized = {
        name: value for name, value in given.items() if name in ("x_BDT", "inpaint_mask_B1T", "inpaint_latents_BDT")
    }
    return {**given, **{name: value.repeat(1, 1, 3)[..., :frames] for name, value in sized.items()}}


def velocity_and_gradients(base, given, mask_BT):
    how = {} if mask_BT is None else {"padding_mask_BT": mask_BT, "packing": Packing.of(mask_BT)}
    velocity = base.velocity(**given, **how)
    draw = torch.Generator().manual_seed(7)
    score = (velocity * torch.randn(velocity.shape, generator=draw)).sum()
    return [velocity.detach(), *torch.autograd.grad(score, list(adapter_parameters(base).values()))]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
@pytest.mark.parametrize(("checkpointing", "autocast"), [(False, False), (True, True)])
def test_compiled_blocks_give_the_same_velocity_and_gradients(tiny_base, checkpointing, autocast):
    base, given = adapted(tiny_base, "dora-rows"), inputs(tiny_base)
    base.gradient_checkpointing = checkpointing
    found = {}
    for backend in (None, "aot_eager"):
        compiled.compile_elementwise(base.dit, backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found[backend] = [velocity_and_gradients(base, given, mask) for mask in (None, mask_of(24, 9, 16))]
    assert counters["stats"]["unique_graphs"] == COMPILATIONS
    for eager, fast in zip(found[None], found["aot_eager"], strict=True):
        for expected, value in zip(eager, fast, strict=True):
            tolerance = 0.05 if autocast else 1e-5
            assert (value - expected).norm() <= tolerance * expected.norm()
    compiled.compile_elementwise(base.dit, None)
    again = velocity_and_gradients(base, given, None)
    if not autocast:
        assert all(torch.equal(a, b) for a, b in zip(found[None][0], again, strict=True))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("tiny_name", ["tiny-sa3-small"])
# Compiled for the lengths that come first, and for a given number of tokens.
@pytest.mark.parametrize("tokens", [None, 1000])
def test_no_length_and_no_layer_recompiles_anything(tiny_base, tokens):
    base, given = adapted(tiny_base, "dora-rows"), inputs(tiny_base)
    compiled.compile_elementwise(base.dit, "aot_eager", tokens)
    velocity_and_gradients(base, cut(given, 20), None)
    velocity_and_gradients(base, cut(given, 20), mask_of(20, 9, 4))
    assert counters["stats"]["unique_graphs"] == COMPILATIONS
    for lengths in ((64, 64, 64), (13, 7, 13), (48, 48, 1), (31, 30, 29), (16, 16, 16)):
        mask = None if len(set(lengths)) == 1 else mask_of(*lengths)
        velocity_and_gradients(base, cut(given, max(lengths)), mask)
    assert counters["stats"]["unique_graphs"] == COMPILATIONS
    assert not counters["graph_break"]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
@pytest.mark.parametrize("forward_too", [True, False])
def test_what_cannot_be_compiled_runs_uncompiled_where_auto_chose_to_compile(tiny_base, caplog, forward_too):
    def failing(graph, inputs):
        raise RuntimeError("no C compiler on this machine")

    backward_only = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=failing)
    torch._dynamo.register_backend(failing if forward_too else backward_only, name=f"failing-{forward_too}")
    base, given = adapted(tiny_base, "dora-rows"), inputs(tiny_base)
    expected = velocity_and_gradients(base, given, None)
    compiled.compile_elementwise(base.dit, f"failing-{forward_too}")
    with pytest.raises(RuntimeError, match="no C compiler"):
        velocity_and_gradients(base, given, None)
    torch._dynamo.reset()
    lazily = torch._functorch.config.patch(force_non_lazy_backward_lowering=False)
    with torch._dynamo.config.patch(suppress_errors=False), lazily:
        compiled.fall_back_on_failure()
        found = velocity_and_gradients(base, given, None)
    torch.testing.assert_close(found, expected)
    assert "no C compiler on this machine" in caplog.text


@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
def test_a_second_model_of_a_process_is_compiled_with_equal_options_and_so_not_anew(tiny_base, monkeypatch):
    wanted = []
    monkeypatch.setattr(torch, "compile", lambda function, options, **_: wanted.append(options))
    for _ in range(2):
        compiled.compile_blocks(tiny_base.dit, "inductor")
    first, second = wanted
    assert first == second


def test_auto_compiles_long_runs_on_cuda_only():
    assert compiled.wants_compile("auto", CUDA, 1000)
    assert not compiled.wants_compile("auto", CUDA, 20)
    assert not compiled.wants_compile("auto", CPU, 1000)
    assert compiled.wants_compile("on", CUDA, 1)
    assert not compiled.wants_compile("off", CUDA, 1000)


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none_found():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        compiled.wants_compile("on", CPU, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
# Processes that compile beside it would each import torch first, and so would those that try this CPU's instructions.
@torch._inductor.config.patch({"compile_threads": 1})
def test_a_compiled_run_trains_as_an_uncompiled_one_and_keeps_its_kernels(words, tmp_path, monkeypatch):  # noqa: F811
    trust_instructions(monkeypatch)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    words = [word for word in words if not word.startswith("work_dir")]
    losses = {}
    for choice in ("off", "on"):
        more = ["deterministic=false", "number_of_steps=2", f"compile={choice}"]
        output_dir = tmp_path / choice
        assert train.main([*words, *more, f"output_dir={output_dir}", f"work_dir={tmp_path / 'work'}"]) == 0
        losses[choice] = [row["loss"] for row in rows(output_dir)]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-5)
    assert any((tmp_path / "work" / "compiled").rglob("*.py"))
