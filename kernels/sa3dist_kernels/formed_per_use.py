"""One adapted layer on the Triton kernels alone: its W' is formed for every use and dropped again.

    forward     FORM, z = x W'^T
    backward    FORM once more, dx = dy W', raw sums, FINISH: every trained tensor's gradient of this one micro batch

For callers that keep no ``FormedWeights`` over the layers of a model; between its uses a layer has no W'. Each use
makes the kernels' table on the host, so that it waits for the device and cannot be recorded in a CUDA graph.

Layouts: N tokens, O fan_out, I fan_in, R rank.
"""

from typing import Optional

import torch
from torch import Tensor

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.formed_weights import FormedSpec, FormedWeights
from sa3dist_kernels.frozen_products import no_autocast
from sa3dist_kernels.raw_sums import raw_sums
from sa3dist_kernels.triton_support import check_triton

# The operators' schemas are read off these annotations, and know no other spelling.
Maybe = Optional[Tensor]  # noqa: UP045


def formed_per_use(x: Tensor, weight: Tensor, trained: list[Maybe], bases: tuple[Maybe, Maybe], scale: float) -> Tensor:
    """``x @ W'.T`` (N, O) in the format of x; gradients reach x and ``trained``.

    x        (N, I), float32, float16 or bfloat16: the format of the products
    weight   frozen W0, (O, I) or (O, I, 1), as its owner holds it: kept like that, and read again in backward
    trained  core (lora_A or M_xs), lora_B, row magnitude, column magnitude, float32; None for what a type has not
    bases    U and Q of an -xs type, float32

    Raises ValueError where no kernel can run. In float16 W' cannot hold gains below 6e-8: their rows and columns are
    zero, and so is their magnitudes' gradient.
    """
    check_triton(x)
    return _FormedPerUse.apply(x, *trained, weight, *bases, scale)


class _FormedPerUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, core, left, magnitude_O, magnitude_I, weight, left_OR, right_IR, scale):
        z = formed_product_op(x, core, left, magnitude_O, magnitude_I, weight, left_OR, right_IR, scale)
        kept = z if magnitude_O is not None else None
        ctx.save_for_backward(x, kept, core, left, magnitude_O, magnitude_I, weight, left_OR, right_IR)
        ctx.scale = scale
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        needs_x, *needs = ctx.needs_input_grad[:5]
        x, z, *rest = ctx.saved_tensors
        found = formed_gradients_op(dy.contiguous(), x, z, *rest, ctx.scale, needs_x, any(needs))
        wanted = zip(found, (needs_x, *needs), strict=True)
        return *(gradient if needed else None for gradient, needed in wanted), None, None, None, None


def _formed(x, params: dict, kind: AdapterType, grads: dict, weight, bases, scale: float) -> FormedWeights:
    """W' of the layer, formed, in the format of x."""
    params = {name: value.detach().contiguous() for name, value in params.items()}
    bases = [None if base is None else base.detach().contiguous() for base in bases]
    weight_OI = weight.detach().flatten(1).contiguous()
    formed = FormedWeights([FormedSpec(weight_OI, params, grads, kind, scale, *bases)], x.dtype, "triton")
    formed.form()
    return formed


def _named(core, left, magnitude_O, magnitude_I) -> tuple[AdapterType, dict[str, Tensor]]:
    """The type that has these trained tensors, and the tensors by name in the order of its ``parameter_shapes``."""
    kind = AdapterType("", rows=magnitude_O is not None, cols=magnitude_I is not None, xs=left is None)
    named = {"M_xs": core} if kind.xs else {"lora_A": core, "lora_B": left}
    named |= {kind.row_magnitude: magnitude_O, kind.col_magnitude: magnitude_I}
    return kind, {name: value for name, value in named.items() if value is not None}


def _views(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for part, (name, value) in zip(parts, like.items(), strict=True)}


def _room(params: dict[str, Tensor]) -> Tensor:
    """For all raw sums, which become the gradients."""
    first = next(iter(params.values()))
    return first.new_empty(sum(value.numel() for value in params.values()), dtype=torch.float32)


@torch.library.custom_op("sa3dist::formed_product", mutates_args=())
def formed_product_op(
    x: Tensor, core: Tensor, left: Maybe, magnitude_O: Maybe, magnitude_I: Maybe, weight: Tensor, left_OR: Maybe,
    right_IR: Maybe, scale: float,
) -> Tensor:  # fmt: skip
    """``x @ W'.T``."""
    kind, params = _named(core, left, magnitude_O, magnitude_I)
    formed = _formed(x, params, kind, _views(_room(params), params), weight, (left_OR, right_IR), scale)
    with no_autocast(x.device):
        return x @ formed.layers[0].weight_OI.t()


@formed_product_op.register_fake
def _(x, core, left, magnitude_O, magnitude_I, weight, left_OR, right_IR, scale):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("sa3dist::formed_gradients", mutates_args=())
def formed_gradients_op(
    dy: Tensor, x: Tensor, z: Maybe, core: Tensor, left: Maybe, magnitude_O: Maybe, magnitude_I: Maybe, weight: Tensor,
    left_OR: Maybe, right_IR: Maybe, scale: float, needs_x: bool, needs_trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, core, lora_B and both magnitudes; a tensor without elements for what nobody asked for."""
    kind, params = _named(core, left, magnitude_O, magnitude_I)
    flat = _room(params)
    grads = _views(flat, params)
    formed = _formed(x, params, kind, grads, weight, (left_OR, right_IR), scale)
    layer = formed.layers[0]
    with no_autocast(x.device):
        dx = dy @ layer.weight_OI if needs_x or kind.cols else x.new_empty(0)
        if needs_trained:
            flat.copy_(raw_sums(x, dx if kind.cols else None, dy, z, layer.left_OR, layer.right_RI, kind))
            formed.finish()
    names = ("M_xs" if kind.xs else "lora_A", "lora_B", kind.row_magnitude, kind.col_magnitude)
    # Copies: results of an operator must not share memory.
    found = (grads[name].clone() if needs_trained and name in grads else flat.new_empty(0) for name in names)
    return dx if needs_x else x.new_empty(0), *found


@formed_gradients_op.register_fake
def _(dy, x, z, core, left, magnitude_O, magnitude_I, weight, left_OR, right_IR, scale, needs_x, needs_trained):
    trained = core, left, magnitude_O, magnitude_I
    found = (core.new_empty(0 if v is None or not needs_trained else v.shape) for v in trained)
    return x.new_empty(x.shape if needs_x else 0), *found
