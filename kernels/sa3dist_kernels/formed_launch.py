"""The launches of FORM and FINISH: which kernels an adapter type needs, in which order, over all layers of a model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sa3dist_kernels import finish, form, form_resident, form_xs
from sa3dist_kernels.column_sweep import column_sweep_kernel
from sa3dist_kernels.formed_blocks import ColumnTile, ResidentTile, RowTile, Tiles, default_tiles, interpreter_tiles
from sa3dist_kernels.formed_group import Group, group_key
from sa3dist_kernels.formed_spec import FormedSpec, formed_layer
from sa3dist_kernels.triton_support import check_triton, interpreting, launch, loop_end


class TritonForms:
    """FORM and FINISH on the Triton kernels, in groups of layers that share their launches."""

    def __init__(self, specs: list[FormedSpec], memory: torch.Tensor, tiles: Tiles | None = None) -> None:
        for spec in specs:
            check_triton(spec.weight_OI)
            if any(tensor.dtype != torch.float32 for tensor in spec.tensors()[1:]):
                raise ValueError("the Triton kernels take float32 trained tensors and bases; use impl='torch'")
        rank, rows = specs[0].rank, sum(spec.fan_out for spec in specs)
        if tiles is None:
            tiles = interpreter_tiles(rank) if interpreting() else default_tiles(rank, memory.dtype, rows)
        members: dict[tuple, list[int]] = {}
        for index, spec in enumerate(specs):
            members.setdefault(group_key(spec), []).append(index)
        layers, begin = {}, 0
        self.groups = []
        for indices in members.values():
            self.groups.append(Group([specs[index] for index in indices], memory[begin:], tiles))
            for index in indices:
                layers[index], begin = formed_layer(specs[index], memory, begin)
        self.layers = [layers[index] for index in range(len(specs))]

    def form(self) -> None:
        self._run(form_plan)

    def finish(self) -> None:
        self._run(finish_plan)

    def _run(self, make_plan: Callable) -> None:
        for group in self.groups:
            group.refresh()
            if make_plan not in group.plans:
                group.plans[make_plan] = make_plan(group)
        largest, *others = sorted(self.groups, key=lambda group: -len(group.programs["close"]))
        # Groups are independent. All but the largest are a few small layers, too little to occupy a GPU by themselves.
        with _side_stream(largest.device if others else None) as side_stream:
            for planned in largest.plans[make_plan]:
                planned.run()
            with side_stream:
                for group in others:
                    for planned in group.plans[make_plan]:
                        planned.run()


@contextlib.contextmanager
def _side_stream(device: torch.device | None) -> Iterator[contextlib.AbstractContextManager]:
    """Fork a second stream, yield a context that launches on it, and join it at the end."""
    if device is None or device.type != "cuda":
        yield contextlib.nullcontext()
        return
    current, side = torch.cuda.current_stream(device), _second_stream(device)
    side.wait_stream(current)
    yield torch.cuda.stream(side)
    current.wait_stream(side)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def form_plan(group: Group) -> list[Launch]:
    """The launches of FORM, in order."""
    kind, tiles, plan = group.kind, group.tiles, _Plan(group)
    flags = {"ROWS": kind.rows, "COLS": kind.cols, "XS": kind.xs}
    rows = plan.rows(tiles.form_rows) | {"EXACT": plan.exact["PRECISION"]} | flags
    if kind.xs:
        plan.add("core", form_xs.form_core_kernel, "close", plan.close | plan.exact | _pick(flags, "ROWS", "COLS"))
    if "form_resident" in group.programs:
        plan.add("R'", form_resident.form_right_kernel, "close", plan.close)
        plan.add(
            "resident rows", form_resident.form_resident_kernel, "form_resident", plan.resident(tiles.form_resident)
        )
    if kind.rows and "form_rows" in group.programs:
        norms = rows | {"NORMS": True, "WRITE": not kind.cols}
        if kind.xs and kind.cols and tiles.registers:
            # This launch reads no weight.
            norms["maxnreg"] = tiles.registers
        plan.add("rows", form.form_rows_kernel, "form_rows", norms)
    if kind.cols:
        if kind.rows or not kind.xs:
            columns = plan.columns(tiles.form_columns) | {"ROWS": kind.rows, "SLOPED": False}
            plan.add("columns", column_sweep_kernel, "form_columns", columns)
        close = plan.close | plan.loop_splits | plan.exact | _pick(flags, "ROWS", "XS")
        plan.add("close", form.form_close_kernel, "close", close)
    if kind.cols or not kind.rows:
        plan.add("write", form.form_rows_kernel, "form_rows", rows | {"NORMS": False, "WRITE": True})
    return plan.launches


def finish_plan(group: Group) -> list[Launch]:
    """The launches of FINISH, in order."""
    kind, tiles, plan = group.kind, group.tiles, _Plan(group)
    flags = {"ROWS": kind.rows, "COLS": kind.cols, "XS": kind.xs}
    if kind.rows or not kind.xs:
        plan.add("rows", finish.finish_rows_kernel, "finish_rows", plan.rows(tiles.finish_rows) | flags)
    if kind.rows and not kind.xs:
        columns = plan.columns(tiles.finish_columns) | {"ROWS": True, "SLOPED": True}
        plan.add("columns", column_sweep_kernel, "finish_columns", columns)
    if kind.xs:
        plan.add("core", finish.finish_core_kernel, "core", plan.core | _pick(flags, "ROWS", "COLS"))
    if kind.cols or not kind.xs:
        plan.add("close", finish.finish_close_kernel, "close", plan.close | plan.loop_splits | flags)
    return plan.launches


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a plan. A plan is rebuilt whenever an address in it changes.

    compiled   the compiled kernel, cached at the first run (``triton_support.launch``)
    """

    name: str
    kernel: Any
    programs: torch.Tensor
    arguments: dict[str, Any]
    compiled: dict = dataclasses.field(default_factory=dict)

    def run(self) -> None:
        launch(self.kernel, (self.programs.shape[0],), self.arguments, self.compiled)


