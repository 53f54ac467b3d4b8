"""Whether the Triton kernels can and do compute a model's adapted layers rightly on its device."""

import collections
import dataclasses
import importlib.util

import torch

from sa3dist_kernels.formed_spec import FormedLayer, FormedSpec
from sa3dist_kernels.formed_weights import FormedWeights
from sa3dist_kernels.frozen_products import no_autocast
from sa3dist_kernels.raw_sums import LayerPass, raw_sums

# Formats training takes the kernels in, and how far they may be from plain torch in each (relative L2): a few
# roundings. float16 has too small a range for W' with small gains.
FORMATS = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
# Below compute capability 8.0 a GPU has neither bfloat16 products nor asynchronous copies to shared memory.
LEAST_CAPABILITY = (8, 0)
# Of the trial: enough for a block of tokens that is not full.
TRIAL_TOKENS = 19


def obstacle_to(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve products in ``dtype`` on ``device``, or None."""
    if device.type != "cuda":
        return "the kernels need a CUDA device"
    if dtype not in FORMATS:
        return f"the kernels do not train in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def trial(formed: FormedWeights) -> str | None:
    """What went wrong when the kernels computed two layers of ``formed``, or None: they agree with torch.

    They run as in training, over all layers, so that nothing is compiled for the trial alone. The layers are the
    smallest one, and that of the width most weights have, whose rows other kernels may form.
    """
    pairs, numbers = list(zip(formed.specs, formed.layers, strict=True)), collections.Counter()
    for spec in formed.specs:
        numbers[spec.fan_in] += spec.weight_OI.numel()
    common = max(numbers, key=numbers.__getitem__)
    tried = [
        min(some, key=lambda pair: pair[0].weight_OI.numel())
        for some in (pairs, [pair for pair in pairs if pair[0].fan_in == common])
    ]
    problems = (_trial_of(formed, *pair) for pair in tried[: 1 if tried[0] is tried[1] else 2])
    return next(filter(None, problems), None)


@torch.no_grad()
def _trial_of(formed: FormedWeights, spec: FormedSpec, layer: FormedLayer) -> str | None:
    """The layer has random tensors meanwhile; its gradients are zeros afterwards."""
    kept = {name: value.clone() for name, value in spec.params.items()}
    draw = torch.Generator().manual_seed(0)
    try:
        for value in spec.params.values():
            value.copy_(torch.randn(value.shape, generator=draw))
        with no_autocast(layer.weight_OI.device):
            return _disagreement(formed, spec, layer, draw)
    except Exception as problem:
        # Whatever a compiler or driver raises: the run goes on with torch, and the caller logs this.
        return f"{type(problem).__name__}: {problem}"
    finally:
        for name, value in kept.items():
            spec.params[name].copy_(value)
            spec.grads[name].zero_()


def _disagreement(formed: FormedWeights, spec: FormedSpec, layer: FormedLayer, draw: torch.Generator) -> str | None:
    """Each stage on what the kernels made in the one before, so that a stage's rounding is all that differs."""
    product, kind = layer.weight_OI.dtype, spec.kind
    grads = {name: torch.empty_like(value) for name, value in spec.grads.items()}
    plain = FormedWeights([dataclasses.replace(spec, grads=grads)], product, "torch")
    formed.form()
    plain.form()
    x, dy = (
        torch.randn(TRIAL_TOKENS, size, generator=draw).to(layer.weight_OI) for size in reversed(layer.weight_OI.shape)
    )
    z, dx = x @ layer.weight_OI.t(), dy @ layer.weight_OI
    given = LayerPass(x, dx if kind.cols else None, dy, z if kind.rows else None, layer.left_OR, layer.right_RI)
    (sums,), (expected,) = raw_sums([given], kind), raw_sums([given], kind, impl="torch")
    for of_layer in (spec.grads, grads):
        parts = sums.split([grad.numel() for grad in of_layer.values()])
        for grad, part in zip(of_layer.values(), parts, strict=True):
            grad.copy_(part.view_as(grad))
    formed.finish()
    plain.finish()
    pairs = {"W'": (layer.weight_OI, plain.layers[0].weight_OI), "raw sums": (sums, expected)}
    pairs |= {f"gradient of {name}": (spec.grads[name], grad) for name, grad in grads.items()}
    for what, (found, wanted) in pairs.items():
        error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
        # Not "error > limit": that is false for a NaN.
        if not error <= FORMATS[product]:
            return f"{kind.name}: {what} is {error:.1e} from torch's"
    return None
