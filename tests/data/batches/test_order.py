"""Who trains on what: exactly once per epoch, whatever ranks, workers, batches and buckets, resumable at any step."""

import itertools
import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3dist.data.batches.loader import MicroBatches, loader, micro_indices
from sa3dist.data.batches.micro_batch import SampleSettings
from sa3dist.data.batches.order import ClipOrder, clip_order, epoch_order, micro_batch_slots
from sa3dist.data.latents.cache import ClipLatents
from sa3dist.formats import ClipEntry
from tests.helpers.golden import ROOT

SIZES = [4, 5, 17, 64, 1000]
WORLDS = [1, 2, 3, 4, 8]
WORKERS = [0, 1, 2, 3]
MICRO_BATCHES = [1, 2, 3]
WINDOWS = [1, 2, 16]


def lengths_of(clips, seed=5):
    return torch.randint(1, 400, (clips,), generator=torch.Generator().manual_seed(seed)).tolist()


def dealt_to_workers(indices, workers):
    """The order in which a loader's processes make the micro batches of one rank, and the order they come back in."""
    made = [indices[worker::workers] for worker in range(workers)] if workers else [indices]
    return made, [made[position % len(made)][position // len(made)] for position in range(len(indices))]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("clips", SIZES)
def test_ranks_and_workers_partition_the_slots(clips, world):
    for micro_batch in MICRO_BATCHES:
        steps = math.ceil(2 * clips / (world * micro_batch))
        for workers in WORKERS:
            taken = []
            for dist_rank in range(world):
                indices = list(micro_indices(range(1, steps + 1), 1, dist_rank, world))
                # No rank ever runs out, and none does more than another.
                assert len(indices) == steps
                made, returned = dealt_to_workers(indices, workers)
                assert returned == indices
                taken += [slot for part in made for index in part for slot in micro_batch_slots(index, micro_batch)]
            assert sorted(taken) == list(range(steps * world * micro_batch))


@pytest.mark.parametrize("clips", SIZES)
def test_every_epoch_holds_every_clip_once(clips):
    for micro_batch in MICRO_BATCHES:
        for window in WINDOWS:
            order = clip_order(3, lengths_of(clips), micro_batch, window)
            used = [order.clip_of_slot(slot) for slot in range(2 * clips)]
            assert sorted(used[:clips]) == sorted(used[clips:]) == list(range(clips))


@given(
    clips=st.sampled_from(SIZES),
    split=st.sampled_from([(1, 6), (2, 3), (3, 2), (6, 1)]),
    micro_batch=st.sampled_from(MICRO_BATCHES),
    window=st.sampled_from(WINDOWS),
    first=st.integers(1, 30),
    more=st.integers(0, 20),
)
@settings(deadline=None, max_examples=60)
def test_resuming_at_any_step_at_any_split_continues_the_same_clips(clips, split, micro_batch, window, first, more):
    def clips_of_steps(begin, world, accumulation):
        # A fresh order, as a restarted process makes it.
        order = clip_order(9, lengths_of(clips), micro_batch, window)
        return [
            sorted(
                order.clip_of_slot(slot)
                for dist_rank in range(world)
                for index in micro_indices([step], accumulation, dist_rank, world)
                for slot in micro_batch_slots(index, micro_batch)
            )
            for step in range(begin, first + more + 1)
        ]

    assert clips_of_steps(1, 1, 6)[first - 1 :] == clips_of_steps(first, *split)


@given(st.integers(1, 30), st.integers(0, 20), st.sampled_from([(1, 4), (2, 2), (4, 1)]))
@settings(deadline=None, max_examples=30)
def test_resuming_continues_every_ranks_own_micro_batches(first, more, split):
    world, accumulation = split
    whole = [list(micro_indices(range(1, first + more + 1), accumulation, rank, world)) for rank in range(world)]
    tail = [list(micro_indices(range(first, first + more + 1), accumulation, rank, world)) for rank in range(world)]
    assert [rows[(first - 1) * accumulation :] for rows in whole] == tail


def test_a_steps_micro_batches_are_the_same_set_for_every_split_of_ranks_and_accumulation():
    def of_step(step, world, accumulation):
        return {i for rank in range(world) for i in micro_indices([step], accumulation, rank, world)}

    for step in (1, 2, 9):
        assert of_step(step, 1, 4) == of_step(step, 2, 2) == of_step(step, 4, 1)


@pytest.mark.parametrize("window", WINDOWS)
def test_epochs_and_seeds_differ_in_order(window):
    lengths = lengths_of(17)
    orders = {tuple(clip_order(1, lengths, 2, window).epoch(epoch).tolist()) for epoch in range(6)}
    orders |= {tuple(clip_order(seed, lengths, 2, window).epoch(0).tolist()) for seed in range(2, 8)}
    assert len(orders) == 12


@pytest.mark.parametrize("clips", [64, 1000, 1001])
def test_buckets_cut_the_padding_and_keep_micro_batches_in_random_order(clips):
    lengths = lengths_of(clips)

    def padded_share(order):
        total = padded = 0
        for index in range(3 * clips // 8):
            frames = [lengths[order.clip_of_slot(slot)] for slot in micro_batch_slots(index, 8)]
            total += 8 * max(frames)
            padded += 8 * max(frames) - sum(frames)
        return padded / total

    plain, bucketed = (padded_share(clip_order(2, lengths, 8, window)) for window in (1, 8))
    assert plain > 0.35
    assert bucketed < 0.5 * plain
    order = clip_order(2, lengths, 8, 8)
    means = [sum(lengths[order.clip_of_slot(s)] for s in micro_batch_slots(i, 8)) for i in range(clips // 8)]
    # Sorted windows left unshuffled would rise throughout.
    rises = sum(later > earlier for earlier, later in zip(means, means[1:], strict=False)) / (len(means) - 1)
    assert 0.2 < rises < 0.8


def test_a_micro_batch_across_two_epochs_keeps_its_clips_apart():
    order = clip_order(2, lengths_of(5), 3, 4)
    plain = [int(epoch_order(2, epoch, 5)[position]) for epoch in range(3) for position in range(5)]
    bucketed = [order.clip_of_slot(slot) for slot in range(15)]
    # Slots 3..5 and 9..11 lie in two epochs each.
    assert bucketed[3:6] == plain[3:6]
    assert bucketed[9:12] == plain[9:12]


def test_the_order_survives_a_spawned_worker():
    order = clip_order(2, lengths_of(64), 3, 4)
    expected = [order.clip_of_slot(slot) for slot in range(200)]
    again = pickle.loads(pickle.dumps(order))
    assert [again.clip_of_slot(slot) for slot in range(200)] == expected
    assert isinstance(order, ClipOrder)


@pytest.mark.slow
def test_100_000_clips_cost_under_a_second_of_order_under_100_megabytes_and_two_seconds_to_the_first_batch():
    script = ROOT / "tests/survival/large_index.py"
    # Processor time of one thread, so that neither a busy machine nor one of many cores fails the test; nothing here
    # waits for anything else.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=one_thread)
    figures = json.loads(done.stdout)
    assert figures["clips"] == 100_000
    assert figures["order_of_two_epochs"]["cpu_seconds"] < 1
    assert figures["order_of_two_epochs"]["grown_mb"] < 100
    assert figures["first_batch"]["cpu_seconds"] < 2


def clips_of_numbers(clips):
    """Latents of made-up clips that say which clip they are: what EncodedClips serves from disk, without a disk."""

    class Numbered:
        sample_rate_hz, samples_per_frame = 44100, 4096

        def __init__(self):
            frames = torch.randint(1, 9, (clips,), generator=torch.Generator().manual_seed(clips)).tolist()
            self.clips = tuple(
                ClipEntry(str(i), "s.tar", 0, 1, str(i), "wav", n * 4096, 44100, 2, "x") for i, n in enumerate(frames)
            )

        def latents(self, clip, flipped):
            frames = clip.samples // 4096
            return ClipLatents(torch.full((1, frames), float(clip.key)), torch.zeros(1, 2), torch.ones(frames))

        def prompt(self, caption):
            return torch.zeros(1, 1), torch.ones(1, dtype=torch.bool)

    return Numbered()


def through_real_workers(clips, micro_batch, window, world, dist_ranks, workers, first, last):
    """Keys of the clips of some ranks' micro batches in some steps, as a loader with real processes gives them."""
    settings = SampleSettings(3, micro_batch, 8, 0.0, "file", None, bucket_batches=window)
    ranks = []
    for dist_rank in dist_ranks:
        # Everything fresh, as a process that has just been started has it.
        batches = MicroBatches(clips_of_numbers(clips), settings)
        indices = micro_indices(range(first, last + 1), 1, dist_rank, world)
        source = loader(batches, indices, lambda index: None, workers, torch.device("cpu"))
        ranks.append([batch.clips for batch in source])
    return ranks


# Every pair of values of the full grid (worlds x workers x sizes x batches x windows) is met at least once.
COVERING = [
    (1, 0, 4, 1, 1), (2, 1, 4, 2, 16), (3, 2, 4, 3, 2), (4, 3, 4, 1, 16), (8, 0, 4, 2, 2),
    (2, 2, 5, 1, 2), (1, 3, 5, 2, 1), (8, 1, 5, 3, 1), (3, 0, 5, 2, 16), (4, 2, 5, 3, 1),
    (3, 3, 17, 3, 16), (4, 1, 17, 1, 1), (1, 2, 17, 2, 16), (2, 0, 17, 3, 2), (8, 3, 17, 1, 2),
    (4, 0, 64, 3, 2), (8, 2, 64, 2, 16), (3, 1, 64, 1, 2), (2, 3, 64, 2, 1), (1, 1, 64, 3, 16),
    (1, 0, 1000, 3, 2), (2, 1, 1000, 1, 1), (3, 3, 1000, 2, 1), (4, 2, 1000, 2, 2), (8, 0, 1000, 3, 16),
]  # fmt: skip


def test_the_covering_runs_meet_every_pair_of_values():
    values = [WORLDS, WORKERS, SIZES, MICRO_BATCHES, WINDOWS]
    for one, other in itertools.combinations(range(5), 2):
        met = {(row[one], row[other]) for row in COVERING}
        # Five worlds and five sizes meet in all 25 pairs, and so do all the smaller ones.
        assert met == set(itertools.product(values[one], values[other])), (one, other)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "workers", "clips", "micro_batch", "window"), COVERING)
def test_real_workers_give_every_clip_once_in_the_order_of_one_process_and_resume_anywhere(
    world, workers, clips, micro_batch, window
):
    # An epoch and a bit of the next one; of the largest set only as much as it takes to cross an epoch's end.
    steps = math.ceil((clips + 7) / (world * micro_batch))
    first = 1 if clips < 1000 else steps - 2
    # Of many ranks with processes the first and the last; that all share the slots is tested above, without them.
    dist_ranks = [*range(world)] if workers == 0 else sorted({0, world - 1})
    ranks = through_real_workers(clips, micro_batch, window, world, dist_ranks, workers, first, steps)
    order = clip_order(3, [min(8, c.samples // 4096) for c in clips_of_numbers(clips).clips], micro_batch, window)
    expected = [
        [str(order.clip_of_slot(slot)) for slot in micro_batch_slots(index, micro_batch)]
        for index in range((first - 1) * world, steps * world)
    ]
    assert ranks == [expected[dist_rank::world] for dist_rank in dist_ranks]
    if first == 1:
        assert sorted([key for keys in expected for key in keys][:clips], key=int) == [str(n) for n in range(clips)]
    # Resumed at a step in the middle, on other workers, it is the tail of the same.
    middle = (first + steps + 1) // 2
    tail = through_real_workers(clips, micro_batch, window, world, [world - 1], (workers + 1) % 4, middle, steps)
    assert tail == [ranks[-1][middle - first :]]
