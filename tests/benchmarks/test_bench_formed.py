"""The benchmark of formed weights at tiny sizes: what it times is right, and it counts what the kernels move."""

import argparse

import pytest
import torch

pytest.importorskip("triton")
import bench_formed  # noqa: E402
from formed_bytes import finish_bytes, form_bytes  # noqa: E402
from sa3dist_kernels import ADAPTER_TYPES, frozen_constants, triton_support  # noqa: E402
from sa3dist_kernels.formed_blocks import default_tiles  # noqa: E402
from sa3dist_kernels.formed_group import Group  # noqa: E402
from sa3dist_kernels.formed_spec import FormedSpec, product_elements  # noqa: E402


@pytest.mark.skipif(not triton_support.interpreting(), reason="Triton was imported without its interpreter")
def test_every_row_holds_the_error_beside_float64_and_the_bytes_of_the_launches():
    options = argparse.Namespace(type=["bora"], rank=[3], dtype="fp32", tiny=True, sweep=False, rounds=1)
    (row,) = bench_formed.rows(options, torch.device("cpu"))
    assert max(row["error"].values()) < 8 * torch.finfo(torch.float32).eps
    weights = sum(4 * fan_out * fan_in * count for (fan_out, fan_in), count in bench_formed.TINY.items())
    # W0 three times and W' once; W0 twice; and, in layers as small as these, as much that is thin.
    assert 4 * weights < row["form_bytes"] < 8 * weights
    assert 2 * weights < row["finish_bytes"] < 6 * weights
    assert "bora          r3" in bench_formed.line(row)


@pytest.mark.parametrize("name", ["dora-rows", "bora"])
def test_every_other_tile_of_a_sweep_differs_from_the_default(name):
    names, tiles = zip(*bench_formed.candidates(ADAPTER_TYPES[name], 16, torch.bfloat16), strict=True)
    assert len(set(names)) == len(names)
    assert all(other != tiles[0] for other in tiles[1:])


def medium_specs(kind, rank):
    specs = []
    for (fan_out, fan_in), count in bench_formed.MEDIUM.items():
        weight = torch.empty(fan_out, fan_in, dtype=torch.bfloat16, device="meta")
        shapes = kind.parameter_shapes(fan_out, fan_in, rank)
        params = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        bases = [torch.empty(side, rank, device="meta") for side in (fan_out, fan_in)]
        specs += [FormedSpec(weight, params, params, kind, 1.0, frozen_constants(weight, *bases))] * count
    return specs


@pytest.mark.parametrize("name", ADAPTER_TYPES)
def test_bytes_moved_are_few_beside_the_reads_and_writes_of_whole_weights(name):
    kind, rank = ADAPTER_TYPES[name], 16
    specs = medium_specs(kind, rank)
    memory = torch.empty(product_elements(specs), dtype=torch.bfloat16, device="meta")
    group = Group(specs, memory, default_tiles(rank, torch.bfloat16))
    weights = sum(spec.weight_OI.nbytes for spec in specs)
    form, finish = (sum(map(sum, count(group).values())) / weights for count in (form_bytes, finish_bytes))
    # W0 is read once and W' written once; once more for the columns' norms, and again for those of BoRA. An -xs type's
    # bases are frozen: of those norms it takes but BoRA's columns from W0.
    bora = kind.rows and kind.cols
    assert 2 <= form <= 2 * (1.2 if kind.xs and not bora else 1.6 if kind.xs else 2.1 if kind.cols else 1.2)
    # No more than W0 once; BoRA twice, and what is thin: the sums alone, in and out, are 4 % at this rank.
    reads = 2 if kind.computes_as(ADAPTER_TYPES["bora"]) else 1
    assert finish <= reads + 0.2


@pytest.mark.parametrize(("name", "kept"), [("dora-rows", 1536), ("dora-rows-xs", 0), ("bora", 0), ("lora", 0)])
def test_rows_of_the_commonest_width_are_kept_and_every_row_has_one_program(name, kept):
    specs = medium_specs(ADAPTER_TYPES[name], 16)
    memory = torch.empty(product_elements(specs), dtype=torch.bfloat16, device="meta")
    tiles = default_tiles(16, torch.bfloat16)
    group = Group(specs, memory, tiles)
    blocks = {"form_resident": tiles.form_resident.block_o, "form_rows": tiles.form_rows.block_o}
    assert group.resident_fan_in == kept
    programs = {block: len(group.programs[table]) for table, block in blocks.items() if table in group.programs}
    expected = dict.fromkeys(programs, 0)
    for spec in specs:
        block = blocks["form_resident" if spec.fan_in == kept else "form_rows"]
        expected[block] += -(-spec.fan_out // block)
    assert programs == expected
