"""The nine adapter types as one table: which norms a type rescales, and where its trainable numbers live."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AdapterType:
    """One way to write the effective weight W' of a layer whose frozen weight W0 is (out, in).

    The update is D = left @ right. Plain types train both factors (lora_B and lora_A); -xs types keep left = U and
    right = M V^T between frozen singular bases and train M alone.

    rows  every row of W0 + scale * D is brought to a trained length (the magnitude of the rows)
    cols  every column is; with ``rows`` also set the columns are those of the row-scaled weight (BoRA)
    xs    the trained core is the small square M

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
        """Whether two names stand for the same maths."""
        return (self.rows, self.cols, self.xs) == (other.rows, other.cols, other.xs)

    def parameter_shapes(self, fan_out: int, fan_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Trainable tensors of one layer, by their names in a file, in the order they are stored."""
        if self.xs:
            shapes: dict[str, tuple[int, ...]] = {"M_xs": (rank, rank)}
        else:
            shapes = {"lora_A": (rank, fan_in), "lora_B": (fan_out, rank)}
        if self.row_magnitude:
            shapes[self.row_magnitude] = (fan_out,)
        if self.col_magnitude:
            shapes[self.col_magnitude] = (fan_in,)
        return shapes


# "dora" computes what "dora-rows" computes; its name lives on in the files that were written under it.
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
