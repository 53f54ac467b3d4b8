"""cuDNN's attention through NVIDIA's Python package, for two calls that torch lacks.

One is attention for a clip that is shorter than its list of tokens: it stops at the clip's end, a length read on the
device. The other is a backward pass that reads one output gradient for both members of a differential pair, which torch
would copy. Graphs are built once per number of tokens.

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

        padded   whether the clip may be shorter than K, which then equals J. If not, there is no forward pass: torch
                 has one
        exact    whether the backward pass must be deterministic

        Raises what cuDNN raises if it has no such kernel.
        """
        batch, heads, tokens, width = q[0]
        like_q, like_k = _tokens_first(q[0]), _tokens_first(k[0])
        # Stride 0 over the batch: one gradient for all members.
        grad = q[0], (0, width, heads * width, 1)
        lse: Layout = (batch, heads, tokens, 1), (heads * tokens, tokens, 1, 1)
        self._dtype, self._device = dtype, device
        operands = {"q": q, "k": k, "v": v}
        options = {"attn_scale": width**-0.5} | ({"use_padding_mask": True} if padded else {})

        def forward(graph, inputs) -> dict[str, tuple[Any, Layout]]:
            out, lse_ = graph.sdpa(**inputs, **options, generate_stats=True)
            return {"out": (out, like_q), "lse": (lse_, lse)}

        def backward(graph, inputs) -> dict[str, tuple[Any, Layout]]:
            inputs = {{"out": "o", "grad": "dO", "lse": "stats"}.get(name, name): x for name, x in inputs.items()}
            gradients = graph.sdpa_backward(**inputs, **options, use_deterministic_algorithm=exact)
            layouts = {"dq": like_q, "dk": like_k, "dv": like_k}
            return {name: (x, layout) for (name, layout), x in zip(layouts.items(), gradients, strict=True)}

        if padded:
            self._forward = _Graph(operands, forward, self._empty, padded, dtype, device)
        saved = {"out": like_q, "grad": grad, "lse": lse}
        self._backward = _Graph(operands | saved, backward, self._empty, padded, dtype, device)

    def _empty(self, name: str, layout: Layout) -> Tensor:
        dtype = torch.float32 if name == "lse" else self._dtype
        return torch.empty_strided(*layout, dtype=dtype, device=self._device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, length_1: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, H, K, D), and the log-sum-exp of the scores (B, H, K, 1), float32.

        length_1   int32, on the device: the clip's number of tokens
        """
        results = self._forward(length_1, q=q, k=k, v=v)
        return results["out"], results["lse"]

    def backward(self, grad, q, k, v, out, lse, length_1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v.

        grad       (B, H, K, D), the same for all members, with stride 0 over them
        length_1   None if not padded
        """
        results = self._backward(length_1, q=q, k=k, v=v, out=out, grad=grad, lse=lse)
        return results["dq"], results["dk"], results["dv"]


class _Graph:
    """A cuDNN graph, built for tensors of given layouts."""

    def __init__(self, operands: dict[str, Layout], operation: Callable, empty: Callable, padded: bool, dtype, device):
        """operation: adds the call to a graph; empty: allocates a result by name and layout."""
        import cudnn

        kinds = cudnn.data_type
        half = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}[dtype]
        self._handle, self._empty, self._device = _handle(device), empty, device
        graph = cudnn.pygraph(
            io_data_type=half,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=self._handle,
        )
        self._inputs = {
            name: graph.tensor(
                name=name, dim=list(shape), stride=list(strides), data_type=kinds.FLOAT if name == "lse" else half
            )
            for name, (shape, strides) in operands.items()
        }
        self._batch, lengths = operands["q"][0][0], {}
        if padded:
            self._length = graph.tensor(
                name="length", dim=[self._batch, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kinds.INT32
            )
            lengths = {"seq_len_q": self._length, "seq_len_kv": self._length}
        self._results = operation(graph, {**self._inputs, **lengths})
        for name, (result, (shape, strides)) in self._results.items():
            result.set_output(True).set_dim(list(shape)).set_stride(list(strides))
            if name == "lse":
                result.set_data_type(kinds.FLOAT)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self._graph, self._workspace = graph, graph.get_workspace_size()

    def __call__(self, length_1: Tensor | None, **operands: Tensor) -> dict[str, Tensor]:
        import cudnn

        cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream(self._device).cuda_stream)
        results = {name: self._empty(name, layout) for name, (_, layout) in self._results.items()}
        tensors = {self._inputs[name]: value for name, value in operands.items()}
        tensors |= {self._results[name][0]: value for name, value in results.items()}
        if length_1 is not None:
            tensors[self._length] = length_1.repeat(self._batch)
        workspace = torch.empty(max(1, self._workspace), dtype=torch.uint8, device=self._device)
        self._graph.execute(tensors, workspace, handle=self._handle)
        return results


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, padded: bool) -> CudnnAttention | None:
    """The kernels for the layouts of these tensors, (B, H, K, D), 16 bits, on CUDA; None if unavailable."""
    layouts = ((tuple(x.shape), x.stride()) for x in (q, k, v))
    return _built(*layouts, padded, torch.are_deterministic_algorithms_enabled(), q.dtype, q.device)


@functools.cache
def _built(
    q: Layout, k: Layout, v: Layout, padded: bool, exact: bool, dtype: torch.dtype, device: torch.device
) -> CudnnAttention | None:
    if importlib.util.find_spec("cudnn") is None:
        _log_once("the package nvidia-cudnn-frontend is not installed")
        return None
    try:
        return CudnnAttention(q, k, v, padded, exact, dtype, device)
    except Exception as problem:
        # Whatever cuDNN raises: torch has kernels for any layout.
        _log_once(str(problem).partition("\n")[0])
        return None


@functools.cache
def _log_once(why: str) -> None:
    log.info("attention uses torch's kernels, which are slower than cuDNN's package: %s", why)


def _tokens_first(shape: tuple[int, ...]) -> Layout:
    """The layout of the network's tensors: tokens before heads."""
    batch, heads, _, width = shape
    return shape, (heads * width, width, batch * heads * width, 1)


@functools.cache
def _handle(device: torch.device) -> int:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()
