"""Sums over tokens that gradients of modulations are made of, and the pass that finds them, against float64."""

import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from sa3dist.model import compiled
from sa3dist.model.add_scaled import add_scaled
from tests.helpers.layer_cases import relative_error

pytest.importorskip("triton")
from sa3dist_kernels import triton_support  # noqa: E402
from sa3dist_kernels.joined_sums import JoinedSums  # noqa: E402
from sa3dist_kernels.joined_token_sums import TOKEN_SUMS  # noqa: E402
from sa3dist_kernels.token_sums import Tiles, TokenSum, token_sums, token_sums_reference  # noqa: E402

# Several blocks of channels, shares of the tokens, and steps of a share.
TILES = Tiles(programs=12, tokens=4, depth=2, channels=16)
needs_interpreter = pytest.mark.skipif(
    not triton_support.interpreting(), reason="Triton was imported without its interpreter"
)


def case(K, E, dtype=torch.float32):
    """Four sums: of a gate with a bias, of a norm's scale and shift, of a mask alone, and plain."""
    draw = torch.Generator().manual_seed(K)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    rows, is_frame = torch.rand(1, K, 1, generator=draw), torch.arange(K)[:, None] % 3 > 0
    return [
        TokenSum(normal(1, K, E), normal(1, K, E), bias_E=normal(E)),
        TokenSum(100 * normal(1, K, E), normal(1, K, E), rows, normal(E).float()),
        TokenSum(normal(1, K, E), rows_K=is_frame),
        TokenSum(normal(1, K, E)),
    ]


def exact(each, owner_BK):
    return token_sums_reference(TokenSum(*(value if value is None else value.double() for value in each)), owner_BK)


