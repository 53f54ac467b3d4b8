"""The gradient of a SiLU gate and, if needed, the gate's output again, in one pass.

    [a, g] = z + bias      y = a silu(g)      silu(g) = g sigmoid(g)
    dz = [dy silu(g), dy a sigmoid(g) (1 + g (1 - sigmoid(g)))]

Recomputing y here saves the next layer from keeping it for its raw sums.

Legend: K tokens, G channels of y; z, bias and dz have 2 G.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sa3dist_kernels.operations import define
from sa3dist_kernels.triton_support import check_triton, launch_cached

# Tokens and channels of a tile: with 16-bit operands each thread loads 16 bytes of each.
BLOCK_K, BLOCK_G, WARPS = 4, 512, 8


def gate_gradient(
    dy_KG: torch.Tensor, z_KF: torch.Tensor, bias_F: torch.Tensor | None, values: bool, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of z (K, 2 G) and y (K, G), in the dtype of z; computed in float32 or wider.

    dy_KG, bias_F   in the dtype of z; bias None: zeros
    values          whether to compute y; else None is returned for it
    impl            "triton", "torch", or "auto", which is triton on CUDA
    """
    if impl == "torch" or (impl == "auto" and not z_KF.is_cuda):
        return gate_gradient_reference(dy_KG, z_KF, bias_F, values)
    check_triton(z_KF)
    dy_KG, z_KF = dy_KG.contiguous(), z_KF.contiguous()
    K, G = dy_KG.shape
    dz_KF, y_KG = torch.empty_like(z_KF), torch.empty_like(dy_KG) if values else None
    # The kernel does not touch a missing bias or y; another tensor is passed instead.
    bias, y = z_KF if bias_F is None else bias_F.contiguous(), dz_KF if y_KG is None else y_KG
    arguments = {"dy": dy_KG, "z": z_KF, "bias": bias, "dz": dz_KF, "y": y, "K": K, "G": G}
    arguments |= {"HAS_BIAS": bias_F is not None, "VALUES": values, "BLOCK_K": BLOCK_K, "BLOCK_G": BLOCK_G}
    grid = (triton.cdiv(K, BLOCK_K) * triton.cdiv(G, BLOCK_G),)
    launch_cached(_gate_gradient_kernel, grid, arguments | {"num_warps": WARPS})
    return dz_KF, y_KG


def gate_gradient_reference(dy_KG, z_KF, bias_F, values: bool):
    """``gate_gradient`` in torch."""
    wide = torch.promote_types(z_KF.dtype, torch.float32)
    entering_KF = z_KF.to(wide) if bias_F is None else z_KF.to(wide) + bias_F.to(wide)
    value_KG, gate_KG = entering_KF.chunk(2, dim=-1)
    sigmoid_KG = torch.sigmoid(gate_KG)
    silu_KG, grad_KG = gate_KG * sigmoid_KG, dy_KG.to(wide)
    slope_KG = sigmoid_KG * (1 + gate_KG * (1 - sigmoid_KG))
    dz_KF = torch.cat([grad_KG * silu_KG, grad_KG * value_KG * slope_KG], dim=-1).to(z_KF.dtype)
    return dz_KF, (value_KG * silu_KG).to(z_KF.dtype) if values else None


@triton.jit(do_not_specialize=["K"])
def _gate_gradient_kernel(
    dy, z, bias, dz, y, K,
    G: tl.constexpr, HAS_BIAS: tl.constexpr, VALUES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A block of tokens and of channels of y. Consecutive programs take neighbouring channels."""
    columns: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    k = (tl.program_id(0) // columns * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]
    g = (tl.program_id(0) % columns * BLOCK_G + tl.arange(0, BLOCK_G))[None, :]
    inside = k < K
    if G % BLOCK_G != 0:
        inside = inside & (g < G)
    offsets = k * (2 * G) + g
    value = tl.load(z + offsets, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + offsets + G, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + k * G + g, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        # Loaded as a full tile from the L1 cache: broadcasting a row would go through shared memory.
        biases = tl.broadcast_to(bias + g, (BLOCK_K, BLOCK_G))
        value += tl.load(biases, mask=inside, other=0.0).to(tl.float32)
        gate += tl.load(biases + G, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    format = dz.dtype.element_ty
    tl.store(dz + offsets, (grad * silu).to(format), mask=inside)
    tl.store(dz + offsets + G, (grad * value * (sigmoid * (1 + gate * (1 - sigmoid)))).to(format), mask=inside)
    if VALUES:
        tl.store(y + k * G + g, (value * silu).to(format), mask=inside)


def _gradient(dy, z, bias) -> torch.Tensor:
    return gate_gradient(dy, z, bias, values=False)[0]


def _gradient_shape(dy, z, bias) -> torch.Tensor:
    return z.new_empty(z.shape)


def _gradient_and_values(dy, z, bias):
    return gate_gradient(dy, z, bias, values=True)


def _gradient_and_values_shapes(dy, z, bias) -> tuple[torch.Tensor, torch.Tensor]:
    return z.new_empty(z.shape), z.new_empty(dy.shape)


define("gate_gradient(Tensor dy, Tensor z, Tensor? bias) -> Tensor", _gradient, _gradient_shape)
define(
    "gate_gradient_and_values(Tensor dy, Tensor z, Tensor? bias) -> (Tensor, Tensor)",
    _gradient_and_values,
    _gradient_and_values_shapes,
)
