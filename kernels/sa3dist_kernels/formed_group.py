"""The tables of one group of layers: offsets of their tensors, and the block of every program.

A group is what one launch serves: layers of any shapes whose frozen weights have one format and one alignment.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

import torch
import triton

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.formed_blocks import Tiles
from sa3dist_kernels.formed_spec import ALIGNED, FormedSpec, aligned, product_sizes
from sa3dist_kernels.formed_tiles import FIELDS
from sa3dist_kernels.triton_support import interpreting, sent

# Bytes of the longest vector a thread loads.
VECTOR_BYTES = 16
# Rows of one column program: its sums, which it writes, are as many numbers as a few dozen rows.
LEAST_ROWS = 256


class Group:
    """The table of one group. All its tensors lie on one device and stay alive with it.

    Trained tensors, gradients and bases that share a storage move only together; a weight may move alone.

    floats    float32 statistics; the base of every float32 offset
    product   W', L' and R' of all layers
    """

    def __init__(self, specs: Sequence[FormedSpec], memory: torch.Tensor, tiles: Tiles) -> None:
        """memory: flat and in the format of the products; W', L' and R' of the layers fill it from its start."""
        self.tiles, self.product, self.specs = tiles, memory, list(specs)
        self._watched = _moving_apart(specs)
        self.kind: AdapterType = specs[0].kind
        self.rank: int = specs[0].rank
        self.device = specs[0].weight_OI.device
        self.kept_fan = self._kept_fan()
        self.span = self._span()
        self.splits = [triton.cdiv(spec.fan_out, self.span) for spec in specs]
        # Frozen, and so kept apart from the statistics, whose memory others may share.
        self.grams = [_grams(spec) for spec in specs]
        self.owned, count = _offsets([self._float_sizes(index, spec) for index, spec in enumerate(specs)])
        self.floats = torch.empty(count, device=self.device)
        self.formed, _ = _offsets([product_sizes(spec) for spec in specs])
        self.scales = sent([spec.scale for spec in specs], torch.float32, self.device)
        self._make_programs()
        self.addresses: tuple[int, ...] = ()
        # What is launched for a phase; made anew with the table.
        self.plans: dict = {}
        self.refresh()

    def refresh(self) -> None:
        """Make the table anew where a tensor has moved. Raises RuntimeError while a CUDA graph is recorded."""
        addresses = tuple(tensor.data_ptr() for tensor in self._watched)
        if addresses == self.addresses:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a tensor of a formed layer has moved: form() must run once before it is recorded")
        self.addresses, self.widths = addresses, self._widths()
        table = [self._row(index, spec) for index, spec in enumerate(self.specs)]
        self.layers = sent(table, torch.int64, self.device)
        self.plans.clear()

    def keep_statistics_in(self, memory: torch.Tensor) -> None:
        """Move ``floats`` to the start of ``memory``; they are undefined until the next FORM."""
        self.floats = memory[: self.floats.numel()]
        # The table counts from them: no address it was made for holds any more.
        self.addresses = ()

    def weight_base(self) -> torch.Tensor:
        return self.specs[0].weight_OI

    def _widths(self) -> dict[str, int]:
        """What every fan_in, every offset of a weight, and every offset of a trained tensor is a multiple of."""
        bytes_ = self.weight_base().element_size()
        wide = all(_is_wide(spec) for spec in self.specs)
        thin = all(_starts_whole(spec) for spec in self.specs)
        return {
            "WIDE_I": ALIGNED if wide else 1,
            "WIDE_W": VECTOR_BYTES // bytes_ if wide else 1,
            "WIDE_T": VECTOR_BYTES // 4 if thin else 1,
        }

    def most(self, sizes: Iterable[int]) -> int:
        """Where a loop ends that goes by a size from the table: 0, by that size. The interpreter cannot loop to one."""
        return max(sizes) if interpreting() else 0

    def _span(self) -> int:
        blocks = sum(triton.cdiv(spec.fan_in, self.tiles.form_columns.block_i) for spec in self.specs)
        longest = max(spec.fan_out for spec in self.specs)
        span = self.tiles.most_rows
        while span > LEAST_ROWS and blocks * triton.cdiv(longest, span) < self.tiles.least_programs:
            span //= 2
        return span

    def _kept_fan(self) -> int:
        """The fan_in whose layers' rows are kept in registers, of those that fit the one with most numbers; 0: none."""
        tile, fans = self.tiles.form_kept, collections.Counter()
        fitting = self.kind.rows and not (self.kind.cols or self.kind.xs) and self.rank <= self.tiles.rank_step
        if tile is None or not fitting or {self.weight_base().dtype, self.product.dtype} != {torch.bfloat16}:
            return 0
        for spec in self.specs:
            if tile.fits(spec.fan_in) and _is_wide(spec):
                fans[spec.fan_in] += spec.weight_OI.numel()
        return max(fans, key=fans.__getitem__, default=0)

    def _float_sizes(self, index: int, spec) -> dict[str, int]:
        O, I, R = spec.fan_out, spec.fan_in, spec.rank
        sizes = {}
        if self.kind.xs:
            sizes["right"] = R * I
        if self.kind.xs and self.kind.rows:
            sizes["core_gram"] = R * R
        if self.kind.rows:
            sizes |= {"row_gain": O, "row_norm": O, "row_slope": O, "row_cross": O * R}
        if self.kind.cols:
            sizes |= dict.fromkeys(("col_gain", "col_kept", "col_norm", "col_rate"), I) | {"col_cross": R * I}
        # An -xs type reads W0 for the columns' norms of diag(g) V alone.
        swept = self.kind.rows and self.kind.cols if self.kind.xs else self.kind.rows or self.kind.cols
        if swept:
            sizes["partial"] = self.splits[index] * R * I
        if swept and self.kind.cols:
            sizes["partial_squares"] = self.splits[index] * I
        return sizes

    def _row(self, index: int, spec) -> list[int]:
        """The fields of one layer, in their order; 0 for what its type has not."""
        values = {"fan_out": spec.fan_out, "fan_in": spec.fan_in, "splits": self.splits[index]}
        values |= self.owned[index] | self.formed[index]
        values["weight"] = _offset(spec.weight_OI, self.weight_base())
        frozen = spec.named() | self.grams[index]
        values |= {name: _offset(tensor, self.floats) for name, tensor in frozen.items()}
        return [values.get(name, 0) for name in FIELDS]

    def _make_programs(self) -> None:
        tiles, specs = self.tiles, self.specs
        # The longest programs first: what runs alone at the end should be short.
        by_width = sorted(range(len(specs)), key=lambda index: -specs[index].fan_in)
        by_height = sorted(range(len(specs)), key=lambda index: -min(specs[index].fan_out, self.span))
        tallest = sorted(range(len(specs)), key=lambda index: -specs[index].fan_out)
        ranks = range(triton.cdiv(self.rank, tiles.rank_step))

        def blocks(size: int, block: int) -> range:
            return range(triton.cdiv(size, block))

        def rows(block: int, of: Iterable[int] = by_width) -> list:
            return [(at, b, 0) for at in of for b in blocks(specs[at].fan_out, block)]

        def columns(block: int) -> list:
            spans = [(at, split) for at in by_height for split in range(self.splits[at])]
            return [(at, b, split) for at, split in spans for b in blocks(specs[at].fan_in, block)]

        kept = [at for at in by_width if specs[at].fan_in == self.kept_fan]
        programs = {
            "form_kept": rows(tiles.form_kept.block_o, kept) if kept else [],
            "form_rows": rows(tiles.form_rows.block_o, [at for at in by_width if at not in kept]),
            "finish_rows": rows(tiles.finish_rows.block_o),
            "form_columns": columns(tiles.form_columns.block_i),
            "finish_columns": columns(tiles.finish_columns.block_i),
            "close": [(at, b, 0) for at in by_width for b in blocks(specs[at].fan_in, tiles.close)],
            "core": [(at, down, across) for at in tallest for down in ranks for across in ranks],
        }
        # Tables without a program are left out: nothing is launched for them.
        self.programs = {name: sent(table, torch.int32, self.device) for name, table in programs.items() if table}


