"""Norms found once and shared: the same values and gradients as without, and never those of other trained tensors."""

import copy
from types import SimpleNamespace

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES, NormCache, adapted_linear, weight_norms
from torch.utils.checkpoint import checkpoint

from sa3dist.adapters import adapted_layers, adapter_parameters, attach_adapter
from sa3dist.adapters.layers import cached_norms
from sa3dist.parallel.flat_adamw import FlatAdapters
from tests.helpers.adapter_base import RecordedBase, forward_inputs, move
from tests.helpers.layer_cases import make_layer, materialised, relative_error

# On the torch path their norms come out of each main product, so that bits do not depend on the accumulation.
APPENDED = ("dora", "dora-rows")
SCALED = tuple(name for name, kind in ADAPTER_TYPES.items() if kind.rows or kind.cols)


@pytest.fixture
def norms_found(monkeypatch):
    """Counts how often norms of rows and of columns are worked out, wherever that is: all of them end in this one."""
    count = SimpleNamespace(of_rows=0, of_cols=0)
    find_gain = weight_norms._gain

    def counted(magnitude, squares):
        count.of_rows += squares.shape[0] == 9
        count.of_cols += squares.shape[0] == 7
        return find_gain(magnitude, squares)

    monkeypatch.setattr(weight_norms, "_gain", counted)
    return count


@pytest.mark.parametrize("name", SCALED)
def test_accumulated_gradients_with_shared_norms_are_those_of_the_materialised_form_in_float64(name, norms_found):
    kind, cache = ADAPTER_TYPES[name], NormCache()
    weight, bias, params, frozen, _, _ = make_layer(kind, 1, 9, 7, 3)
    batches = [make_layer(kind, tokens, 9, 7, 3, seed=tokens)[-2:] for tokens in (5, 1, 8)]

    def accumulated(layer):
        found = [torch.autograd.grad(layer(x), [x, *params.values()], dy) for x, dy in batches]
        return [x for x, *_ in found] + [sum(column) for column in list(zip(*found, strict=True))[1:]]

    shared = accumulated(lambda x: adapted_linear(x, weight, bias, params, kind, 0.7, frozen=frozen, norm_cache=cache))
    times = 3 if name in APPENDED else 1
    assert (norms_found.of_rows, norms_found.of_cols) == (times * kind.rows, times * kind.cols)
    expected = accumulated(lambda x: materialised(x, weight, bias, params, kind, 0.7, frozen))
    assert max(map(relative_error, shared, expected)) < 1e-12


@pytest.mark.parametrize("name", SCALED)
def test_a_changed_tensor_scale_or_format_is_noticed(name):
    kind, cache = ADAPTER_TYPES[name], NormCache()
    weight, bias, params, frozen, x, _ = make_layer(kind, 5, 9, 7, 3)

    def both(scale=0.7, x=x):
        own = [adapted_linear(x, weight, bias, params, kind, scale, frozen=frozen, norm_cache=m) for m in (cache, None)]
        return [y.detach().double() for y in own]

    for key in params:
        torch.testing.assert_close(*both(), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            params[key].mul_(1.5)
        torch.testing.assert_close(*both(), rtol=1e-12, atol=1e-12)
        params[key] = params[key].detach().mul(0.8).requires_grad_()
        torch.testing.assert_close(*both(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*both(scale=-0.4), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*both(x=x.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCALED)
def test_recomputed_passes_share_the_norms_and_give_the_same_bits(name, norms_found):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, dy = make_layer(kind, 5, 9, 7, 3, dtype=torch.float32)
    found = []
    for cache in (None, NormCache()):
        for recompute in (False, True):

            def layer(x, cache=cache):
                return adapted_linear(x, weight, bias, params, kind, 0.7, frozen=frozen, norm_cache=cache)

            y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
            found.append([y, *torch.autograd.grad(y, [x, *params.values()], dy)])
    assert all(all(map(torch.equal, other, found[0])) for other in found[1:])
    times = 6 if name in APPENDED else 4
    assert norms_found.of_rows + norms_found.of_cols == times * (kind.rows + kind.cols)


@pytest.mark.parametrize("within", [False, True])
def test_layers_see_what_a_flat_optimiser_writes_after_and_within_the_stretch(within):
    base = RecordedBase()
    attach_adapter(base, "dora-cols", rank=3)
    move(base)
    flat = FlatAdapters(adapter_parameters(base), learning_rate=0.1, weight_decay=0.0, scalars=0)
    inputs = forward_inputs(base)
    for _ in range(2):
        with cached_norms(adapted_layers(base).values()):
            first = base(*inputs)
            assert torch.equal(base(*inputs), first)
            first.square().sum().backward()
            if within:
                flat.step()
                stepped = base(*inputs)
        if not within:
            flat.step()
            stepped = base(*inputs)
        assert not torch.allclose(stepped, first, rtol=1e-3)
        with cached_norms(adapted_layers(base).values()):
            torch.testing.assert_close(base(*inputs), stepped)
            torch.testing.assert_close(copy.deepcopy(base)(*inputs), stepped)
