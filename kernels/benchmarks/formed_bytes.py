"""Counts the bytes that FORM and FINISH move to and from device memory, from what their launches loop over.

L and R of a layer count once, because they stay in the L2 cache. W0 counts each time a launch reads it, even if a
program reads its block of rows twice: an H100 then reads 1.83 GB from memory for a W0 of 0.92 GB.

Legend: O fan_out, I fan_in, R rank.
"""

from __future__ import annotations

import triton
from sa3dist_kernels.formed_group import Group

FLOAT = 4


def form_bytes(group: Group) -> dict[str, tuple[int, int]]:
    """(bytes read, bytes written) of each launch of FORM, by name."""
    return _total(group, _form_layer)


def finish_bytes(group: Group) -> dict[str, tuple[int, int]]:
    """(bytes read, bytes written) of each launch of FINISH, by name."""
    return _total(group, _finish_layer)


def _total(group: Group, count) -> dict[str, tuple[int, int]]:
    total: dict[str, tuple[int, int]] = {}
    for index in range(len(group.specs)):
        for name, (read, written) in count(group, index).items():
            before = total.get(name, (0, 0))
            total[name] = before[0] + read, before[1] + written
    return total


def _sizes(group: Group, index: int) -> tuple[int, ...]:
    """Bytes of W0, L, R, a vector over rows and one over columns; and how often a column launch reads W0."""
    spec = group.specs[index]
    O, I, R = spec.fan_out, spec.fan_in, spec.rank
    steps = triton.cdiv(R, group.tiles.rank_step)
    return O * I * spec.weight_OI.element_size(), FLOAT * O * R, FLOAT * R * I, FLOAT * O, FLOAT * I, steps


def _form_layer(group: Group, index: int) -> dict[str, tuple[int, int]]:
    kind, splits = group.kind, group.splits[index]
    weight, left, right, row, col, steps = _sizes(group, index)
    spec = group.specs[index]
    formed = spec.fan_out * spec.fan_in * group.product.element_size()
    narrow = group.product.element_size() / FLOAT
    thin = int(narrow * left) + (0 if kind.cols or kind.xs else int(narrow * right))
    square = FLOAT * spec.rank**2
    swept = kind.rows or not kind.xs
    counted = {}
    if kind.xs:
        gram = square if kind.rows else 0
        counted["core"] = square + gram + right, gram + right + (0 if kind.cols else int(narrow * right))
    if kind.rows:
        reads = 1 - kind.cols if kind.xs else 1 if kind.cols or spec.fan_in == group.resident_fan_in else 2
        written = left + 2 * row + (0 if kind.cols else formed + thin)
        if group.resident_fan_in:
            counted["R'"] = right, int(narrow * right)
        known = left + row + 2 * square if kind.xs else 0
        counted["rows"] = reads * weight + (right if reads else 0) + left + row + known, written
    if kind.cols and swept:
        gains = row if kind.rows else 0
        counted["columns"] = steps * weight + left + right + gains, splits * (right + col)
    if kind.cols:
        partials = splits * (right + col) if swept else square + 2 * right + col
        counted["close"] = partials + right + col, 4 * col + right + int(narrow * right)
    if kind.cols or not kind.rows:
        gains = (row if kind.rows else 0) + (col if kind.cols else 0)
        counted["write"] = weight + left + right + gains, formed + thin
    return counted


def _finish_layer(group: Group, index: int) -> dict[str, tuple[int, int]]:
    kind, splits = group.kind, group.splits[index]
    weight, left, right, row, col, steps = _sizes(group, index)
    counted = {}
    if kind.rows or not kind.xs:
        read = written = 0 if kind.xs else left
        if kind.cols and (kind.rows or not kind.xs):
            read += weight + left + right + 2 * col
        if kind.rows:
            read, written = read + 3 * row + (0 if kind.xs else left), written + 2 * row
        counted["rows"] = read, written
    if kind.rows and not kind.xs:
        counted["columns"] = steps * weight + left + row + right, splits * right
    if kind.xs:
        core = FLOAT * group.rank**2
        read = core + (steps * 2 * right + 2 * col if kind.cols else 0) + (steps * 2 * left + row if kind.rows else 0)
        counted["core"] = read, core
    if kind.cols or not kind.xs:
        read = written = 0 if kind.xs else right
        if kind.cols:
            read, written = read + 4 * col + (0 if kind.xs else right), written + col
        if kind.rows and not kind.xs:
            read += splits * right
        counted["close"] = read, written
    return counted
