"""One random adapted layer, its materialised form, and how far two results are apart."""

import torch
import torch.nn.functional as F
from sa3dist_kernels import effective_weight_reference, frozen_constants


def make_layer(kind, tokens, fan_out, fan_in, rank, bias=True, dtype=torch.float64, seed=0):
    """Weight, bias, randomised parameters, frozen constants, input and upstream gradient of one layer."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    weight = normal(fan_out, fan_in)
    # Not orthogonal on purpose: the closed forms must hold for whatever bases a layer has.
    bases = (normal(fan_out, rank), normal(fan_in, rank)) if kind.xs else ()
    params = {
        name: normal(*shape).requires_grad_() for name, shape in kind.parameter_shapes(fan_out, fan_in, rank).items()
    }
    x = normal(tokens, fan_in).requires_grad_()
    constants = frozen_constants(weight, *bases)
    return weight, normal(fan_out) if bias else None, params, constants, x, normal(tokens, fan_out)


def zero_a_row_and_a_column(kind, params):
    """What trained tensors are where row 4 and column 2 of the base are zero: their magnitudes start with 0 too."""
    with torch.no_grad():
        for key, value in params.items():
            if key in ("lora_B", kind.row_magnitude):
                value[4] = 0
            if key == "lora_A":
                value[:, 2] = 0
            if key == kind.col_magnitude:
                value[2] = 0


def materialised(x, weight, bias, params, kind, scale, frozen):
    return F.linear(x, effective_weight_reference(weight, params, kind, scale, frozen), bias)


def values_and_gradients(layer_function, x, params, grad):
    y = layer_function()
    return [y, *torch.autograd.grad(y, [x, *params.values()], grad)]


def relative_error(got, expected):
    scale = expected.norm()
    return float(((got - expected).norm() / scale).detach()) if scale > 0 else float(got.norm().detach())
