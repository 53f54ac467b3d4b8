"""Who trains on what: exactly once per epoch, whatever ranks, workers, batches and buckets, resumable at any step."""

import math
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3dist.data import stream
from sa3dist.data.order import ClipOrder, clip_order, epoch_order, micro_batch_slots

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
def test_ranks_and_workers_partition_the_slots_and_every_epoch_holds_every_clip_once(clips, world):
    for micro_batch in MICRO_BATCHES:
        for window in WINDOWS:
            order = clip_order(3, lengths_of(clips), micro_batch, window)
            steps = math.ceil(2 * clips / (world * micro_batch))
            for workers in WORKERS:
                taken = []
                for dist_rank in range(world):
                    indices = list(stream.micro_indices(1, steps, 1, dist_rank, world))
                    # No rank ever runs out, and none does more than another.
                    assert len(indices) == steps
                    made, returned = dealt_to_workers(indices, workers)
                    assert returned == indices
                    taken += [slot for part in made for index in part for slot in micro_batch_slots(index, micro_batch)]
                assert sorted(taken) == list(range(steps * world * micro_batch))
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
                for index in stream.micro_indices(step, step, accumulation, dist_rank, world)
                for slot in micro_batch_slots(index, micro_batch)
            )
            for step in range(begin, first + more + 1)
        ]

    assert clips_of_steps(1, 1, 6)[first - 1 :] == clips_of_steps(first, *split)


@given(st.integers(1, 30), st.integers(0, 20), st.sampled_from([(1, 4), (2, 2), (4, 1)]))
@settings(deadline=None, max_examples=30)
def test_resuming_continues_every_ranks_own_micro_batches(first, more, split):
    world, accumulation = split
    whole = [list(stream.micro_indices(1, first + more, accumulation, rank, world)) for rank in range(world)]
    tail = [list(stream.micro_indices(first, first + more, accumulation, rank, world)) for rank in range(world)]
    assert [rows[(first - 1) * accumulation :] for rows in whole] == tail


def test_a_steps_micro_batches_are_the_same_set_for_every_split_of_ranks_and_accumulation():
    def of_step(step, world, accumulation):
        return {i for rank in range(world) for i in stream.micro_indices(step, step, accumulation, rank, world)}

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


def test_the_order_of_100_000_clips_takes_under_a_second_and_100_megabytes():
    program = """
import resource, time
import torch
from sa3dist.data.order import clip_order
lengths = torch.randint(1, 4000, (100_000,)).tolist()
torch.randperm(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
for window in (1, 64):
    order = clip_order(1, lengths, 4, window)
    clips = [order.clip_of_slot(slot) for slot in range(0, 100_000, 100)]
    assert len(set(order.epoch(0).tolist())) == 100_000
print(time.perf_counter() - begin, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    seconds, megabytes = map(float, out.split())
    assert seconds < 1
    assert megabytes < 100


@pytest.mark.slow
def test_100_000_clips_give_their_first_batch_in_two_seconds_after_imports(tmp_path):
    program = """
import sys, time
from pathlib import Path
import torch
from sa3dist import encode
from sa3dist.data import latents
from sa3dist.data.tensor_files import write_tensors
from sa3dist.data.stream import MicroBatches, StreamSettings, loader, polarity_of_slot
from sa3dist.formats import ClipEntry, DatasetIndex

class Base:
    sample_rate_hz, samples_per_frame, latent_channels, prompt_tokens = 44100, 4096, 8, 128

work = Path(sys.argv[1])
clips = tuple(
    ClipEntry(f"c/{i:06d}", f"s-{i // 500}.tar", 512, 9000, str(i), "wav", 44100 * (3 + i % 20), 44100, 2, f"clip {i}")
    for i in range(100_000)
)
DatasetIndex(work, "0" * 64, clips, (), ()).write()

def stream():
    encoded = latents.EncodedClips(DatasetIndex.read(work), work, Base, "a", "b")
    return encoded, MicroBatches(encoded, StreamSettings(3, 2, 129, 0.1, "file", None, 8))

encoded, batches = stream()
for slot in range(16):
    clip, flipped = encoded.clips[batches.order.clip_of_slot(slot)], polarity_of_slot(3, slot)
    frames = clip.samples // 4096 + 1
    tensors = {"latents": torch.randn(8, frames + 32), "silence": torch.randn(8, 2), "peaks": torch.ones(frames)}
    write_tensors(encoded.latents_path(clip, flipped), tensors)
    write_tensors(encoded.prompt_path(clip.caption), {"hidden": torch.randn(7, 16)})
# Processor time, so that a busy machine does not fail the test; nothing here waits for anything else.
begin = time.process_time()
encoded, batches = stream()
prepare = encode.encode_on_first_use(Base, encoded, batches.order, 2)
first = next(loader(batches, iter(range(4)), prepare, 1, torch.device("cpu")))
print(time.process_time() - begin, len(first.clips))
"""
    out = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    seconds, clips = out.split()
    assert float(seconds) < 2
    assert int(clips) == 2
