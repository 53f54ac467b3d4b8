"""The sample stream: who trains on what, when, and with which draws, whatever the number of ranks and workers."""

import dataclasses
import math
import multiprocessing

import pytest
import torch

from sa3dist.data.batches.loader import MicroBatches, loader
from sa3dist.data.batches.micro_batch import SampleSettings
from sa3dist.data.latents.cache import ClipLatents
from sa3dist.errors import DataError, EnvironmentFailure
from sa3dist.flow.crops import polarity_of_slot
from sa3dist.formats import ClipEntry
from sa3dist.model.config import ShiftConfig

CHANNELS, TOKENS, FRAME, RATE = 6, 4, 4096, 44100


class Clips:
    """Latents and prompts of made-up clips, as EncodedClips serves them from disk."""

    sample_rate_hz, samples_per_frame = RATE, FRAME

    def __init__(self, frames, silent_until=0):
        self.frames, self.silent_until = frames, silent_until
        self.clips = tuple(
            ClipEntry(f"clip_{i}", "s.tar", 0, 1, str(i), "wav", n * FRAME - 7, RATE, 2, f"caption {i}")
            for i, n in enumerate(frames)
        )

    def latents(self, clip, flipped):
        number = int(clip.audio_sha256)
        generator = torch.Generator().manual_seed(2 * number + flipped)
        peaks = torch.ones(self.frames[number])
        peaks[: self.silent_until] = 0
        latents = torch.randn(CHANNELS, self.frames[number] + 5, generator=generator)
        return ClipLatents(latents, torch.tensor([[8.0, 9.0]]).repeat(CHANNELS, 1), peaks)

    def prompt(self, caption):
        return torch.full((TOKENS, 3), float(caption.split()[1])), torch.arange(TOKENS) < 2


def make_settings(**changes):
    values = {"seed": 3, "micro_batch": 2, "crop_frames": 20, "prompt_dropout": 0.1, "seconds_total_of": "file"}
    return SampleSettings(**{**values, "shift": ShiftConfig(), **changes})


def fields(batch):
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def assert_equal(one, other):
    for name, value in fields(one).items():
        match = getattr(other, name)
        assert torch.equal(value, match) if isinstance(value, torch.Tensor) else value == match, name