def assert_near(found, sums, owner_BK, dtype):
    expected = [part for each in sums for part in exact(each, owner_BK)]
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (ours.dtype, ours.shape) == (dtype, theirs.shape)
        assert relative_error(ours.double(), theirs) < 4 * torch.finfo(dtype).eps, index


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize(("K", "E"), [(67, 19), (1, 16), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_all_sums_are_those_of_float64(impl, K, E, dtype):
    sums = case(K, E, dtype)
    if K:
        assert_near(token_sums(sums, impl=impl, tiles=TILES), sums, None, dtype)
        assert_near(token_sums(sums[2:3], impl=impl, tiles=TILES), sums[2:3], None, dtype)
    else:
        assert not any(part.any() for part in token_sums(sums, impl=impl, tiles=TILES))


@needs_interpreter
def test_every_clip_has_its_own_sums_and_the_filling_enters_none_of_them():
    counts = 5, 31, 1, 20
    owner_BK = torch.repeat_interleave(torch.eye(4, dtype=torch.bool)[:3], torch.tensor(counts), dim=1)
    sums = case(57, 19)
    for each in sums:
        each.left_KE[:, 37:] = 3e38
    found = token_sums(sums, owner_BK, "triton", TILES)
    clips = [
        TokenSum(*(value[:, :37] if value is not None and value.ndim == 3 else value for value in each))
        for each in sums
    ]
    clips[2] = clips[2]._replace(rows_K=sums[2].rows_K[:37])
    assert_near(found, clips, owner_BK[:, :37], torch.float32)


def mixed(h_1KE, scale_BE, shift_BE, gate_BE, local_E, owner_BK, clip_K, weights):
    """What a block does with its modulation, in small: of one clip, or of several in one list."""
    gamma, bias, first, second = weights
    normed = torch.nn.functional.rms_norm(h_1KE, gamma.shape, gamma, 1e-6)
    if len(gate_BE) == 1:
        branch = (torch.addcmul(shift_BE, normed, scale_BE) @ first).sin() @ second + bias
        h_1KE = torch.addcmul(h_1KE, gate_BE, branch)
    else:
        branch = (add_scaled(shift_BE, normed, scale_BE, clip_K, owner_BK) @ first).sin() @ second + bias
        h_1KE = add_scaled(h_1KE, branch, gate_BE, clip_K, owner_BK)
    # Its gradient is read within the graph, and cannot wait.
    local_E = local_E.exp()
    return h_1KE + torch.where(clip_K[:, None] >= 0, local_E, local_E.new_zeros(()))


def added_in_a_wider_format(graph):
    """What a GPU's 16 bit graphs have: a sum in a wider format, a view, and only then the format of the operands."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.sum.dim_IntList and node.args[0].meta["val"].ndim - 2 in node.args[1]:
            shaped = node
            while len(shaped.users) == 1 and next(iter(shaped.users)).target is torch.ops.aten.view.default:
                (shaped,) = shaped.users
            with graph.inserting_after(shaped):
                cast = graph.call_function(torch.ops.prims.convert_element_type.default, (shaped, torch.float32))
            cast.meta["val"] = shaped.meta["val"]
            shaped.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
            node.kwargs = {"dtype": torch.float64}
            for wide in {node, shaped}:
                wide.meta["val"] = wide.meta["val"].double()


@needs_interpreter
@pytest.mark.parametrize(
    ("lengths", "wide"), [((41,), False), ((41,), True), ((5, 36), False)], ids=["one clip", "added wide", "two clips"]
)
def test_a_compiled_backward_graph_has_two_operations_for_its_sums_and_the_same_gradients(lengths, wide):
    draw, E, K = torch.Generator().manual_seed(2), 16, sum(lengths)
    shapes = (1, K, E), *[(len(lengths), E)] * 3, (E,)
    given = [torch.randn(shape, generator=draw, requires_grad=True) for shape in shapes]
    weights = [torch.randn(shape, generator=draw) / 4 for shape in ((E,), (E,), (E, E), (E, E))]
    clip_K = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    owner_BK = torch.arange(len(lengths))[:, None] == clip_K
    clip_K[:3] = -1 if len(lengths) == 1 else 0
    for tensor, axis in ((given[0], 1), (owner_BK, 1), (clip_K, 0)):
        torch._dynamo.mark_dynamic(tensor, axis)
    seen = []

    def compile_backward(graph, _):
        if wide:
            added_in_a_wider_format(graph.graph)
        JoinedSums("triton")(graph.graph)
        graph.graph.lint()
        graph.recompile()
        seen.append(list(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def backend(graph, examples):
        forward = lambda graph, _: make_boxed_func(graph.forward)  # noqa: E731
        ways = {"fw_compiler": forward, "bw_compiler": compile_backward, "decompositions": select_decomp_table()}
        return aot_module_simplified(graph, examples, partition_fn=min_cut_rematerialization_partition, **ways)

    def gradients(function, given, *rest):
        return torch.autograd.grad(function(*given, owner_BK, clip_K, *rest).square().sum(), given)

    torch._dynamo.reset()
    found = gradients(torch.compile(mixed, backend=backend, fullgraph=True), given, weights)
    torch._dynamo.reset()
    (nodes,) = seen
    alone, joined = [node for node in nodes if node.target is TOKEN_SUMS]
    # A gate's sum with its bias, and a norm's two, whose factors are no tensors of all tokens; a masked sum.
    assert [[value is not None for value in values] for values in joined.args[1:5]] == [
        [True, True], [False, True], [False, True], [True, False]
    ]  # fmt: skip
    assert [len(values) for values in alone.args[:5]] == [1] * 5
    exact = gradients(
        mixed, [value.detach().double().requires_grad_() for value in given], [w.double() for w in weights]
    )
    for ours, theirs in zip(found, exact, strict=True):
        assert relative_error(ours.double(), theirs) < 1e-5


@needs_interpreter
def test_the_trial_before_a_run_finds_that_the_kernel_works():
    assert compiled._token_sums_work(torch.device("cpu"), torch.float32)
