"""Device tables of one group of layers: where each tensor lies, and which block of which layer a program computes.

A group is the layers that one launch serves: any shapes, but one weight dtype and one alignment.
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
from sa3dist_kernels.triton_support import interpreting, to_device

# Bytes of the widest load of a thread.
VECTOR_BYTES = 16
# Fewest rows of a column program. The partial sums it writes are as large as a few dozen rows.
MIN_ROWS = 256


class Group:
    """The layers of one group, their statistics and tables. All tensors are on one device and live as long as it.

    Trained tensors, gradients and bases that share a storage may only move together; a weight may move alone.

    floats    float32 statistics; base of every float32 offset in the table
    product   W', L' and R' of all layers; base of their offsets
    weight    W0 of the first layer; base of the offsets of all W0
    layers    the table: a row of ``FIELDS`` per layer, int64
    programs  by launch: layer, block and split of every program, int32
    """

    def __init__(self, specs: Sequence[FormedSpec], memory: torch.Tensor, tiles: Tiles) -> None:
        """memory: flat buffer in the product dtype; W', L' and R' of the layers fill it from its start."""
        self.tiles, self.product, self.specs = tiles, memory, list(specs)
        self.weight = specs[0].weight_OI
        self._probes = _address_probes(specs)
        self.kind: AdapterType = specs[0].kind
        self.rank: int = specs[0].rank
        self.device = self.weight.device
        self.resident_fan_in = self._choose_resident_fan_in()
        self.row_span = self._choose_row_span()
        self.splits = [triton.cdiv(spec.fan_out, self.row_span) for spec in specs]
        # Apart from the statistics: those may share memory with another group, these are constant.
        self._grams = [_grams(spec) for spec in specs]
        self._float_offsets, count = _offsets([self._float_sizes(index, spec) for index, spec in enumerate(specs)])
        self.floats = torch.empty(count, device=self.device)
        self._product_offsets, _ = _offsets([product_sizes(spec) for spec in specs])
        self.scales = to_device([spec.scale for spec in specs], torch.float32, self.device)
        self._make_programs()
        self.addresses: tuple[int, ...] = ()
        # Launches of FORM and of FINISH, rebuilt with the table.
        self.plans: dict = {}
        self.refresh()

    def refresh(self) -> None:
        """Rebuild the table if a tensor has moved. Raises RuntimeError if that happens during CUDA graph capture."""
        addresses = tuple(tensor.data_ptr() for tensor in self._probes)
        if addresses == self.addresses:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a tensor of a formed layer has moved: run form() once before capturing it in a CUDA graph"
            )
        self.addresses, self.alignments = addresses, self._alignments()
        table = [self._row(index, spec) for index, spec in enumerate(self.specs)]
        self.layers = to_device(table, torch.int64, self.device)
        self.plans.clear()

    def keep_statistics_in(self, memory: torch.Tensor) -> None:
        """Move ``floats`` to the start of ``memory``; they are undefined until the next FORM."""
        self.floats = memory[: self.floats.numel()]
        # Table offsets count from ``floats``: force a rebuild.
        self.addresses = ()

    def _alignments(self) -> dict[str, int]:
        """Kernel constants: divisors of every fan_in (I), offset of a weight (W) and offset of a trained tensor (T)."""
        rows_aligned = all(_rows_aligned(spec) for spec in self.specs)
        params_aligned = all(_params_aligned(spec) for spec in self.specs)
        return {
            "ALIGN_I": ALIGNED if rows_aligned else 1,
            "ALIGN_W": VECTOR_BYTES // self.weight.element_size() if rows_aligned else 1,
            "ALIGN_T": VECTOR_BYTES // 4 if params_aligned else 1,
        }

    def loop_bound(self, sizes: Iterable[int]) -> int:
        """``LOOP`` of ``formed_tiles.loop_to``: the interpreter needs a constant, elsewhere 0."""
        return max(sizes) if interpreting() else 0

    def _choose_row_span(self) -> int:
        """Rows of one column program: halved until the launch has enough programs."""
        blocks = sum(triton.cdiv(spec.fan_in, self.tiles.form_columns.block_i) for spec in self.specs)
        longest = max(spec.fan_out for spec in self.specs)
        span = self.tiles.max_rows
        while span > MIN_ROWS and blocks * triton.cdiv(longest, span) < self.tiles.min_programs:
            span //= 2
        return span

    def _choose_resident_fan_in(self) -> int:
        """The fan_in whose layers ``form_resident`` forms: of those that fit, the one with most weights. 0: none."""
        tile, fans = self.tiles.form_resident, collections.Counter()
        supported = self.kind.rows and not (self.kind.cols or self.kind.xs) and self.rank <= self.tiles.rank_step
        if tile is None or not supported or {self.weight.dtype, self.product.dtype} != {torch.bfloat16}:
            return 0
        for spec in self.specs:
            if tile.fits(spec.fan_in) and _rows_aligned(spec):
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
            sizes |= dict.fromkeys(("col_gain", "col_gain_floored", "col_norm", "col_slope_factor"), I) | {
                "col_cross": R * I
            }
        # Whether ``column_sweep`` runs: for -xs types only for the column norms of diag(g) V.
        swept = self.kind.rows and self.kind.cols if self.kind.xs else self.kind.rows or self.kind.cols
        if swept:
            sizes["partial"] = self.splits[index] * R * I
        if swept and self.kind.cols:
            sizes["partial_squares"] = self.splits[index] * I
        return sizes

    def _row(self, index: int, spec) -> list[int]:
        """One layer's row of the table; 0 for fields its type does not have."""
        values = {"fan_out": spec.fan_out, "fan_in": spec.fan_in, "splits": self.splits[index]}
        values |= self._float_offsets[index] | self._product_offsets[index]
        values["weight"] = _offset(spec.weight_OI, self.weight)
        floats = spec.float_tensors() | self._grams[index]
        values |= {name: _offset(tensor, self.floats) for name, tensor in floats.items()}
        return [values.get(name, 0) for name in FIELDS]

    def _make_programs(self) -> None:
        tiles, specs = self.tiles, self.specs
        # Longest programs first, so that the last ones, which run alone, are short.
        by_width = sorted(range(len(specs)), key=lambda index: -specs[index].fan_in)
        by_height = sorted(range(len(specs)), key=lambda index: -min(specs[index].fan_out, self.row_span))
        tallest = sorted(range(len(specs)), key=lambda index: -specs[index].fan_out)
        ranks = range(triton.cdiv(self.rank, tiles.core_step))

        def blocks(size: int, block: int) -> range:
            return range(triton.cdiv(size, block))

        def rows(block: int, layers: Iterable[int] = by_width) -> list:
            return [(layer, b, 0) for layer in layers for b in blocks(specs[layer].fan_out, block)]

        def columns(block: int) -> list:
            spans = [(layer, split) for layer in by_height for split in range(self.splits[layer])]
            return [(layer, b, split) for layer, split in spans for b in blocks(specs[layer].fan_in, block)]

        resident = [layer for layer in by_width if specs[layer].fan_in == self.resident_fan_in]
        programs = {
            "form_resident": rows(tiles.form_resident.block_o, resident) if resident else [],
            "form_rows": rows(tiles.form_rows.block_o, [layer for layer in by_width if layer not in resident]),
            "finish_rows": rows(tiles.finish_rows.block_o),
            "form_columns": columns(tiles.form_columns.block_i),
            "finish_columns": columns(tiles.finish_columns.block_i),
            "close": [(layer, b, 0) for layer in by_width for b in blocks(specs[layer].fan_in, tiles.close)],
            "core": [(layer, down, across) for layer in tallest for down in ranks for across in ranks],
        }
        # An empty table has no launch.
        self.programs = {name: to_device(table, torch.int32, self.device) for name, table in programs.items() if table}