def test_a_micro_batch_knows_whether_it_has_context():
    batches = MicroBatches(Clips([12, 30, 25, 40, 20]), make_settings())
    seen = set()
    for index in range(40):
        batch = batches[index]
        assert batch.has_context == (batch.inpaint_mask_B1T.sum().item() > 0)
        seen.add(batch.has_context)
    assert seen == {True, False}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("bucket_batches", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_worker_processes_change_nothing(workers, bucket_batches):
    batches = MicroBatches(Clips([12, 30, 25, 40, 20]), make_settings(bucket_batches=bucket_batches))
    indices = list(range(9))
    told = []
    loaded = loader(batches, iter(indices), told.append, workers, torch.device("cpu"))
    for index, batch in zip(indices, loaded, strict=True):
        assert_equal(batch, batches[index])
    assert told == indices


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("fails", [0, 2, 6])
def test_what_preparing_raises_ends_the_stream_and_leaves_no_process(workers, fails):
    def prepare(index):
        if index == fails:
            raise DataError("clip b: damaged")

    batches = MicroBatches(Clips([12, 30, 25, 40, 20]), make_settings())
    loaded = loader(batches, iter(range(9)), prepare, workers, torch.device("cpu"))
    came = []
    with pytest.raises(DataError, match="^clip b: damaged$") as kept:
        came.extend(iter(loaded))
    # Each worker is given two micro batches ahead.
    assert len(came) == max(0, fails - 2 * workers)
    for index, batch in enumerate(came):
        assert_equal(batch, batches[index])
    assert kept.value.__traceback__
    assert not multiprocessing.active_children()


def test_a_clips_draws_do_not_depend_on_its_neighbours():
    # One long clip and short ones: alone, slot 0 is shorter than beside a longer clip, yet draws the same.
    clips = Clips([12, 30, 25, 40, 20])
    together = MicroBatches(clips, make_settings(micro_batch=5))[0]
    for slot in range(5):
        alone = MicroBatches(clips, make_settings(micro_batch=1))[slot]
        frames = alone.latents_BDT.shape[2]
        assert alone.clips == together.clips[slot : slot + 1]
        assert torch.equal(alone.latents_BDT[0], together.latents_BDT[slot, :, :frames])
        assert torch.equal(alone.t_B, together.t_B[slot : slot + 1])
        assert torch.equal(alone.inpaint_mask_B1T[0], together.inpaint_mask_B1T[slot, :, :frames])
        assert torch.equal(alone.drop_cross_B, together.drop_cross_B[slot : slot + 1])
        keep = together.keep_BT[slot] if together.keep_BT is not None else torch.ones(together.t_B.shape)
        assert int(keep.sum()) == frames or together.keep_BT is None


def test_noise_is_coupled_over_whole_crops():
    from sa3dist import flow

    clips, settings = Clips([12, 30, 25, 40, 20]), make_settings(micro_batch=3, crop_frames=35)
    for index in range(6):
        batch = MicroBatches(clips, settings)[index]
        slots = range(3 * index, 3 * index + 3)
        noise = torch.stack([flow.draw_noise(35, CHANNELS, flow.generator_for(3, "noise", slot)) for slot in slots])
        whole = []
        for slot, key in zip(slots, batch.clips, strict=True):
            clip = next(clip for clip in clips.clips if clip.key == key)
            stored = clips.latents(clip, polarity_of_slot(3, slot))
            alone = MicroBatches(clips, make_settings(micro_batch=1, crop_frames=35))[slot]
            first = alone.latents_BDT[0, :, 0]
            start = next(s for s in range(stored.valid_frames) if torch.equal(stored.latents_DT[:, s], first))
            whole.append(stored.window(start, 35))
        permutation = flow.couple_noise(torch.stack(whole), noise)
        frames = batch.target_BDT.shape[2]
        expected = noise[permutation][..., :frames] - torch.stack(whole)[..., :frames]
        assert torch.equal(batch.target_BDT, expected)


def test_short_clips_are_extended_by_encoded_silence_never_past_the_crop():
    clips = Clips([12] * 4)
    seen = set()
    for slot in range(60):
        batch = MicroBatches(clips, make_settings(micro_batch=1, crop_frames=30))[slot]
        frames = batch.latents_BDT.shape[2]
        assert 12 <= frames <= 30
        seen.add(frames)
        tail = batch.latents_BDT[0, 0, 17:]
        expected = torch.tensor([9.0 if position % 2 else 8.0 for position in range(17, frames)])
        assert torch.equal(tail, expected)
    assert {30} < seen
    assert batch.keep_BT is None


def test_crops_reach_both_ends_of_a_long_clip():
    clips = Clips([24] * 4)
    whole = clips.latents(clips.clips[0], False).latents_DT
    starts = set()
    for slot in range(300):
        batch = MicroBatches(clips, make_settings(micro_batch=1))[slot]
        flipped = polarity_of_slot(3, slot)
        number = int(batch.clips[0].split("_")[1])
        whole = clips.latents(clips.clips[number], flipped).latents_DT
        (start,) = [s for s in range(5) if torch.equal(whole[:, s : s + 20], batch.latents_BDT[0])]
        starts.add(start)
    assert starts == {0, 1, 2, 3, 4}


def test_a_silent_crop_is_drawn_again_and_the_clip_stays():
    # Frames 0..29 of 60 are silent: one in four crops of 20 is silent at first.
    batches = MicroBatches(Clips([60] * 4, silent_until=30), make_settings(micro_batch=1))
    assert sum(batches[slot].silent_crops for slot in range(200)) == 0
    hopeless = MicroBatches(Clips([60] * 4, silent_until=60), make_settings(micro_batch=1))
    assert sum(hopeless[slot].silent_crops for slot in range(10)) == 10


@pytest.mark.parametrize(("choice", "seconds"), [("file", 6), ("clip", 2)])
def test_the_duration_told_is_the_files_or_the_crops(choice, seconds):
    batch = MicroBatches(Clips([60] * 4), make_settings(seconds_total_of=choice))[0]
    assert batch.seconds_total_B.tolist() == [seconds, seconds]


def test_prompts_are_dropped_for_their_share_of_slots():
    batches = MicroBatches(Clips([3] * 4), make_settings(crop_frames=3, micro_batch=8, prompt_dropout=0.3))
    dropped = torch.cat([batches[index].drop_cross_B for index in range(250)]).double()
    assert abs(dropped.mean().item() - 0.3) < 4.5 * math.sqrt(0.21 / len(dropped))


def test_a_damaged_file_reaches_the_step_as_its_own_one_line():
    class Damaged(Clips):
        def latents(self, clip, flipped):
            raise EnvironmentFailure(f"latents of clip {clip.key}: damaged")

    batches = MicroBatches(Damaged([12] * 4), make_settings())
    with pytest.raises(EnvironmentFailure) as caught:
        next(loader(batches, iter([0]), lambda index: None, 1, torch.device("cpu")))
    assert str(caught.value).count("\n") == 0
    assert str(caught.value).startswith("latents of clip clip_")
