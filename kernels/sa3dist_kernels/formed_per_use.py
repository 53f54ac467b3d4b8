"""A single adapted layer on the Triton kernels: W' is formed for each use and dropped.

    forward     FORM, z = x W'^T
    backward    FORM again, dx = dy W', raw sums, FINISH: all gradients of this one micro batch

For callers without ``FormedWeights`` over the layers of a model. Each use builds the kernels' tables on the host, so it
cannot be captured in a CUDA graph.

Legend: N tokens, O fan_out, I fan_in, R rank.
"""

from typing import List, Optional  # noqa: UP035

import torch
from torch import Tensor

from sa3dist_kernels.adapter_types import ADAPTER_TYPES
from sa3dist_kernels.formed_spec import FormedSpec
from sa3dist_kernels.formed_weights import FormedWeights
from sa3dist_kernels.frozen_products import no_autocast
from sa3dist_kernels.raw_sums import LayerPass, raw_sums
from sa3dist_kernels.triton_support import check_triton
from sa3dist_kernels.weight_norms import FrozenConstants

# custom_op infers schemas from annotations and accepts only these spellings.
Maybe, Tensors = Optional[Tensor], List[Tensor]  # noqa: UP006, UP045


def formed_per_use(
    x: Tensor, weight: Tensor, trained: Tensors, kind_name: str, frozen: FrozenConstants | None, scale: float
) -> Tensor:
    """``x @ W'.T`` (N, O), in the dtype of x; gradients reach x and ``trained``.

    x        (N, I), float32, float16 or bfloat16; its dtype is that of the products
    weight   frozen W0, (O, I) or (O, I, 1). This tensor itself is saved and read again in the backward pass
    trained  the type's tensors in the order of ``parameter_shapes``, float32
    frozen   -xs types only, float32

    Raises ValueError if the kernels cannot run. In float16, W' cannot represent gains below 6e-8: their rows and
    columns become zero, and so does the gradient of their magnitudes.
    """
    check_triton(x)
    constants = [value.float() for value in vars(frozen).values()] if ADAPTER_TYPES[kind_name].xs else []
    return _FormedPerUse.apply(x, kind_name, weight, len(constants), scale, *constants, *trained)


class _FormedPerUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind_name, weight, count, scale, *tensors):
        z = formed_product_op(x, tensors[count:], kind_name, weight, tensors[:count], scale)
        saved_z = z if ADAPTER_TYPES[kind_name].rows else None
        ctx.save_for_backward(x, saved_z, weight, *tensors)
        ctx.kind_name, ctx.count, ctx.scale = kind_name, count, scale
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, z, weight, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[5 + ctx.count :]
        layer = tensors[ctx.count :], ctx.kind_name, weight, tensors[: ctx.count], ctx.scale
        gradients = formed_gradients_op(dy.contiguous(), x, z, *layer, needs[0], any(needs[1:]))
        dx, *grads = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
        return dx, None, None, None, None, *[None] * ctx.count, *grads


def _formed(x: Tensor, trained: Tensors, kind_name: str, weight: Tensor, frozen: Tensors, scale: float):
    """The layer's formed weights, in the dtype of x, and the flat vector whose views are its ``grads``."""
    kind, weight_OI = ADAPTER_TYPES[kind_name], weight.detach().flatten(1).contiguous()
    flat = trained[0].new_empty(sum(value.numel() for value in trained), dtype=torch.float32)
    parts = zip(flat.split([value.numel() for value in trained]), trained, strict=True)
    names = list(kind.parameter_shapes(*weight_OI.shape, trained[0].shape[0]))
    params = dict(zip(names, (value.detach().contiguous() for value in trained), strict=True))
    grads = dict(zip(names, (part.view(value.shape) for part, value in parts), strict=True))
    constants = FrozenConstants(*(value.detach().contiguous() for value in frozen)) if kind.xs else None
    formed = FormedWeights([FormedSpec(weight_OI, params, grads, kind, scale, constants)], x.dtype, "triton")
    formed.form()
    return formed, flat


@torch.library.custom_op("sa3dist::formed_product", mutates_args=())
def formed_product_op(
    x: Tensor, trained: Tensors, kind_name: str, weight: Tensor, frozen: Tensors, scale: float
) -> Tensor:
    """``x @ W'.T``."""
    formed, _ = _formed(x, trained, kind_name, weight, frozen, scale)
    with no_autocast(x.device):
        return x @ formed.layers[0].weight_OI.t()


@formed_product_op.register_fake
def _(x, trained, kind_name, weight, frozen, scale):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("sa3dist::formed_gradients", mutates_args=())
def formed_gradients_op(
    dy: Tensor, x: Tensor, z: Maybe, trained: Tensors, kind_name: str, weight: Tensor, frozen: Tensors, scale: float,
    needs_x: bool, needs_trained: bool,
) -> Tensors:  # fmt: skip
    """Gradients of x and of the trained tensors; an empty tensor for each that is not needed."""
    formed, flat = _formed(x, trained, kind_name, weight, frozen, scale)
    layer, kind = formed.layers[0], ADAPTER_TYPES[kind_name]
    with no_autocast(x.device):
        dx = dy @ layer.weight_OI if needs_x or kind.cols else None
        if needs_trained:
            layer_pass = LayerPass(x, dx if kind.cols else None, dy, z, layer.left_OR, layer.right_RI)
            flat.copy_(raw_sums([layer_pass], kind)[0])
            formed.finish()
    # Cloned: results of an operator must not share memory.
    grads = [value.clone() if needs_trained else flat.new_empty(0) for value in formed.specs[0].grads.values()]
    return [dx if needs_x else x.new_empty(0), *grads]


@formed_gradients_op.register_fake
def _(dy, x, z, trained, kind_name, weight, frozen, scale, needs_x, needs_trained):
    grads = (value.new_empty(value.shape if needs_trained else 0, dtype=torch.float32) for value in trained)
    return [x.new_empty(x.shape if needs_x else 0), *grads]
