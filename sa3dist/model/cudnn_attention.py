"""cuDNN's attention through NVIDIA's Python package, for two calls that torch's own binding lacks.

One stops where the clip ends, at a length read on the device: for a clip that does not fill its list of tokens. The
other is a backward pass that reads one gradient for both members of a pair; torch would copy it for each. Graphs are
built once per number of tokens.

Legend: B batch (members of a differential pair), H heads, K query tokens, J key tokens, D head width.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Layout = tuple[tuple[int, ...], tuple[int, ...]]


class CudnnAttention:
    """Forward and backward pass for one layout of queries, keys and values.

    If padded, values behind the clip's end are not read, and results there are undefined.
    """

    def __init__(
        self, q: Layout, k: Layout, v: Layout, padded: bool, exact: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        """q, k, v: shape and strides of (B, H, K, D), (B, H, J, D) and (B, H, J, D).

        padded   whether the clip may end before K, which then equals J. If not, there is no forward pass: torch has it
        exact    whether two backward passes must agree to the last bit

        Raises cuDNN's own exceptions if it has no such kernel.
        """
        batch, heads, tokens, width = q[0]
        made, made_of_keys = _tokens_first(q[0]), _tokens_first(k[0])
        # One gradient for all members.
        grad = q[0], (0, width, heads * width, 1)
        sums: Layout = (batch, heads, tokens, 1), (heads * tokens, tokens, 1, 1)
        self._dtype, self._device = dtype, device
        given = {"q": q, "k": k, "v": v}
        options = {"attn_scale": width**-0.5} | ({"use_padding_mask": True} if padded else {})

        def forward(graph, inputs) -> dict[str, tuple[Any, Layout]]:
            out, sums_ = graph.sdpa(**inputs, **options, generate_stats=True)
            return {"out": (out, made), "sums": (sums_, sums)}

        def backward(graph, inputs) -> dict[str, tuple[Any, Layout]]:
            inputs = {{"out": "o", "grad": "dO", "sums": "stats"}.get(name, name): x for name, x in inputs.items()}
            found = graph.sdpa_backward(**inputs, **options, use_deterministic_algorithm=exact)
            layouts = {"dq": made, "dk": made_of_keys, "dv": made_of_keys}
            return {name: (made_, layout) for (name, layout), made_ in zip(layouts.items(), found, strict=True)}

        if padded:
            self._forward = _Graph(given, forward, self._make, padded, dtype, device)
        back = {"out": made, "grad": grad, "sums": sums}
        self._backward = _Graph(given | back, backward, self._make, padded, dtype, device)

    def _make(self, name: str, layout: Layout) -> Tensor:
        dtype = torch.float32 if name == "sums" else self._dtype
        return torch.empty_strided(*layout, dtype=dtype, device=self._device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, length_1: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, H, K, D), and the logarithms of the softmax sums (B, H, K, 1), float32.

        length_1   int32, on the device: number of tokens of the clip
        """
        made = self._forward(length_1, q=q, k=k, v=v)
        return made["out"], made["sums"]

    def backward(self, grad, q, k, v, out, sums, length_1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v.

        grad       (B, H, K, D), the same for all members: of stride 0 there
        length_1   None where nothing is padded
        """
        made = self._backward(length_1, q=q, k=k, v=v, out=out, grad=grad, sums=sums)
        return made["dq"], made["dk"], made["dv"]


class _Graph:
    """One of cuDNN's graphs, ready to run on tensors of the layouts it was built for."""

    def __init__(self, given: dict[str, Layout], operation: Callable, make: Callable, padded: bool, dtype, device):
        import cudnn

        kinds = cudnn.data_type
        half = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}[dtype]
        self._handle, self._make, self._device = _handle(device), make, device
        graph = cudnn.pygraph(
            io_data_type=half,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=self._handle,
        )
        self._given = {
            name: graph.tensor(
                name=name, dim=list(shape), stride=list(strides), data_type=kinds.FLOAT if name == "sums" else half
            )
            for name, (shape, strides) in given.items()
        }
        self._batch, lengths = given["q"][0][0], {}
        if padded:
            self._length = graph.tensor(
                name="length", dim=[self._batch, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kinds.INT32
            )
            lengths = {"seq_len_q": self._length, "seq_len_kv": self._length}
        self._made = operation(graph, {**self._given, **lengths})
        for name, (made, (shape, strides)) in self._made.items():
            made.set_output(True).set_dim(list(shape)).set_stride(list(strides))
            if name == "sums":
                made.set_data_type(kinds.FLOAT)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self._graph, self._workspace = graph, graph.get_workspace_size()

    def __call__(self, length_1: Tensor | None, **given: Tensor) -> dict[str, Tensor]:
        import cudnn

        cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream(self._device).cuda_stream)
        made = {name: self._make(name, layout) for name, (_, layout) in self._made.items()}
        tensors = {self._given[name]: value for name, value in given.items()}
        tensors |= {self._made[name][0]: value for name, value in made.items()}
        if length_1 is not None:
            tensors[self._length] = length_1.repeat(self._batch)
        workspace = torch.empty(max(1, self._workspace), dtype=torch.uint8, device=self._device)
        self._graph.execute(tensors, workspace, handle=self._handle)
        return made


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, padded: bool) -> CudnnAttention | None:
    """The kernels for tensors of this layout, (B, H, K, D) in 16 bits on CUDA; None if cuDNN has none."""
    layouts = ((tuple(x.shape), x.stride()) for x in (q, k, v))
    return _built(*layouts, padded, torch.are_deterministic_algorithms_enabled(), q.dtype, q.device)


@functools.cache
def _built(
    q: Layout, k: Layout, v: Layout, padded: bool, exact: bool, dtype: torch.dtype, device: torch.device
) -> CudnnAttention | None:
    if importlib.util.find_spec("cudnn") is None:
        _say("the package nvidia-cudnn-frontend is not installed")
        return None
    try:
        return CudnnAttention(q, k, v, padded, exact, dtype, device)
    except Exception as problem:
        # Any error of cuDNN: torch has kernels for every layout.
        _say(str(problem).partition("\n")[0])
        return None


@functools.cache
def _say(why: str) -> None:
    log.info("attention takes torch's own kernels, which are slower than cuDNN's through its package: %s", why)


def _tokens_first(shape: tuple[int, ...]) -> Layout:
    """As the network has them: token after token."""
    batch, heads, _, width = shape
    return shape, (heads * width, width, batch * heads * width, 1)


@functools.cache
def _handle(device: torch.device) -> int:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()
