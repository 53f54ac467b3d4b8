"""The launches of FORM and FINISH over all layers of a model: which kernels a type needs, in which order."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sa3dist_kernels import finish, form
from sa3dist_kernels.formed_layout import Group, Tiles, alignment, default_tiles
from sa3dist_kernels.formed_weights import FormedLayer, FormedSpec
from sa3dist_kernels.triton_support import check_triton, interpreting, loop_end


class TritonForms:
    """Groups of layers that share their launches."""

    def __init__(self, specs: list[FormedSpec], product: torch.dtype, tiles: Tiles | None = None) -> None:
        for spec in specs:
            check_triton(spec.weight_OI)
            if any(tensor.dtype != torch.float32 for tensor in spec.tensors()[1:]):
                raise ValueError("the Triton kernels take float32 trained tensors and bases; use impl='torch'")
        tiles = tiles or default_tiles(specs[0].rank, product)
        self.members: dict[tuple, list[int]] = {}
        for index, spec in enumerate(specs):
            self.members.setdefault(alignment(spec), []).append(index)
        self.groups = [Group([specs[index] for index in of], product, tiles) for of in self.members.values()]
        layers = {}
        for group, of in zip(self.groups, self.members.values(), strict=True):
            layers |= {index: _layer(group, place) for place, index in enumerate(of)}
        self.layers = [layers[index] for index in range(len(specs))]

    def set_specs(self, specs: list[FormedSpec]) -> None:
        for group, of in zip(self.groups, self.members.values(), strict=True):
            scales = [specs[index].scale for index in of]
            if scales != [spec.scale for spec in group.specs]:
                group.scales.copy_(torch.tensor(scales))
            group.specs = [specs[index] for index in of]

    def form(self) -> None:
        for group in self.groups:
            group.refresh()
            for launch in form_plan(group):
                launch.run()

    def finish(self) -> None:
        for group in self.groups:
            group.refresh()
            for launch in finish_plan(group):
                launch.run()


def _layer(group: Group, place: int) -> FormedLayer:
    spec = group.specs[place]
    layer = FormedLayer(
        group.view(place, "formed", spec.fan_out, spec.fan_in),
        group.view(place, "left_out", spec.fan_out, spec.rank),
        group.view(place, "right_out", spec.rank, spec.fan_in),
    )
    if spec.kind.xs and not spec.kind.cols:
        # Q^T does not change.
        layer.right_RI.copy_(spec.right_IR.t())
    return layer


def form_plan(group: Group) -> list[Launch]:
    """The launches of FORM, in order."""
    kind, plan = group.kind, _Plan(group)
    flags = {"ROWS": kind.rows, "COLS": kind.cols, "XS": kind.xs}
    if kind.xs:
        plan.add("core", form.form_core_kernel, "close", _pick(plan.thin, "PRECISION") | plan.close)
    if kind.rows:
        plan.add("rows", form.form_rows_kernel, "rows", plan.rows | flags | {"NORMS": True, "WRITE": not kind.cols})
    if kind.cols:
        plan.add("columns", form.form_columns_kernel, "columns", plan.columns | {"ROWS": kind.rows})
        plan.add("close", form.form_close_kernel, "close", plan.close | plan.spans | {"XS": kind.xs})
    if kind.cols or not kind.rows:
        plan.add("write", form.form_rows_kernel, "rows", plan.rows | flags | {"NORMS": False, "WRITE": True})
    return plan.launches


def finish_plan(group: Group) -> list[Launch]:
    """The launches of FINISH, in order."""
    kind, plan = group.kind, _Plan(group)
    flags = {"ROWS": kind.rows, "COLS": kind.cols, "XS": kind.xs}
    if kind.rows or not kind.xs:
        plan.add("rows", finish.finish_rows_kernel, "rows", plan.rows | flags)
    if kind.rows and not kind.xs:
        plan.add("columns", finish.finish_columns_kernel, "columns", plan.columns)
    if kind.xs:
        plan.add("core", finish.finish_core_kernel, "core", plan.core | _pick(flags, "ROWS", "COLS"))
    if kind.cols or not kind.xs:
        plan.add("close", finish.finish_close_kernel, "close", plan.close | plan.spans | flags)
    return plan.launches


@dataclasses.dataclass(frozen=True)
class Launch:
    name: str
    kernel: Any
    programs: torch.Tensor
    arguments: dict[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs.shape[0],)](**self.arguments)


class _Plan:
    """Collects launches; ``rows``, ``columns``, ``close`` and ``core`` are what their kernels take of sizes."""

    def __init__(self, group: Group) -> None:
        self.group, self.launches = group, []
        tiles, widths = group.tiles, group.widths
        fan_in, fan_out = [spec.fan_in for spec in group.specs], [spec.fan_out for spec in group.specs]
        narrow = _pick(widths, "WIDE_I", "WIDE_T")
        # As exact as the products' own format needs: TF32 has 10 bits beside bfloat16's 7 and float16's 10.
        precision = {"PRECISION": "ieee" if group.product_dtype == torch.float32 else "tf32"}
        step = {"R": group.rank, "RANK_STEP": tiles.rank_step}
        ends = {"LOOP_I": group.most(fan_in)}
        self.thin = {"PRECISION": "ieee" if group.product_dtype == torch.float32 else "tf32x3"}
        self.rows = step | widths | precision | ends | tiles.rows
        self.rows |= {"num_warps": max(tiles.rows["SPLITS"], 4), "num_stages": tiles.row_stages}
        self.columns = step | widths | precision | tiles.columns | {"BOUNDED": not interpreting()}
        self.columns |= {"span": loop_end(group.span)}
        self.columns |= {"num_warps": tiles.column_warps, "num_stages": tiles.column_stages}
        self.close = step | narrow | {"BLOCK_I": tiles.close, "num_warps": 4}
        self.spans = {"LOOP_SPLITS": group.most(group.splits)}
        self.core = step | narrow | self.thin | ends | {"LOOP_O": group.most(fan_out), "BLOCK": tiles.core}
        self.core |= {"num_warps": 4, "num_stages": 3}

    def add(self, name: str, kernel, programs: str, constants: dict[str, Any]) -> None:
        group = self.group
        given = {
            "floats": group.floats,
            "weight": group.weight_base(),
            "product": group.product,
            "scales": group.scales,
            "layers": group.layers,
            "programs": group.programs[programs],
        }
        arguments = _pick(given, *(name for name in given if name in kernel.arg_names))
        self.launches.append(Launch(name, kernel, group.programs[programs], arguments | constants))


def _pick(of: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: of[name] for name in names}
