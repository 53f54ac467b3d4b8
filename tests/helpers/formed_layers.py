"""Layers with formed weights: what the kernels see, the same in float64, and checks of one against the other."""

import dataclasses

import torch
from sa3dist_kernels import FrozenConstants, effective_weight_reference, frozen_constants
from sa3dist_kernels.formed_spec import FormedSpec
from sa3dist_kernels.formed_weights import FormedWeights

from tests.helpers.layer_cases import relative_error


@dataclasses.dataclass
class Case:
    """One layer: what the kernels see (float32), the same in float64, and micro batches of (x, dy)."""

    spec: FormedSpec
    batches: list

    def exact(self):
        """W0, trained tensors and bases in float64."""
        spec = self.spec
        params = {name: value.double() for name, value in spec.params.items()}
        bases = None if spec.bases is None else tuple(base.double() for base in spec.bases)
        return spec.weight_OI.double(), params, bases

    def effective(self, params=None):
        weight, exact, bases = self.exact()
        empty = weight.new_empty(0)
        frozen = None if bases is None else FrozenConstants(empty, empty, *bases)
        return effective_weight_reference(weight, params or exact, self.spec.kind, self.spec.scale, frozen)

    def gradients(self, batches=None):
        """By autograd through W', in float64."""
        _, params, _ = self.exact()
        leaves = {name: value.requires_grad_() for name, value in params.items()}
        weight = self.effective(leaves)
        sum(((x @ weight.t()) * dy).sum() for x, dy in batches or self.batches).backward()
        return {name: value.grad for name, value in leaves.items()}

    def formed(self):
        """(g, h, g kept from zero, h kept from zero, L, R, V) in float64."""
        weight, params, bases = self.exact()
        kind, left, right = self.spec.kind, params.get("lora_B"), params.get("lora_A")
        if kind.xs:
            left, right = bases[0], params["M_xs"] @ bases[1].t()
        v = weight + self.spec.scale * left @ right
        g, h = v.new_ones(v.shape[0]), v.new_ones(v.shape[1])
        if kind.rows:
            g = params[kind.row_magnitude] / (v.norm(dim=1) + 1e-12)
        if kind.cols:
            h = params[kind.col_magnitude] / ((g[:, None] * v).norm(dim=0) + 1e-12)
        kept = [
            torch.where(gain.abs() < 2.0**-40, torch.where(gain < 0, -(2.0**-40), 2.0**-40), gain) for gain in (g, h)
        ]
        return g, h, *kept, left, right, v

    def sums(self, batches=None):
        """The raw sums of micro batches, in float64, as a formed layer's passes make them."""
        g, h, g_kept, h_kept, left, right, v = self.formed()
        kind, formed = self.spec.kind, g_kept[:, None] * v * h_kept
        if kind.xs:
            right = self.spec.bases[1].double().t()
        made = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self.spec.grads.items()}
        for x, dy in batches or self.batches:
            inner, outer = x @ (right * h).t(), dy @ (g[:, None] * left)
            if kind.xs:
                made["M_xs"] += outer.t() @ inner
            else:
                made["lora_B"] += dy.t() @ inner
                made["lora_A"] += outer.t() @ x
            if kind.rows:
                made[kind.row_magnitude] += (dy * (x @ formed.t())).sum(0)
            if kind.cols:
                made[kind.col_magnitude] += (x * (dy @ formed)).sum(0)
        return made

    def load(self, sums):
        for name, value in sums.items():
            self.spec.grads[name].copy_(value)


