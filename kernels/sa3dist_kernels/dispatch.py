"""Whether the Triton kernels can run on a device, and whether they agree with torch there."""

import collections
import dataclasses

import torch

from sa3dist_kernels.formed_spec import FormedLayer, FormedSpec
from sa3dist_kernels.formed_weights import FormedWeights
from sa3dist_kernels.frozen_products import no_autocast
from sa3dist_kernels.raw_sums import LayerPass, raw_sums

# Product dtypes the kernels train in, and the largest relative L2 error against torch in the trial: a few roundings.
# Not float16, whose range is too small for W' with small gains.
TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
# Older GPUs have neither bfloat16 products nor asynchronous copies to shared memory.
MIN_CAPABILITY = (8, 0)
# More than one block of tokens, the last one partly filled.
TRIAL_TOKENS = 19


def obstacle_to(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute products in ``dtype`` on ``device``; None if they can."""
    if device.type != "cuda":
        return "the kernels need a CUDA device"
    if dtype not in TOLERANCES:
        return f"the kernels do not train in {dtype}"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def trial(formed: FormedWeights) -> str | None:
    """Compute two layers of ``formed`` with the kernels and with torch; what went wrong, or None if they agree.

    The kernels run over all layers, as in training, so that nothing is compiled for the trial alone. Compared are the
    smallest layer and the smallest one of the fan_in that most weights have: other kernels may form its rows
    (``form_resident``).
    """
    pairs, weights = list(zip(formed.specs, formed.layers, strict=True)), collections.Counter()
    for spec in formed.specs:
        weights[spec.fan_in] += spec.weight_OI.numel()
    common_fan_in = max(weights, key=weights.__getitem__)
    smallest, smallest_common = (
        min(candidates, key=lambda pair: pair[0].weight_OI.numel())
        for candidates in (pairs, [pair for pair in pairs if pair[0].fan_in == common_fan_in])
    )
    compared = [smallest] if smallest is smallest_common else [smallest, smallest_common]
    problems = (_try_layer(formed, *pair) for pair in compared)
    return next(filter(None, problems), None)


@torch.no_grad()
def _try_layer(formed: FormedWeights, spec: FormedSpec, layer: FormedLayer) -> str | None:
    """Compare one layer with random trained tensors, then restore them and zero its gradients."""
    saved = {name: value.clone() for name, value in spec.params.items()}
    draw = torch.Generator().manual_seed(0)
    try:
        for value in spec.params.values():
            value.copy_(torch.randn(value.shape, generator=draw))
        with no_autocast(layer.weight_OI.device):
            return _disagreement(formed, spec, layer, draw)
    except Exception as problem:
        # Whatever a compiler or driver raises: the caller logs it and continues with torch.
        return f"{type(problem).__name__}: {problem}"
    finally:
        for name, value in saved.items():
            spec.params[name].copy_(value)
            spec.grads[name].zero_()


def _disagreement(formed: FormedWeights, spec: FormedSpec, layer: FormedLayer, draw: torch.Generator) -> str | None:
    """Both sides compute each stage from the kernels' result of the previous one, so only its own rounding differs."""
    product, kind = layer.weight_OI.dtype, spec.kind
    grads = {name: torch.empty_like(value) for name, value in spec.grads.items()}
    plain = FormedWeights([dataclasses.replace(spec, grads=grads)], product, "torch")
    formed.form()
    plain.form()
    x, dy = (
        torch.randn(TRIAL_TOKENS, size, generator=draw).to(layer.weight_OI) for size in reversed(layer.weight_OI.shape)
    )
    z, dx = x @ layer.weight_OI.t(), dy @ layer.weight_OI
    layer_pass = LayerPass(x, dx if kind.cols else None, dy, z if kind.rows else None, layer.left_OR, layer.right_RI)
    (sums,), (expected,) = raw_sums([layer_pass], kind), raw_sums([layer_pass], kind, impl="torch")
    for raw in (spec.grads, grads):
        parts = sums.split([grad.numel() for grad in raw.values()])
        for grad, part in zip(raw.values(), parts, strict=True):
            grad.copy_(part.view_as(grad))
    formed.finish()
    plain.finish()
    pairs = {"W'": (layer.weight_OI, plain.layers[0].weight_OI), "raw sums": (sums, expected)}
    pairs |= {f"gradient of {name}": (spec.grads[name], grad) for name, grad in grads.items()}
    for what, (actual, expected) in pairs.items():
        error = float((actual.float() - expected.float()).norm() / expected.float().norm())
        # Not "error > limit", which is false for NaN.
        if not error <= TOLERANCES[product]:
            return f"{kind.name}: {what} is {error:.1e} from torch's"
    return None
