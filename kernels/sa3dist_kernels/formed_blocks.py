"""Block sizes of FORM's and FINISH's kernels: those for an H100, and small ones for Triton's interpreter."""

from __future__ import annotations

import dataclasses

import torch
import triton

from sa3dist_kernels.formed_tiles import KEPT_WIDTH
from sa3dist_kernels.triton_support import LEAST_BLOCK

# Threads of a warp.
WARP = 32
# Three row programs for each of an H100's 132 multiprocessors.
FEWEST_BLOCKS = 396


@dataclasses.dataclass(frozen=True)
class RowTile:
    """A row program: a block of rows, ``splits`` warps with ``block_j`` columns each.

    registers     of a thread, at most: with 168 three programs of four warps share a multiprocessor
    right_vector  elements of R that a thread loads at once: 8 bytes come through the first-level cache, which then
                  keeps R for all programs of a multiprocessor; 16 bytes go past it
    """

    block_o: int
    block_j: int
    splits: int
    stages: int = 2
    registers: int | None = 168
    right_vector: int = 2


@dataclasses.dataclass(frozen=True)
class ColumnTile:
    """A column program: ``block_i`` columns, steps of ``block_o`` rows.

    narrow   FORM's (diag(g^2) L)^T V, which only the norms' gradient sees, of bfloat16 operands where the products are
    """

    block_o: int
    block_i: int
    warps: int = 4
    stages: int = 3
    narrow: bool = False


@dataclasses.dataclass(frozen=True)
class KeptTile:
    """A row program whose rows stay in registers, ``splits`` warps with 32 columns each.

    numbers   of V that a thread keeps, at most: with 192 it has some 250 registers, and two programs of four warps
              share a multiprocessor. 32 rows of 1536 columns are under way there, 96 KiB that are asked for at once.
              On an H100 2.56 ms for medium; 2.75 where one program of eight warps loads the next rows ahead, 3.10
              where W0 is read twice
    """

    block_o: int = 16
    splits: int = 4
    numbers: int = 192

    def fits(self, fan_in: int) -> bool:
        columns = KEPT_WIDTH * self.splits
        return fan_in % columns == 0 and self.block_o * fan_in // (self.splits * WARP) <= self.numbers


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Blocks of all kernels.

    rank_step       part of the rank held at once
    form_kept       of layers with a row magnitude alone whose rows are kept in registers; None: all go by ``form_rows``
    close           columns of a closing program
    core            rows and columns that the sums of dM step by
    most_rows       rows of one column program: at most, so that the longest is a small part of the launch
    least_programs  that a column launch should have, by shorter spans of rows: four to each of an H100's 132
                    multiprocessors
    """

    rank_step: int
    form_rows: RowTile
    finish_rows: RowTile
    form_columns: ColumnTile
    finish_columns: ColumnTile
    form_kept: KeptTile | None = None
    close: int = 128
    core: int = 64
    most_rows: int = 4096
    least_programs: int = 528


def default_tiles(rank: int, product: torch.dtype, rows: int = 1 << 30) -> Tiles:
    """Tiles for an H100, none of which spills registers (``compile_kernels.py`` shows it).

    rows   of all layers: where they are few, as of a single layer, blocks are smaller, so that all the chip is used
    """
    step = min(triton.next_power_of_2(max(rank, LEAST_BLOCK)), 64)
    if product == torch.float32:
        rows, columns = RowTile(16, 32 if rank <= 32 else 16, 4, registers=None), ColumnTile(16, 64)
        return Tiles(min(step, 32), rows, rows, columns, columns, close=64, core=32)
    if step == 64:
        # R of a layer exceeds the first-level cache anyway.
        past = {"registers": None, "right_vector": 4}
        if rank <= step:
            blocks = RowTile(32, 16, 4, **past), RowTile(16, 32, 4, stages=3, **past)
        else:
            blocks = RowTile(16, 16, 4, **past), RowTile(16, 16, 2, **past)
        return Tiles(step, *blocks, *(ColumnTile(32, 64),) * 2, close=32, core=32)
    columns = ColumnTile(32, 128), ColumnTile(32, 256)
    if step == 32 or product == torch.float16:
        tile = RowTile(32, 32, 4, registers=None)
        return Tiles(step, tile, dataclasses.replace(tile, block_o=512 // step), *columns)
    # Two tiles under way behind the one in work: one would hide the memory's latency but barely.
    tile = RowTile(32 if rows >= 32 * FEWEST_BLOCKS else 16, 32, 4, stages=3, right_vector=4)
    return Tiles(step, tile, tile, *columns, form_kept=KeptTile())


def interpreter_tiles(rank: int) -> Tiles:
    """Small ones, with several steps of the rank and spans of rows already in small layers."""
    step = min(triton.next_power_of_2(max(rank, LEAST_BLOCK)), 32 if rank <= 64 else 128)
    rows, columns = RowTile(16, 16, 2), ColumnTile(16, 32)
    return Tiles(step, rows, rows, columns, columns, close=32, core=16, most_rows=16, least_programs=0)
