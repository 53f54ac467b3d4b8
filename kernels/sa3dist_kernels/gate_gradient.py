"""The gradient of a SiLU gate, and where wanted what the gate gave once more, in one pass.

    [a, g] = z + bias      y = a silu(g)      silu(g) = g sigmoid(g)
    dz = [dy silu(g), dy a sigmoid(g) (1 + g (1 - sigmoid(g)))]

With y made again here, the layer behind the gate need not keep it for the sums of its trained tensors.

Legend: K tokens, G channels of y; z, bias and dz have 2 G.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sa3dist_kernels.operations import define
from sa3dist_kernels.triton_support import check_triton, launch_as_before

# Tokens and channels of a program's tile: in 16 bit, each of its threads loads 16 bytes of every operand.
BLOCK_K, BLOCK_G, WARPS = 4, 512, 8


def gate_gradient(
    dy_KG: torch.Tensor, z_KF: torch.Tensor, bias_F: torch.Tensor | None, values: bool, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of z, (K, 2 G), and y, (K, G), in the format of z; float32 inside, or the wider format of z.

    dy_KG, bias_F   in the format of z; no bias: zeros
    values          False: None in the place of y
    impl            "triton", "torch", or "auto", which is triton on CUDA
    """
    if impl == "torch" or (impl == "auto" and not z_KF.is_cuda):
        return gate_gradient_reference(dy_KG, z_KF, bias_F, values)
    check_triton(z_KF)
    dy_KG, z_KF = dy_KG.contiguous(), z_KF.contiguous()
    K, G = dy_KG.shape
    dz_KF, y_KG = torch.empty_like(z_KF), torch.empty_like(dy_KG) if values else None
    # Of what is not there the kernel reads and writes nothing.
    bias, y = z_KF if bias_F is None else bias_F.contiguous(), dz_KF if y_KG is None else y_KG
    given = {"dy": dy_KG, "z": z_KF, "bias": bias, "dz": dz_KF, "y": y, "K": K, "G": G}
    given |= {"HAS_BIAS": bias_F is not None, "VALUES": values, "BLOCK_K": BLOCK_K, "BLOCK_G": BLOCK_G}
    grid = (triton.cdiv(K, BLOCK_K) * triton.cdiv(G, BLOCK_G),)
    launch_as_before(_gate_gradient_kernel, grid, given | {"num_warps": WARPS})
    return dz_KF, y_KG


def gate_gradient_reference(dy_KG, z_KF, bias_F, values: bool):
    """The maths."""
    wide = torch.promote_types(z_KF.dtype, torch.float32)
    entering_KF = z_KF.to(wide) if bias_F is None else z_KF.to(wide) + bias_F.to(wide)
    value_KG, gate_KG = entering_KF.chunk(2, dim=-1)
    opened_KG = torch.sigmoid(gate_KG)
    silu_KG, grad_KG = gate_KG * opened_KG, dy_KG.to(wide)
    slope_KG = opened_KG * (1 + gate_KG * (1 - opened_KG))
    dz_KF = torch.cat([grad_KG * silu_KG, grad_KG * value_KG * slope_KG], dim=-1).to(z_KF.dtype)
    return dz_KF, (value_KG * silu_KG).to(z_KF.dtype) if values else None


@triton.jit(do_not_specialize=["K"])
def _gate_gradient_kernel(
    dy, z, bias, dz, y, K,
    G: tl.constexpr, HAS_BIAS: tl.constexpr, VALUES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A block of tokens and of channels of y. Consecutive programs have neighbouring channels."""
    columns: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    k = (tl.program_id(0) // columns * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]
    g = (tl.program_id(0) % columns * BLOCK_G + tl.arange(0, BLOCK_G))[None, :]
    inside = k < K
    if G % BLOCK_G != 0:
        inside = inside & (g < G)
    place = k * (2 * G) + g
    value = tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + place + G, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + k * G + g, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        # As large as the tile, from the first-level cache: a row of it would be handed around in shared memory.
        biases = tl.broadcast_to(bias + g, (BLOCK_K, BLOCK_G))
        value += tl.load(biases, mask=inside, other=0.0).to(tl.float32)
        gate += tl.load(biases + G, mask=inside, other=0.0).to(tl.float32)
    opened = tl.sigmoid(gate)
    silu = gate * opened
    format = dz.dtype.element_ty
    tl.store(dz + place, (grad * silu).to(format), mask=inside)
    tl.store(dz + place + G, (grad * value * (opened * (1 + gate * (1 - opened)))).to(format), mask=inside)
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