def _moving_apart(specs: Sequence[FormedSpec]) -> list[torch.Tensor]:
    """The tensors whose addresses tell where all are: every weight, and of the others one for each storage.

    To ask for a thousand addresses takes the host longer than to launch what they are for.
    """
    others = [tensor for spec in specs for tensor in spec.tensors()[1:]]
    by_storage = {tensor.untyped_storage().data_ptr(): tensor for tensor in reversed(others)}
    return [*(spec.weight_OI for spec in specs), *by_storage.values()]


def _grams(spec) -> dict[str, torch.Tensor]:
    """Q^T Q and U^T U of an -xs type, as far as FORM needs them, by their names in the table."""
    if not spec.kind.xs:
        return {}
    # In float64, whatever precision products of float32 have been set to.
    left, right = (base.double() for base in spec.bases)
    grams = {"right_gram": right} if spec.kind.rows else {"left_gram": left} if spec.kind.cols else {}
    return {name: (base.t() @ base).float() for name, base in grams.items()}


def alignment(spec) -> tuple:
    """Layers that differ in this are launched apart."""
    return spec.weight_OI.dtype, _is_wide(spec), _starts_whole(spec)


def _is_wide(spec) -> bool:
    """Whether every row of W0 starts at a whole vector."""
    return spec.fan_in % ALIGNED == 0 and spec.weight_OI.data_ptr() % VECTOR_BYTES == 0


def _starts_whole(spec) -> bool:
    """Whether its trained tensors and bases start at a whole vector."""
    return all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in spec.tensors()[1:])


def _offsets(layers: list[dict[str, int]]) -> tuple[list[dict[str, int]], int]:
    """Where the named memory of each layer begins, in one flat tensor, and how long that is."""
    offsets, end = [], 0
    for sizes in layers:
        offsets.append({})
        for name, size in sizes.items():
            offsets[-1][name] = end
            end += aligned(size)
    return offsets, end


def _offset(tensor: torch.Tensor, base: torch.Tensor) -> int:
    """Elements from the start of ``base`` to that of ``tensor``, which need not share memory."""
    distance = tensor.data_ptr() - base.data_ptr()
    assert distance % tensor.element_size() == 0
    return distance // tensor.element_size()
