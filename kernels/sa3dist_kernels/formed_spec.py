"""One layer whose adapted weight is formed: its input and output tensors, and their layout in flat memory.

Legend: O fan_out, I fan_in, R rank.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.weight_norms import FrozenConstants

# Every tensor starts at a multiple of this many elements.
ALIGNED = 16


@dataclasses.dataclass(frozen=True)
class FormedSpec:
    """One adapted layer.

    weight_OI   frozen W0, contiguous, float32, float16 or bfloat16
    params      trained tensors by their names in a file (``AdapterType.parameter_shapes``), contiguous float32
    grads       the same names and shapes: raw sums before FINISH, gradients after it. The raw sums are
                lora_A P2 = (dy L')^T x, lora_B P1 = dy^T (x R'^T), M_xs PM = (dy L')^T (x R'^T), row magnitude
                sum_n dy z, column magnitude sum_n x dx
    scale       strength * alpha / rank
    frozen      -xs types only: the bases U and Q and their products with W0, contiguous float32
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

    def float_tensors(self) -> dict[str, torch.Tensor]:
        """The float32 tensors by their names in the kernels' table (``formed_tiles.FIELDS``)."""
        kind, params, grads = self.kind, self.params, self.grads
        if kind.xs:
            left, basis = self.bases
            tensors = {"left": left, "basis": basis, "core": params["M_xs"], "grad_core": grads["M_xs"]}
            if kind.rows:
                tensors |= {"row_squares": self.frozen.row_squares_O, "weight_right": self.frozen.weight_right_OR}
            elif kind.cols:
                tensors |= {"col_squares": self.frozen.col_squares_I, "left_weight": self.frozen.left_weight_RI}
        else:
            tensors = {"left": params["lora_B"], "right": params["lora_A"]}
            tensors |= {"grad_left": grads["lora_B"], "grad_right": grads["lora_A"]}
        if kind.rows:
            tensors |= {"row_magnitude": params[kind.row_magnitude], "grad_row": grads[kind.row_magnitude]}
        if kind.cols:
            tensors |= {"col_magnitude": params[kind.col_magnitude], "grad_col": grads[kind.col_magnitude]}
        return tensors

    def tensors(self) -> list[torch.Tensor]:
        """W0, then the float32 tensors."""
        return [self.weight_OI, *self.float_tensors().values()]

    def check(self) -> None:
        """Raises ValueError for a tensor whose shape or layout the kernels do not read."""
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
                actual = None if tensor is None else f"of shape {tuple(tensor.shape)} and strides {tensor.stride()}"
                raise ValueError(f"{self.kind.name}: {name} is {actual}, expected contiguous {shape}")
        if not self.weight_OI.is_contiguous():
            raise ValueError(f"{self.kind.name}: the weight has strides {self.weight_OI.stride()}: expected contiguous")


@dataclasses.dataclass(frozen=True)
class FormedLayer:
    """What a layer's forward and backward pass read, in the product dtype. Addresses never change.

    weight_OI  W' = diag(g~) V diag(h~), with gains kept away from zero
    left_OR    L' = diag(g) L
    right_RI   R' = R diag(h); Q^T diag(h) for -xs types
    """

    weight_OI: torch.Tensor
    left_OR: torch.Tensor
    right_RI: torch.Tensor


def product_elements(specs: Sequence[FormedSpec]) -> int:
    """Number of elements of W', L' and R' of all layers, with alignment."""
    return sum(aligned(size) for spec in specs for size in product_sizes(spec).values())


def product_sizes(spec: FormedSpec) -> dict[str, int]:
    """Number of elements of W', L' and R', by their names in the kernels' table."""
    O, I, R = spec.fan_out, spec.fan_in, spec.rank
    return {"formed": O * I, "left_out": O * R, "right_out": R * I}


def aligned(elements: int) -> int:
    """``elements`` rounded up, so that the next tensor is aligned too."""
    return -(-elements // ALIGNED) * ALIGNED


def formed_layer(spec: FormedSpec, memory: torch.Tensor, begin: int) -> tuple[FormedLayer, int]:
    """Views of the flat ``memory`` from element ``begin`` on, and the element behind them."""
    shapes = (spec.fan_out, spec.fan_in), (spec.fan_out, spec.rank), (spec.rank, spec.fan_in)
    views = []
    for size, shape in zip(product_sizes(spec).values(), shapes, strict=True):
        # Detached: autograd would create a new tensor each time a view is saved for backward.
        views.append(memory[begin : begin + size].view(shape).detach())
        begin += aligned(size)
    return FormedLayer(*views), begin
