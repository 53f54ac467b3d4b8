"""What of an update that is small beside a bfloat16 weight reaches a layer's output, by the way of multiplying."""

import functools

import bench_small_adapters as bench
import pytest
import torch

RATIOS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@functools.cache
def measured(name, ratio, moved=False):
    return {row["way"]: row for row in bench.layer_rows(name, ratio, moved, side=192, tokens=128)}


@pytest.mark.parametrize(("name", "moved"), [*((name, False) for name in bench.LAYER_TYPES), ("bora", True)])
def test_formed_weights_are_nowhere_further_from_float64_than_the_references(name, moved):
    for ratio in RATIOS:
        rows = measured(name, ratio, moved)
        for error in ("error", "output_error"):
            assert rows["formed"][error] < 1.05 * rows["reference"][error], (ratio, error)


@pytest.mark.parametrize("name", bench.LAYER_TYPES)
def test_unrounded_sums_of_base_and_branch_are_ten_times_closer_than_a_rounded_weight(name):
    rows = measured(name, 1e-4)
    assert 10 * rows["factored"]["error"] < min(rows["formed"]["error"], rows["reference"]["error"])


@pytest.mark.parametrize("name", bench.LAYER_TYPES)
def test_outputs_of_bfloat16_products_keep_no_more_of_a_small_update_with_factors_than_with_formed_weights(name):
    for ratio in RATIOS:
        rows = measured(name, ratio)
        # Of the smallest updates few outputs change at all: one tenth is chance.
        assert rows["factored"]["kept"] < rows["formed"]["kept"] + 0.1, ratio
    assert measured(name, 1e-4)["factored"]["kept"] < 0.2


@pytest.mark.parametrize("name", bench.LAYER_TYPES)
def test_base_and_branch_that_are_rounded_once_together_keep_the_update(name):
    for ratio in RATIOS[1:]:
        assert measured(name, ratio)[bench.WIDE]["kept"] == pytest.approx(1, abs=0.15), ratio


def test_the_factored_form_differs_from_its_unrounded_sums_by_two_roundings():
    layer = bench.make_layer("bora", 0.1, True, 192)
    x = torch.randn(32, 192, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    in_full, rounded = bench.outputs(layer, x)["factored"]
    assert bench.relative(rounded, in_full) < 2 * torch.finfo(torch.bfloat16).eps


def test_all_ways_of_training_start_from_the_same_loss(tmp_path):
    bench.write_rounded_base(tmp_path)
    (batch,) = bench.make_batches(bench.sa3dist.load_base(tmp_path), 1)
    losses = [bench.train(tmp_path, way, "dora-rows", 1e-4, [batch]).losses.item() for way in bench.WAYS]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.01)
