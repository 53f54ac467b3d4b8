"""One layer whose adapted weight is formed: its tensors going in and coming out, and where these lie in flat memory.

Legend: O fan_out, I fan_in, R rank.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.weight_norms import FrozenConstants

# Elements to which every tensor made here is aligned.
ALIGNED = 16


@dataclasses.dataclass(frozen=True)
class FormedSpec:
    """One adapted layer.

    weight_OI           frozen W0, contiguous float32, float16 or bfloat16
    params              trained tensors by their names in a file (``AdapterType.parameter_shapes``), contiguous float32
    grads               likewise: raw sums in, gradients out. lora_A holds P2 = (dy L')^T x, lora_B P1 = dy^T (x R'^T),
                        M_xs PM = (dy L')^T (x R'^T), a row magnitude sum_n dy z, a column magnitude sum_n x dx
    scale               strength * alpha / rank
    frozen              of -xs types: the bases U and Q and W0's products with them, contiguous float32, else None
    """

    weight_OI: torch.Tensor
    params: Mapping[str, torch.Tensor]
    grads: Mapping[str, torch.Tensor]
    kind: AdapterType
    scale: float
    frozen: FrozenConstants | None = None

    @property
    def fan_out(self) -> int:
        return self.weight_OI.shape[0]

    @property
    def fan_in(self) -> int:
        return self.weight_OI.shape[1]

    @property
    def rank(self) -> int:
        return self.params["M_xs" if self.kind.xs else "lora_A"].shape[0]

    @property
    def bases(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (self.frozen.left_OR, self.frozen.right_IR) if self.kind.xs else None

    def named(self) -> dict[str, torch.Tensor]:
        """The float32 tensors by their names in the kernels' table."""
        kind, params, grads = self.kind, self.params, self.grads
        if kind.xs:
            left, basis = self.bases
            found = {"left": left, "basis": basis, "core": params["M_xs"], "grad_core": grads["M_xs"]}
            if kind.rows:
                found |= {"row_squares": self.frozen.row_squares_O, "weight_right": self.frozen.weight_right_OR}
            elif kind.cols:
                found |= {"col_squares": self.frozen.col_squares_I, "left_weight": self.frozen.left_weight_RI}
        else:
            found = {"left": params["lora_B"], "right": params["lora_A"]}
            found |= {"grad_left": grads["lora_B"], "grad_right": grads["lora_A"]}
        if kind.rows:
            found |= {"row_magnitude": params[kind.row_magnitude], "grad_row": grads[kind.row_magnitude]}
        if kind.cols:
            found |= {"col_magnitude": params[kind.col_magnitude], "grad_col": grads[kind.col_magnitude]}
        return found

    def tensors(self) -> list[torch.Tensor]:
        """W0 and the float32 tensors."""
        return [self.weight_OI, *self.named().values()]

    def check(self) -> None:
        """Raises ValueError for a tensor of another shape, format or layout than the kernels read."""
        shapes = self.kind.parameter_shapes(self.fan_out, self.fan_in, self.rank)
        expected = {f"params {name}": (self.params[name], shape) for name, shape in shapes.items()}
        expected |= {f"grads {name}": (self.grads[name], shape) for name, shape in shapes.items()}
        if self.kind.xs:
            O, I, R = self.fan_out, self.fan_in, self.rank
            shapes = {"left_OR": (O, R), "right_IR": (I, R), "weight_right_OR": (O, R), "left_weight_RI": (R, I)}
            shapes |= {"row_squares_O": (O,), "col_squares_I": (I,)}
            expected |= {f"frozen {name}": (getattr(self.frozen, name), shape) for name, shape in shapes.items()}
        for name, (tensor, shape) in expected.items():
            if tensor is None or tensor.shape != shape or not tensor.is_contiguous():
                found = None if tensor is None else (tuple(tensor.shape), tensor.stride())
                raise ValueError(f"{self.kind.name}: {name} is {found}, expected contiguous {shape}")
        if not self.weight_OI.is_contiguous():
            raise ValueError(f"{self.kind.name}: the weight has strides {self.weight_OI.stride()}: expected contiguous")


@dataclasses.dataclass(frozen=True)
class FormedLayer:
    """What a layer's passes read, in the format of the products. Their memory stays where it is.

    weight_OI  W' = diag(g~) V diag(h~)    left_OR  L' = diag(g) L    right_RI  R' = R diag(h), or Q^T diag(h) for -xs
    """

    weight_OI: torch.Tensor
    left_OR: torch.Tensor
    right_RI: torch.Tensor


def product_elements(specs: Sequence[FormedSpec]) -> int:
    """How many numbers W', L' and R' of all layers take."""
    return sum(aligned(size) for spec in specs for size in product_sizes(spec).values())


def product_sizes(spec: FormedSpec) -> dict[str, int]:
    """How many numbers each of W', L' and R' has, by their names in the kernels' table."""
    O, I, R = spec.fan_out, spec.fan_in, spec.rank
    return {"formed": O * I, "left_out": O * R, "right_out": R * I}


def aligned(elements: int) -> int:
    """Rounded up, so that what follows is aligned too."""
    return -(-elements // ALIGNED) * ALIGNED


def formed_layer(spec: FormedSpec, memory: torch.Tensor, begin: int) -> tuple[FormedLayer, int]:
    """Views of the flat ``memory`` from element ``begin`` on, and where they end."""
    shapes = (spec.fan_out, spec.fan_in), (spec.fan_out, spec.rank), (spec.rank, spec.fan_in)
    views = []
    for size, shape in zip(product_sizes(spec).values(), shapes, strict=True):
        # Detached they are no views to autograd, which would make a new tensor of each whenever one is kept.
        views.append(memory[begin : begin + size].view(shape).detach())
        begin += aligned(size)
    return FormedLayer(*views), begin
