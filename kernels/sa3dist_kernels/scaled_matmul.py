"""One product for every adapter type and both directions: gains on its two sides and a low-rank update inside.

    product = (left_gain * left) weight + alpha * thin lift        out = out_gain * product + bias

Forward: left is x, weight W0^T, thin lift the update's x R^T L^T, left_gain the columns' gain, out_gain the rows'.
Backward towards x: left is dy, weight W0, thin lift the same two factors from the other side, and the gains swapped.

Two forms. "fused" is one kernel: the gain is multiplied into the tiles of ``left``, the K loop goes on through the
rank, and the rest happens before the tile is stored, so that nothing of size N x M but ``out`` is ever written.
"library" lets the vendor's matrix product write ``product`` and finishes it in place in one pass. Per element the
second form moves two values more, the first needs its tile loop to be as good as the library's: ``tuning`` measures.

Layouts: N tokens, K and M the two sides of the weight, R rank, T rows of the tail.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sa3dist_kernels import tuning
from sa3dist_kernels.triton_support import check_triton, dot, dot_precision, interpreting, loop_end, rank_block

# Tile sizes N, M and K, warps and pipeline stages of the fused form; the library form's tile finishes the product.
LIBRARY = {"form": "library", "block_n": 32, "block_m": 128, "block_k": 0, "warps": 4, "stages": 2}
SQUARE = {"form": "fused", "block_n": 128, "block_m": 128, "block_k": 64, "warps": 8, "stages": 3}
# Few tokens leave too few of the larger tiles to keep every multiprocessor busy.
FEW_TOKENS = {"form": "fused", "block_n": 64, "block_m": 128, "block_k": 64, "warps": 4, "stages": 4}
MANY_TOKENS = {"form": "fused", "block_n": 128, "block_m": 256, "block_k": 64, "warps": 8, "stages": 3}
SINGLE = {"form": "fused", "block_n": 64, "block_m": 64, "block_k": 32, "warps": 4, "stages": 3}
# Sixteen on every side: a test's shapes have several tiles, most of them cut off by an edge.
INTERPRETED = {"form": "fused", "block_n": 16, "block_m": 16, "block_k": 16, "warps": 1, "stages": 1}
# Row blocks that share their columns of the weight while these are in the second-level cache.
GROUP = 8


def scaled_matmul_reference(
    left_NK, weight_KM, thin_NR, lift_RM, alpha, left_gain_K, out_gain_M, bias_M, other_NM, tail_TK
):
    """The maths, in the widest format among the arguments: (out, sums_M, tail_TM)."""
    scaled = left_NK if left_gain_K is None else left_NK * left_gain_K
    dtype = torch.promote_types(torch.promote_types(scaled.dtype, lift_RM.dtype), weight_KM.dtype)
    product = scaled.to(dtype) @ weight_KM.to(dtype) + alpha * (thin_NR.to(dtype) @ lift_RM.to(dtype))
    out = product if out_gain_M is None else product * out_gain_M
    out = out if bias_M is None else out + bias_M
    sums_M = None if other_NM is None else (product * other_NM).sum(0)
    return out, sums_M, None if tail_TK is None else tail_TK.to(dtype) @ weight_KM.to(dtype)


@triton.jit
def add_low_rank(
    acc, n, m, n_mask, m_mask, thin, lift, R, alpha, lift_r, lift_m,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``acc + alpha * thin lift`` for one tile; ``thin`` (N, R) is contiguous, n and m are int64."""
    compute = thin.dtype.element_ty
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        r_mask = r < R
        rows = tl.load(thin + n[:, None] * R + r[None, :], mask=n_mask[:, None] & r_mask[None, :], other=0.0)
        columns = lift + r[:, None].to(tl.int64) * lift_r + m[None, :] * lift_m
        lifted = tl.load(columns, mask=r_mask[:, None] & m_mask[None, :], other=0.0).to(tl.float32)
        acc = dot(rows, (alpha * lifted).to(compute), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def add_product(
    acc, n, m, n_mask, m_mask, left, weight, left_gain, gained, K, weight_k, weight_m,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``acc + (left_gain * left) weight`` for one tile; ``left`` (N, K) is contiguous; no gain where not ``gained``."""
    compute = left.dtype.element_ty
    rows, columns = left + n[:, None] * K, weight + m[None, :] * weight_m
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = (k < K) | EVEN_K
        left_tile = tl.load(rows + k[None, :], mask=n_mask[:, None] & k_mask[None, :], other=0.0)
        weight_offsets = k[:, None].to(tl.int64) * weight_k
        weight_tile = tl.load(columns + weight_offsets, mask=k_mask[:, None] & m_mask[None, :], other=0.0)
        if left_gain is not None:
            gain = tl.where(gained, tl.load(left_gain + k, mask=k_mask, other=0.0), 1.0)
            left_tile = (left_tile.to(tl.float32) * gain[None, :]).to(compute)
        acc = dot(left_tile, weight_tile.to(compute), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _finish(
    acc, n, m, pid_n, thin, lift, out_gain, bias, other, out, sums, N, M, R, alpha, lift_r, lift_m,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Low-rank update, column sums, gain and bias of one tile of the product, and its store."""
    n_mask, m_mask = n < N, m < M
    inside, offsets = n_mask[:, None] & m_mask[None, :], n[:, None] * M + m[None, :]
    acc = add_low_rank(
        acc, n, m, n_mask, m_mask, thin, lift, R, alpha, lift_r, lift_m, BLOCK_R, PRECISION, UPCAST
    )  # fmt: skip
    if sums is not None:
        other_tile = tl.load(other + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + pid_n.to(tl.int64) * M + m, tl.sum(acc * other_tile, axis=0), mask=m_mask)
    if out_gain is not None:
        acc *= tl.load(out_gain + m, mask=m_mask, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + m, mask=m_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _fused_kernel(
    left, weight, left_gain, thin, lift, out_gain, bias, other, tail, out, sums, tail_out,
    N, M, K, R, T, alpha, weight_k, weight_m, lift_r, lift_m,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of ``out``, or of ``tail_out``: the tail's rows are further row blocks, without gain and update."""
    token_blocks = tl.cdiv(N, BLOCK_N)
    row_blocks = token_blocks
    if tail is not None:
        row_blocks += tl.cdiv(T, BLOCK_N)
    pid = tl.program_id(0)
    wide = GROUP * tl.cdiv(M, BLOCK_M)
    first = (pid // wide) * GROUP
    high = min(row_blocks - first, GROUP)
    pid_n, pid_m = first + (pid % wide) % high, (pid % wide) // high

    rows, count, block = left, N, pid_n
    if tail is not None:  # noqa: SIM102 (the first is decided when the kernel is compiled, the second while it runs)
        if pid_n >= token_blocks:
            rows, count, block = tail, T, pid_n - token_blocks
    n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    acc = add_product(
        tl.zeros((BLOCK_N, BLOCK_M), tl.float32), n, m, n < count, m < M, rows, weight, left_gain, pid_n < token_blocks,
        K, weight_k, weight_m, BLOCK_K, EVEN_K, PRECISION, UPCAST,
    )  # fmt: skip
    if pid_n < token_blocks:
        _finish(
            acc, n, m, pid_n, thin, lift, out_gain, bias, other, out, sums, N, M, R, alpha, lift_r, lift_m,
            BLOCK_R, PRECISION, UPCAST,
        )  # fmt: skip
    elif tail is not None:
        tl.store(tail_out + n[:, None] * M + m[None, :], acc, mask=(n < T)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["N"])
def _finish_kernel(
    product, thin, lift, out_gain, bias, other, out, sums, N, M, R, alpha, lift_r, lift_m,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of the library's product, read, finished and stored."""
    pid_n, pid_m = tl.program_id(0), tl.program_id(1)
    n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    acc = tl.load(product + n[:, None] * M + m[None, :], mask=(n < N)[:, None] & (m < M)[None, :], other=0.0).to(
        tl.float32
    )
    _finish(
        acc, n, m, pid_n, thin, lift, out_gain, bias, other, out, sums, N, M, R, alpha, lift_r, lift_m,
        BLOCK_R, PRECISION, UPCAST,
    )  # fmt: skip


def candidates(tokens: int, dtype: torch.dtype, sums: bool = False) -> tuple[dict, ...]:
    """Configurations to choose from; the first is used where nothing may be measured."""
    if interpreting():
        return (INTERPRETED, {**LIBRARY, "block_n": 16, "block_m": 16})
    if dtype == torch.float32:
        return (LIBRARY, SINGLE)
    # With column sums the largest tile does not fit the registers (benchmarks/compile_kernels.py).
    return (LIBRARY, SQUARE, FEW_TOKENS if sums or tokens <= 1024 else MANY_TOKENS)


def _fused(arguments: dict, config: dict) -> None:
    left, weight, lift = arguments["left"], arguments["weight"], arguments["lift"]
    (tokens, K), M = left.shape, weight.shape[1]
    tail_rows = 0 if arguments["tail"] is None else arguments["tail"].shape[0]
    row_blocks = triton.cdiv(tokens, config["block_n"]) + triton.cdiv(tail_rows, config["block_n"])
    _fused_kernel[(row_blocks * triton.cdiv(M, config["block_m"]),)](
        *(arguments[name] for name in ("left", "weight", "left_gain", "thin", "lift", "out_gain", "bias", "other")),
        *(arguments[name] for name in ("tail", "out", "sums", "tail_out")),
        tokens, M, loop_end(K), loop_end(lift.shape[0]), tail_rows, arguments["alpha"],
        *weight.stride(), *lift.stride(),
        BLOCK_N=config["block_n"], BLOCK_M=config["block_m"], BLOCK_K=config["block_k"], GROUP=GROUP,
        BLOCK_R=rank_block(lift.shape[0]), EVEN_K=K % config["block_k"] == 0,
        PRECISION=dot_precision(), UPCAST=interpreting(),
        num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip


def _library(arguments: dict, config: dict) -> None:
    left, weight, lift, tail = (arguments[name] for name in ("left", "weight", "lift", "tail"))
    (tokens, K), M = left.shape, weight.shape[1]
    stacked = left
    if arguments["left_gain"] is not None or tail is not None:
        stacked = left.new_empty(tokens + (0 if tail is None else tail.shape[0]), K)
        if arguments["left_gain"] is None:
            stacked[:tokens] = left
        else:
            torch.mul(left, arguments["left_gain"], out=stacked[:tokens])
        if tail is not None:
            stacked[tokens:] = tail
    product = stacked @ weight.to(left.dtype)
    if tail is not None:
        arguments["tail_out"].copy_(product[tokens:])
    grid = triton.cdiv(tokens, config["block_n"]), triton.cdiv(M, config["block_m"])
    _finish_kernel[grid](
        product,
        *(arguments[name] for name in ("thin", "lift", "out_gain", "bias", "other", "out", "sums")),
        tokens, M, loop_end(lift.shape[0]), arguments["alpha"], *lift.stride(),
        BLOCK_N=config["block_n"], BLOCK_M=config["block_m"], BLOCK_R=rank_block(lift.shape[0]),
        PRECISION=dot_precision(), UPCAST=interpreting(), num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip


FORMS = {"fused": _fused, "library": _library}


def scaled_matmul(
    left_NK: torch.Tensor,
    weight_KM: torch.Tensor,
    thin_NR: torch.Tensor,
    lift_RM: torch.Tensor,
    alpha: float,
    *,
    left_gain_K: torch.Tensor | None = None,
    out_gain_M: torch.Tensor | None = None,
    bias_M: torch.Tensor | None = None,
    other_NM: torch.Tensor | None = None,
    tail_TK: torch.Tensor | None = None,
    config: dict | None = None,
    impl: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``out_gain * ((left_gain * left) @ weight + alpha * thin @ lift) + bias``, and two things that come with it.

    left_NK, thin_NR, tail_TK  contiguous, of one format: float32, float16 or bfloat16, which ``out`` has too
    weight_KM, lift_RM         any strides and float format; rounded to that of ``left`` inside
    gains                      float32; None is one
    other_NM                   asks for ``sums_M``, the column sums of product * other in float32
    tail_TK                    further rows for the weight alone: ``tail @ weight`` in float32
    config                     one of ``candidates``; None asks ``tuning``
    impl                       "triton", or "torch" for the reference

    Returns (out_NM, sums_M or None, tail_TM or None). Not differentiable by itself.
    """
    if impl == "torch":
        found = scaled_matmul_reference(
            left_NK, weight_KM, thin_NR, lift_RM, alpha, left_gain_K, out_gain_M, bias_M, other_NM, tail_TK
        )
        return found[0].to(left_NK.dtype), *found[1:]
    check_triton(left_NK)
    (tokens, K), M = left_NK.shape, weight_KM.shape[1]
    tail_rows = 0 if tail_TK is None else tail_TK.shape[0]
    arguments = {
        "left": left_NK.contiguous(), "weight": weight_KM, "thin": thin_NR.contiguous(), "lift": lift_RM,
        "alpha": alpha, "left_gain": left_gain_K, "out_gain": out_gain_M, "bias": bias_M,
        "other": None if other_NM is None else other_NM.contiguous(),
        "tail": None if tail_TK is None else tail_TK.contiguous(),
        "out": left_NK.new_empty(tokens, M), "sums": None,
        "tail_out": None if tail_TK is None else left_NK.new_empty(tail_rows, M, dtype=torch.float32),
    }  # fmt: skip

    def run(config: dict) -> None:
        if other_NM is not None:
            arguments["sums"] = left_NK.new_empty(triton.cdiv(tokens, config["block_n"]), M, dtype=torch.float32)
        FORMS[config["form"]](arguments, config)

    if config is None:
        given = [name for name in ("left_gain", "out_gain", "other", "tail") if arguments[name] is not None]
        shape = (tuning.bucket(tokens), M, K, rank_block(lift_RM.shape[0]), weight_KM.stride(0) == 1)
        config = tuning.chosen(
            "scaled_matmul", (*shape, *given), left_NK, candidates(tokens, left_NK.dtype, other_NM is not None), run
        )
    run(config)
    sums_M = None if other_NM is None else arguments["sums"].sum(0)
    return arguments["out"], sums_M, arguments["tail_out"]
