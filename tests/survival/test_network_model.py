"""The scaling model: its bytes are those of a ring that is played through, and of the buffers that are really sent."""

import pytest
import torch

from sa3dist.parallel.flat_adamw import FlatAdapters
from sa3dist.parallel.gradient_buckets import BUCKET_ELEMENTS, GradientReduction
from sa3dist.training.trainer import SUMS
from tests.survival import network_model
from tests.survival.network_model import Cluster, Link, Sizes, Transfer

SIZES = Sizes(adapter_elements=6000, base_elements=90000, accumulation=3)


def ring_all_reduce(values):
    """Bytes each rank sends while all of them sum their vectors around a ring; the sums."""
    ranks = len(values)
    parts = [list(value.tensor_split(ranks)) for value in values]
    sent = [0] * ranks
    for phase, reduces in ((0, True), (1, False)):
        for turn in range(ranks - 1):
            # All send at once: what a rank passes on is what it held before this turn.
            held = [[part.clone() for part in own] for own in parts]
            for rank in range(ranks):
                piece = (rank - turn + phase) % ranks
                moved, target = held[rank][piece], parts[(rank + 1) % ranks]
                sent[rank] += moved.numel() * moved.element_size()
                target[piece] = target[piece] + moved if reduces else moved
    return sent, [torch.cat(own) for own in parts]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_counted_bytes_are_those_of_a_ring_that_is_played_through(ranks):
    values = [torch.randn(ranks * 24, dtype=torch.float64) for _ in range(ranks)]
    sent, sums = ring_all_reduce(values)
    for found in sums:
        torch.testing.assert_close(found, torch.stack(values).sum(0))
    counted = network_model.sent_bytes([Transfer("all-reduce", values[0].numel() * 8)], ranks)
    assert sent == [counted] * ranks


def test_data_parallel_sends_the_flat_buffer_once_a_step():
    parameters = {f"layer.{n}": torch.nn.Parameter(torch.randn(n + 2, 5)) for n in range(4)}
    flat = FlatAdapters(parameters, 0.1, 0.0, scalars=len(SUMS))
    reduced = []

    class Group:
        world_size = 2

        def sum_(self, tensor):
            reduced.append(tensor.numel() * tensor.element_size())

    GradientReduction(flat, Group(), "none").finish()
    elements = sum(parameter.numel() for parameter in parameters.values())
    assert reduced == [transfer.whole_bytes for transfer in network_model.ddp(Sizes(elements))]


def test_no_mode_sends_anything_alone_and_a_step_alone_takes_its_computing():
    link = Link(1e9, 1e-5)
    for count in network_model.MODES.values():
        assert network_model.sent_bytes(count(SIZES), ranks=1) == 0
        assert network_model.step_seconds(0.2, count(SIZES), 1, Cluster(8, link, link)) == pytest.approx(0.2)


def test_only_what_is_sent_per_micro_batch_grows_with_accumulation():
    once = Sizes(6000, 90000)
    growth = {
        mode: network_model.sent_bytes(count(SIZES), 4) / network_model.sent_bytes(count(once), 4)
        for mode, count in network_model.MODES.items()
    }
    assert growth["ddp"] == growth["zero-1"] == growth["zero-2"] == 1
    assert 1 < growth["zero-3"] < 3


def test_only_whole_buckets_travel_early():
    assert network_model.BUCKET_ELEMENTS == BUCKET_ELEMENTS
    early, late = network_model.ddp(Sizes(2 * BUCKET_ELEMENTS + 100))
    assert (early.whole_bytes, early.pieces) == (2 * BUCKET_ELEMENTS * 4, 2)
    assert late.whole_bytes == 400 + network_model.SCALAR_BYTES
    # Beside the last backward pass of the step only.
    assert (
        late.beside == 0 < network_model.ddp(Sizes(2 * BUCKET_ELEMENTS, accumulation=4))[0].beside == early.beside / 4
    )


def test_compression_halves_the_gradients_only():
    whole, compressed = (sum(t.whole_bytes for t in network_model.ddp(SIZES, compressed=c)) for c in (False, True))
    assert whole - compressed == SIZES.adapter_elements * 2


def test_a_slower_link_and_more_nodes_never_make_a_step_shorter():
    for count in network_model.MODES.values():
        shares = [
            network_model.efficiency(0.3, count(SIZES), ranks, Cluster(8, Link(1e9, 1e-6), Link(speed, 1e-5)))
            for speed in (1e8, 1e6)
            for ranks in (8, 64, 512)
        ]
        assert shares[:3] == sorted(shares[:3], reverse=True)
        assert all(slow <= fast for fast, slow in zip(shares[:3], shares[3:], strict=True))
        assert all(0 < share <= 1 for share in shares)


def test_a_step_waits_for_what_does_not_overlap_and_for_what_outlasts_the_computing():
    link = Link(1e6, 0.0)
    cluster = Cluster(1, link, link)
    # Two ranks: an all-reduce of 1 MB sends 1 MB from each, a second at this speed.
    assert network_model.step_seconds(0.5, [Transfer("all-reduce", 1e6)], 2, cluster) == pytest.approx(1.5)
    hidden = Transfer("all-reduce", 1e6, beside=0.5)
    assert network_model.step_seconds(2.0, [hidden], 2, cluster) == pytest.approx(2.0)
    assert network_model.step_seconds(1.0, [hidden], 2, cluster) == pytest.approx(1.5)


def test_every_piece_of_a_transfer_waits_for_the_latency():
    cluster = Cluster(1, Link(1.0, 0.0), Link(float("inf"), 1e-3))
    whole, pieces = (Transfer("all-gather", 1e6, pieces=n) for n in (1, 50))
    assert network_model.transfer_seconds(whole, 2, cluster) == pytest.approx(1e-3)
    assert network_model.transfer_seconds(pieces, 2, cluster) == pytest.approx(50e-3)


def test_frames_carry_their_payload_and_the_acknowledgements_of_what_comes_back():
    # 100 full segments, and 50 empty ones for the 100 that arrive.
    payload = 100 * 1448
    assert network_model.ethernet_bytes(payload) == pytest.approx(100 * 1514)
    assert network_model.ethernet_bytes(payload, acknowledged=payload) == pytest.approx(100 * 1514 + 50 * 66)
