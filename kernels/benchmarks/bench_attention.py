"""One call of attention, forward and backward, with every available kernel: 2 x 24 heads of 64 in bfloat16, one GPU.

    python kernels/benchmarks/bench_attention.py [--json FILE]

Cases: one clip of 380 s; the same with a filling; a short clip with a filling; queries of 380 s to a prompt. Kernels:
the one training uses (``varlen_attention``), torch's flash attention, cuDNN's for a single clip, and flash-attn-4
(``flash_attn.cute``) if installed. Reported: milliseconds launched and replayed as a graph, host time of a launch,
seconds of the first call, and the distance of output and gradients from float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import interleaved

from sa3dist.model.varlen_attention import varlen_attention

# A differential pair as one call.
PAIRS, HEADS, WIDTH = 2, 24, 64
# Name, tokens, how many of them are filling, tokens of the context (0: self-attention).
CASES = (("one clip", 4155, 0, 0), ("filled", 4155, 455, 0), ("short, filled", 387, 40, 0), ("prompt", 4155, 0, 257))
TINY_CASES = (("one clip", 12, 0, 0), ("filled", 12, 4, 0), ("prompt", 12, 0, 5))
REPEATS = 10

Tensors = list[torch.Tensor]


def ours(q, k, v, grad, q_start, k_start) -> Tensors:
    q_, k_ = (value.unflatten(1, (PAIRS, HEADS)) for value in (q, k))
    # The members of the pair share their values.
    inputs = [value.detach().requires_grad_() for value in (q_, k_, v[:, :HEADS])]
    out = varlen_attention(*inputs, q_start, k_start)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, inputs, grad[:, :HEADS])
    return [out.detach(), grad_q.flatten(1, 2), grad_k.flatten(1, 2), grad_v]


def flash(q, k, v, grad, q_start, k_start) -> Tensors:
    lengths = len(q), len(k)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, q_start, k_start, *lengths, 0.0, False, return_debug_mask=False
    )
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    operands = grad, q, k, v, out, lse, q_start, k_start, *lengths
    return [out, *torch.ops.aten._flash_attention_backward(*operands, 0.0, False, state, state)]


def cudnn(q, k, v, grad, q_start, k_start) -> Tensors:
    q_, k_, v_, grad_ = (value.transpose(0, 1)[None] for value in (q, k, v, grad))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q_, k_, v_, None, True, 0.0, False, False)
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    operands = grad_, q_, k_, v_, out, lse, state, state, None, None, None, len(q), len(k)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(*operands, 0.0, False)
    return [value[0].transpose(0, 1) for value in (out, *gradients)]


def flash_attn_4(q, k, v, grad, q_start, k_start) -> Tensors:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    ends = {"cu_seqlens_q": q_start, "cu_seqlens_k": k_start, "max_seqlen_q": len(q), "max_seqlen_k": len(k)}
    # Releases differ in the results after the first two.
    out, lse, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **ends)
    return [out, *_flash_attn_bwd(q, k, v, out, grad, lse, **ends)[:3]]


def kernels(filling: int, device: torch.device) -> dict[str, Callable[..., Tensors]]:
    available = {"training": ours}
    if device.type == "cuda":
        available |= {"flash": flash} if filling else {"flash": flash, "cudnn": cudnn}
        if importlib.util.find_spec("flash_attn"):
            available["flash-attn-4"] = flash_attn_4
    return available


def reference(q, k, v, grad, filling: int) -> Tensors:
    """In float32, clip and filling separately."""
    inputs = [value.detach().float().requires_grad_() for value in (q, k, v)]
    parts = [value.split([len(value) - filling, filling]) if filling else (value,) for value in inputs]
    outs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in of))[0] for of in zip(*parts, strict=True)
    ]
    out = torch.cat([part.transpose(0, 1) for part in outs])
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.float())]


def compared(results: Tensors, filling: int) -> Tensors:
    """The clip's rows of the pair's difference and of the gradients; those of shared values are summed."""
    out, *others, dv = results
    if out.shape[1] != HEADS:
        out = out[:, :HEADS] - out[:, HEADS:]
        dv = dv.unflatten(1, (PAIRS, HEADS)).sum(1)
    return [value[: len(value) - filling] for value in (out, *others, dv)]


def measure(name: str, tokens: int, filling: int, context: int, device: torch.device, repeats: int) -> list[dict]:
    torch.manual_seed(0)
    own = {"device": device, "dtype": torch.bfloat16}
    q, back = (torch.randn(tokens, heads * HEADS, WIDTH, **own) for heads in (PAIRS, 1))
    # The second member's attention is subtracted from the first's.
    grad = torch.cat([back, -back], dim=1)
    k = torch.randn(context or tokens, PAIRS * HEADS, WIDTH, **own)
    v = torch.randn(context or tokens, HEADS, WIDTH, **own).repeat(1, PAIRS, 1)
    q_ends = [0, tokens - filling, tokens] if filling else [0, tokens]
    q_start = torch.tensor(q_ends, device=device, dtype=torch.int32)
    # Self-attention passes the same tensor twice, as in training.
    ends = q_start, torch.tensor([0, context], device=device, dtype=torch.int32) if context else q_start
    expected, rows = compared(reference(q, k, v, grad, filling), filling), []
    for kernel, function in kernels(filling, device).items():
        row = {"case": name, "tokens": tokens, "filling": filling, "context": context, "kernel": kernel}
        try:
            rows.append(
                row
                | timed(lambda function=function: function(q, k, v, grad, *ends), expected, filling, device, repeats)
            )
        except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as problem:
            # This kernel does not support the case.
            rows.append(row | {"failed": f"{type(problem).__name__}: {problem}"[:300]})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def timed(call: Callable[[], Tensors], expected: Tensors, filling: int, device: torch.device, repeats: int) -> dict:
    begin = time.perf_counter()
    results = compared(call(), filling)
    distances = [
        float((actual.float() - exact).norm() / exact.norm()) for actual, exact in zip(results, expected, strict=True)
    ]
    row = {"first_seconds": round(time.perf_counter() - begin, 2), "distances": [float(f"{x:.1e}") for x in distances]}
    spent = interleaved({"launched": call}, repeats, device, warm_up=2)
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        spent |= interleaved({"graph": graph.replay}, repeats, device, warm_up=2)
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        row["host_ms"] = round(1e3 * (time.perf_counter() - begin) / repeats, 3)
    return row | {f"{how}_ms": round(statistics.median(values), 4) for how, values in spent.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows there, a line each")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds on a CPU: checks the benchmark")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cases = TINY_CASES if options.tiny else CASES
    rows = [row for case in cases for row in measure(*case, device, 2 if options.tiny else REPEATS)]
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