def _address_probes(specs: Sequence[FormedSpec]) -> list[torch.Tensor]:
    """The tensors whose addresses show whether any has moved: every weight, and one tensor per other storage.

    Asking a thousand tensors for their addresses takes the host longer than the launches.
    """
    others = [tensor for spec in specs for tensor in spec.tensors()[1:]]
    by_storage = {tensor.untyped_storage().data_ptr(): tensor for tensor in reversed(others)}
    return [*(spec.weight_OI for spec in specs), *by_storage.values()]


def _grams(spec) -> dict[str, torch.Tensor]:
    """The Gram matrix of an -xs type's bases that FORM reads, Q^T Q or U^T U, by its name in the table."""
    if not spec.kind.xs:
        return {}
    # float64: independent of torch.set_float32_matmul_precision.
    left, right = (base.double() for base in spec.bases)
    grams = {"right_gram": right} if spec.kind.rows else {"left_gram": left} if spec.kind.cols else {}
    return {name: (base.t() @ base).float() for name, base in grams.items()}


def group_key(spec) -> tuple:
    """Layers with equal keys share a group."""
    return spec.weight_OI.dtype, _rows_aligned(spec), _params_aligned(spec)


def _rows_aligned(spec) -> bool:
    """Whether every row of W0 starts at a multiple of VECTOR_BYTES."""
    return spec.fan_in % ALIGNED == 0 and spec.weight_OI.data_ptr() % VECTOR_BYTES == 0


def _params_aligned(spec) -> bool:
    """Whether all trained tensors and bases start at a multiple of VECTOR_BYTES."""
    return all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in spec.tensors()[1:])


def _offsets(layers: list[dict[str, int]]) -> tuple[list[dict[str, int]], int]:
    """Offsets of each layer's named buffers in one flat tensor, and the tensor's length."""
    offsets, end = [], 0
    for sizes in layers:
        offsets.append({})
        for name, size in sizes.items():
            offsets[-1][name] = end
            end += aligned(size)
    return offsets, end


def _offset(tensor: torch.Tensor, base: torch.Tensor) -> int:
    """Elements from the start of ``base`` to the start of ``tensor``; they need not share a storage."""
    distance = tensor.data_ptr() - base.data_ptr()
    assert distance % tensor.element_size() == 0
    return distance // tensor.element_size()
