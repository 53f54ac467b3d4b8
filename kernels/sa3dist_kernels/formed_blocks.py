"""Block sizes of FORM's and FINISH's kernels: for GPUs, and small ones for Triton's interpreter."""

from __future__ import annotations

import dataclasses

import torch
import triton

from sa3dist_kernels.formed_tiles import RESIDENT_WIDTH
from sa3dist_kernels.triton_support import MAX_REGISTERS, MIN_DOT_SIDE, rank_block

WARP_THREADS = 32
# Three row programs per multiprocessor of an H100, which has 132.
MIN_ROW_PROGRAMS = 396


@dataclasses.dataclass(frozen=True)
class RowTile:
    """A row program: a block of ``block_o`` rows; in each step ``splits`` warps take ``block_j`` columns each.

    registers     limit per thread: with 168, three programs of four warps share a multiprocessor
    right_vector  elements of R per load. Loads of 8 bytes go through the L1 cache, which then serves all programs of a
                  multiprocessor; loads of 16 bytes bypass it
    """

    block_o: int
    block_j: int
    splits: int
    stages: int = 2
    registers: int | None = 168
    right_vector: int = 2


@dataclasses.dataclass(frozen=True)
class ColumnTile:
    """A column program: ``block_i`` columns, in steps of ``block_o`` rows."""

    block_o: int
    block_i: int
    warps: int = 4
    stages: int = 3
    registers: int | None = None


@dataclasses.dataclass(frozen=True)
class ResidentTile:
    """A row program that keeps its rows in registers: ``splits`` warps with 32 columns each.

    values_per_thread   limit on the elements of V in a thread. 192 take about 250 registers, so two programs of four
                        warps share a multiprocessor, with 32 rows of 1536 columns (96 KiB) in flight. On an H100 FORM
                        of the medium model takes 2.56 ms; 2.75 with one program of eight warps that prefetches the next
                        rows, 3.10 where W0 is read twice
    """

    block_o: int = 16
    splits: int = 4
    values_per_thread: int = 192

    def fits(self, fan_in: int) -> bool:
        columns = RESIDENT_WIDTH * self.splits
        return fan_in % columns == 0 and self.block_o * fan_in // (self.splits * WARP_THREADS) <= self.values_per_thread


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Blocks of all kernels.

    rank_step       columns of L and rows of R in a tile
    registers       limit per thread of the kernels that read no weight; None: the compiler's choice
    form_resident   for layers with a row magnitude alone whose rows fit in registers; None: ``form_rows`` forms all
    close           columns of a closing program
    core            rows and columns per step of the sums of dM
    max_rows        rows of one column program: few enough that the longest program is a small part of the launch
    min_programs    programs a column launch should have; ``Group`` shortens the spans of rows to reach it. Four per
                    multiprocessor of an H100
    """

    rank_step: int
    form_rows: RowTile
    finish_rows: RowTile
    form_columns: ColumnTile
    finish_columns: ColumnTile
    form_resident: ResidentTile | None = None
    registers: int | None = None
    close: int = 128
    core: int = 64
    max_rows: int = 4096
    min_programs: int = 528

    @property
    def core_step(self) -> int:
        """Rows and columns of a tile of dM: a thread's part of a larger one exceeds its registers."""
        return min(self.rank_step, 32)


def default_tiles(rank: int, product: torch.dtype, rows: int = 1 << 30) -> Tiles:
    """Tiles chosen on an H100. On no supported GPU do they spill registers or exceed its shared memory.

    ``compile_kernels.py`` checks that.

    product   dtype of the products
    rows      of all layers together: with few, as in a single layer, blocks are smaller, to occupy the whole GPU
    """
    step = rank_block(rank)
    if product == torch.float32:
        rows, columns = RowTile(16, 32 if rank <= 16 else 16, 4, registers=None), ColumnTile(16, 64)
        return Tiles(min(step, 32), rows, rows, columns, columns, close=64, core=32)
    if step == 64:
        # Loads of 16 bytes: R of a layer exceeds the L1 cache anyway.
        if rank <= step:
            form_rows, finish_rows = RowTile(32, 16, 4, 2, MAX_REGISTERS, 4), RowTile(16, 32, 4, 3, None, 4)
        else:
            form_rows, finish_rows = RowTile(16, 16, 4, 2, MAX_REGISTERS, 4), RowTile(16, 16, 2, 2, None, 4)
        columns = ColumnTile(32, 64, registers=MAX_REGISTERS), ColumnTile(32, 64)
        close = 32 if rank <= step else 16
        return Tiles(step, form_rows, finish_rows, *columns, registers=MAX_REGISTERS, close=close, core=32)
    # Of a float32 base, 256 columns and a rank above 16 exceed 99 KiB.
    columns = ColumnTile(32, 128), ColumnTile(32, 256 if step == 16 else 128)
    if step == 32 or product == torch.float16:
        tile = RowTile(32, 32, 4, registers=None)
        finish = dataclasses.replace(tile, block_o=512 // step)
        return Tiles(step, tile, finish, *columns, registers=MAX_REGISTERS, core=32)
    # Three stages: prefetching only one tile barely hides the memory latency.
    tile = RowTile(32 if rows >= 32 * MIN_ROW_PROGRAMS else 16, 32, 4, stages=3, right_vector=4)
    # A partly filled step takes more registers for its masks.
    finish = tile if rank == step else dataclasses.replace(tile, block_o=16)
    return Tiles(step, tile, finish, *columns, form_resident=ResidentTile())


def interpreter_tiles(rank: int) -> Tiles:
    """Tiles so small that small layers already need several rank steps and spans of rows."""
    step = min(triton.next_power_of_2(max(rank, MIN_DOT_SIDE)), 32 if rank <= 64 else 128)
    rows, columns = RowTile(16, 16, 2), ColumnTile(16, 32)
    return Tiles(step, rows, rows, columns, columns, close=32, core=16, max_rows=16, min_programs=0)