def make_cases(kind, sizes, rank, scale=0.35, weight_dtype=torch.float32, odd=True, tokens=(5, 1, 13), device=None):
    """Layers of several sizes over one flat buffer of trained tensors and one of gradients, as training holds them."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(device or "cpu")

    shapes = [kind.parameter_shapes(*size, rank) for size in sizes]
    count = sum(torch.Size(shape).numel() for named in shapes for shape in named.values())
    # An odd start: nothing may rely on the alignment of what it is given.
    flats = [torch.full((count + 1,), float("nan"), device=device)[1:] for _ in range(2)]
    cases, begin = [], 0
    for (fan_out, fan_in), named in zip(sizes, shapes, strict=True):
        views: list[dict] = [{}, {}]
        for name, shape in named.items():
            for view, flat in zip(views, flats, strict=True):
                view[name] = flat[begin : begin + torch.Size(shape).numel()].view(shape)
            begin += torch.Size(shape).numel()
        params, grads = views
        weight = (normal(fan_out, fan_in) / fan_in**0.5).to(weight_dtype)
        # Not orthogonal on purpose: the equations must hold for whatever bases a layer has.
        bases = (normal(fan_out, rank) / fan_out**0.5, normal(fan_in, rank) / fan_in**0.5) if kind.xs else ()
        for value in params.values():
            value.copy_(normal(*value.shape) / value.shape[-1] ** 0.5)
        if odd:
            weight[0], weight[:, 0] = 0, 0
            for value in (params.get("lora_B"), *bases):
                if value is not None:
                    value[0] = 0
            if not kind.xs:
                params["lora_A"][:, 0] = 0
        batches = [(normal(n, fan_in).double(), normal(n, fan_out).double()) for n in tokens]
        frozen = frozen_constants(weight, *bases) if kind.xs else None
        case = Case(FormedSpec(weight, params, grads, kind, scale, frozen), batches)
        for name in (kind.row_magnitude, kind.col_magnitude):
            if name:
                set_magnitudes(params[name], 1 + 0.2 * normal(*params[name].shape), odd)
        cases.append(case)
    return cases, flats[1]


def set_magnitudes(magnitudes, values, odd):
    """A zero row's is zero (0), and one that is zero (1), negative (2), small (3), below what W' is formed with (4)."""
    magnitudes.copy_(values)
    if odd:
        magnitudes[0], magnitudes[1], magnitudes[2], magnitudes[3], magnitudes[4] = 0, 0, -values[2], 1e-9, 1e-40


def assert_close(got, expected, eps, what):
    error = relative_error(got.double(), expected)
    assert error < 8 * eps, f"{what}: {error / eps:.1f} roundings"


def check_formed(cases, formed, product):
    """W', L' and R' of every layer."""
    eps = torch.finfo(product).eps
    for case, layer in zip(cases, formed.layers, strict=True):
        g, h, g_kept, h_kept, left, right, v = case.formed()
        right = case.spec.bases[1].double().t() if case.spec.kind.xs else right
        assert {value.dtype for value in vars(layer).values()} == {product}
        assert_close(layer.weight_OI, g_kept[:, None] * v * h_kept, eps, "W'")
        assert_close(layer.left_OR, g[:, None] * left, eps, "L'")
        assert_close(layer.right_RI, right * h, eps, "R'")


def check_gradients(cases, dtype=torch.float32):
    eps = torch.finfo(dtype).eps
    for case in cases:
        for name, expected in case.gradients().items():
            got = case.spec.grads[name].double()
            assert_close(got, expected, eps, f"{case.spec.kind.name} {name}")
            if name.startswith("magnitude") and len(expected) > 4:
                # One by one, where the magnitude is zero, 1e-9 or 1e-40.
                for at in (1, 3, 4):
                    assert_close(got[at], expected[at], 8 * eps, f"{case.spec.kind.name} {name}[{at}]")


def check_layers(kind, sizes, rank, product, impl, gradient=torch.float32, device=None, tiles=None):
    """A step of several layers against float64; returns the flat gradient. ``gradient`` sets how close it must come."""
    cases, flat = make_cases(kind, sizes, rank, weight_dtype=product, device=device)
    check_step(cases, product, impl, gradient, tiles)
    return flat


def check_step(cases, product, impl, gradient=torch.float32, tiles=None):
    """FORM and FINISH of ``cases`` against float64."""
    formed = FormedWeights([case.spec for case in cases], product, impl, tiles)
    formed.form()
    check_formed(cases, formed, product)
    for case in cases:
        case.load(case.sums())
    formed.finish()
    check_gradients(cases, gradient)