class _Plan:
    """Collects the launches of one group. Attributes and other methods are constants that kernels have in common."""

    def __init__(self, group: Group) -> None:
        self.group, self.launches = group, []
        float32 = group.product.dtype == torch.float32
        # TF32 suffices for 16-bit products: it has 10 mantissa bits, bfloat16 7, float16 10.
        self.precision = {"PRECISION": "ieee" if float32 else "tf32"}
        self.exact = {"PRECISION": "ieee" if float32 else "tf32x3"}
        # Only the gradient of the norms uses this product, and bfloat16 has float32's range.
        self.narrow = {"NARROW": group.product.dtype == torch.bfloat16, "UPCAST": interpreting()}
        self.step = {"R": group.rank, "RANK_STEP": group.tiles.rank_step}
        self.loop_i = {"LOOP_I": group.loop_bound(spec.fan_in for spec in group.specs)}
        self.loop_splits = {"LOOP_SPLITS": group.loop_bound(group.splits)}
        launch = {"num_warps": 4, "maxnreg": group.tiles.registers}
        small = self.step | _pick(group.alignments, "ALIGN_I", "ALIGN_T") | launch
        self.close = small | {"BLOCK_I": group.tiles.close}
        self.core = small | self.exact | self.loop_i | {"RANK_STEP": group.tiles.core_step, "BLOCK": group.tiles.core}
        self.core |= {"LOOP_O": group.loop_bound(spec.fan_out for spec in group.specs)}

    def rows(self, tile: RowTile) -> dict[str, Any]:
        alignments = self.group.alignments
        blocks = {"BLOCK_O": tile.block_o, "BLOCK_J": tile.block_j, "SPLITS": tile.splits, "STAGES": tile.stages}
        alignments = alignments | {"ALIGN_R": min(alignments["ALIGN_T"], tile.right_vector)}
        launch = {"num_warps": tile.splits, "num_stages": 1, "maxnreg": tile.registers}
        return self.step | alignments | self.precision | self.loop_i | blocks | self.narrow | launch

    def resident(self, tile: ResidentTile) -> dict[str, Any]:
        blocks = {"BLOCK_O": tile.block_o, "SPLITS": tile.splits, "I": self.group.resident_fan_in}
        blocks["UPCAST"] = interpreting()
        launch = {"num_warps": tile.splits, "num_stages": 1}
        return self.step | _pick(self.group.alignments, "ALIGN_W", "ALIGN_T") | blocks | launch

    def columns(self, tile: ColumnTile) -> dict[str, Any]:
        blocks = {"BLOCK_O": tile.block_o, "BLOCK_I": tile.block_i, "STAGES": tile.stages}
        span = {"span": loop_end(self.group.row_span), "BOUNDED": not interpreting()}
        launch = {"num_warps": tile.warps, "num_stages": 1, "maxnreg": tile.registers}
        return self.step | self.group.alignments | self.precision | blocks | span | launch

    def add(self, name: str, kernel, programs: str, constants: dict[str, Any]) -> None:
        group = self.group
        tensors = {
            "floats": group.floats,
            "weight": group.weight,
            "product": group.product,
            "scales": group.scales,
            "layers": group.layers,
            "programs": group.programs[programs],
        }
        arguments = _pick(tensors, *(name for name in tensors if name in kernel.arg_names))
        self.launches.append(Launch(name, kernel, group.programs[programs], arguments | constants))


def _pick(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}
