"""The nine adapter types as one table: what a type rescales, and its trainable tensors."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AdapterType:
    """How a type computes the effective weight W' of a layer from its frozen weight W0 (out, in).

    The update is D = left @ right. Plain types train both factors (lora_B and lora_A). -xs types have frozen singular
    bases U and V and train only the core M: left = U, right = M V^T.

    rows  rescale each row of W0 + scale * D to a trained norm, the row magnitude
    cols  rescale each column; with ``rows``, each column of the row-scaled weight (BoRA)
    xs    train only the small square core M

    Source: spec of the reference file format; DoRA arXiv:2402.09353, BoRA arXiv:2412.06441, LoRA-XS arXiv:2405.17604.
    """

    name: str
    rows: bool = False
    cols: bool = False
    xs: bool = False

    @property
    def row_magnitude(self) -> str | None:
        """Name of the row magnitude in a file, or None."""
        if not self.rows:
            return None
        return "magnitude_r" if self.cols else "magnitude"

    @property
    def col_magnitude(self) -> str | None:
        """Name of the column magnitude in a file, or None."""
        if not self.cols:
            return None
        return "magnitude_c" if self.rows else "magnitude"

    def computes_as(self, other: AdapterType) -> bool:
        """Whether both types compute the same function, as dora and dora-rows do."""
        return (self.rows, self.cols, self.xs) == (other.rows, other.cols, other.xs)

    def parameter_shapes(self, fan_out: int, fan_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's trainable tensors by their names in a file, in storage order."""
        if self.xs:
            shapes: dict[str, tuple[int, ...]] = {"M_xs": (rank, rank)}
        else:
            shapes = {"lora_A": (rank, fan_in), "lora_B": (fan_out, rank)}
        if self.row_magnitude:
            shapes[self.row_magnitude] = (fan_out,)
        if self.col_magnitude:
            shapes[self.col_magnitude] = (fan_in,)
        return shapes


# "dora" is the same as "dora-rows"; existing files use either name.
ADAPTER_TYPES: dict[str, AdapterType] = {
    kind.name: kind
    for kind in (
        AdapterType("lora"),
        AdapterType("dora", rows=True),
        AdapterType("dora-rows", rows=True),
        AdapterType("dora-cols", cols=True),
        AdapterType("bora", rows=True, cols=True),
        AdapterType("lora-xs", xs=True),
        AdapterType("dora-rows-xs", rows=True, xs=True),
        AdapterType("dora-cols-xs", cols=True, xs=True),
        AdapterType("bora-xs", rows=True, cols=True, xs=True),
    )
}
