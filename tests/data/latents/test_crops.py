"""Latents of crops: the same samples as encoding on the fly, near to crops of whole latents, nothing left behind."""

import gc
import threading

import pytest
import torch

from sa3dist import config
from sa3dist.data.batches import encode_on_demand
from sa3dist.data.batches.encode_on_demand import EncodeOnDemand
from sa3dist.data.batches.loader import MicroBatches
from sa3dist.data.batches.micro_batch import SampleSettings
from sa3dist.data.latents import crops as data_crops
from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.crops import EncodedCrops
from sa3dist.data.latents.encode_tasks import caption_tasks, crop_task
from sa3dist.data.source.audio import load_clip_audio
from sa3dist.data.source.build import build_shards
from sa3dist.encode import encode_all
from sa3dist.errors import ConfigError
from sa3dist.flow.crops import draw_crop, polarity_of_slot
from sa3dist.model.loading import load_base
from sa3dist.model.tiny import write_tiny_base
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from tests.helpers.clips import captioned, encode, tone, write_zip

LIMIT = 12
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(write_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    members = captioned(3, seconds=0.4)
    noise = torch.rand(44100 * 4, 2, generator=torch.Generator().manual_seed(1)).numpy() - 0.5
    members |= {"long.wav": encode(noise), "long.txt": b"noise", "mono.flac": encode(tone(2.0, 32000), 32000, "FLAC")}
    members["mono.txt"] = b"a longer tone"
    return build_shards(str(write_zip(folder / "a.zip", members)), folder / "work")


def crops_of(index, base, work_dir, keep):
    return EncodedCrops(index, work_dir, base, "a", "t", crop_frames=LIMIT, keep=keep)


def stream_of(encoded):
    return MicroBatches(encoded, SampleSettings(3, 2, LIMIT, 0.1, "file", None))


def test_a_crop_is_what_encoding_its_audio_alone_gives(index, base, tmp_path):
    encoded = crops_of(index, base, tmp_path, keep=True)
    number = [clip.key for clip in index.clips].index("long")
    clip = index.clips[number]
    audio_CN = load_clip_audio(index, clip, 44100)
    starts = set()
    for slot in range(6):
        encoded.encode_slot(base, clip, 3, slot)
        flipped = polarity_of_slot(3, slot)
        latents = encoded.latents(clip, flipped)
        start, _ = draw_crop(latents.peaks_T, LIMIT, 3, slot)
        starts.add(start)
        part_CN = audio_CN[:, start * 4096 : (start + LIMIT) * 4096] * (-1 if flipped else 1)
        expected = base.encode_audio(part_CN[None])[0, :, : part_CN.shape[1] // 4096]
        torch.testing.assert_close(latents.window(start, LIMIT)[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)
        assert latents.valid_frames == 44
    assert len(starts) > 3


@pytest.mark.parametrize(("workers", "room"), [(0, encode_on_demand.WAITING_BYTES), (1, 1)])
def test_on_the_fly_gives_the_samples_of_kept_crops_and_leaves_no_file(
    index, base, tmp_path, workers, room, monkeypatch
):
    monkeypatch.setattr(encode_on_demand, "WAITING_BYTES", room)
    kept = crops_of(index, base, tmp_path / "kept", keep=True)
    flying = crops_of(index, base, tmp_path / "flying", keep=False)
    batches = []
    for encoded in (kept, flying):
        stream = stream_of(encoded)
        batches.append(list(EncodeOnDemand(base, stream).batches(range(7), workers, CPU)))
    for one, other in zip(*batches, strict=True):
        assert one.clips == other.clips
        assert torch.equal(one.noised_BDT, other.noised_BDT)
    assert len(list((tmp_path / "kept" / "latents").rglob("*.safetensors"))) >= 7
    assert not list((tmp_path / "flying" / "latents").rglob("*.safetensors"))
    del stream, encoded, flying, kept
    gc.collect()
    assert not list((tmp_path / "flying" / "latents").iterdir())


def test_a_crop_stays_while_another_micro_batch_on_its_way_needs_it(index, base, tmp_path):
    encoded = crops_of(index, base, tmp_path, keep=False)
    # Four micro batches at a time are on their way; most clips are shorter than a crop, which then is always the same.
    assert len(list(EncodeOnDemand(base, stream_of(encoded)).batches(range(30), 2, CPU))) == 30
    assert not list((tmp_path / "latents").rglob("*.safetensors"))


def test_audio_is_read_by_another_thread_and_not_again_for_what_is_there(index, base, tmp_path, monkeypatch):
    read = []

    def watched(index, clip, *args):
        read.append((clip.key, threading.current_thread() is threading.main_thread(), len(args)))
        return load_clip_audio(index, clip, *args)

    monkeypatch.setattr(data_crops, "load_clip_audio", watched)
    encoded = crops_of(index, base, tmp_path, keep=True)
    stream = stream_of(encoded)
    found = list(EncodeOnDemand(base, stream).batches(range(20), 0, CPU))
    assert {main for _, main, _ in read} == {False}
    # Every clip once as a whole, for its peaks; after that only crops.
    whole = [key for key, _, arguments in read if arguments == 1]
    assert sorted(whole) == sorted(clip.key for clip in index.clips)
    assert {key for key, _, arguments in read if arguments == 3} >= {"long"}
    read.clear()
    for one, other in zip(found, EncodeOnDemand(base, stream).batches(range(20), 0, CPU), strict=True):
        assert torch.equal(one.noised_BDT, other.noised_BDT)
    assert not read


def test_a_crop_that_was_let_go_after_the_look_ahead_is_encoded_again(index, base, tmp_path):
    encoded = crops_of(index, base, tmp_path, keep=False)
    clip = next(clip for clip in index.clips if clip.key == "clip0")
    first = encoded.encode_slot(base, clip, 3, 0)
    expected = first.read_bytes()
    assert encoded.load_slot(clip, 3, 0) is None
    first.unlink()
    assert encoded.encode_slot(base, clip, 3, 0, None).read_bytes() == expected


def test_encoding_ahead_leaves_nothing_to_encode_on_the_way(index, base, tmp_path, monkeypatch):
    encoded = crops_of(index, base, tmp_path, keep=True)
    stream = stream_of(encoded)
    clips = [index.clips[stream.order.clip_of_slot(slot)] for slot in range(14)]
    tasks = [crop_task(encoded, clip, 3, slot) for slot, clip in enumerate(clips)]
    encode_all(base, caption_tasks(encoded, 1) + tasks, Group(0, 1, CPU), StopRequest())
    monkeypatch.setattr(type(base), "encode_audio", lambda *_: pytest.fail("encoded again"))
    assert len(list(EncodeOnDemand(base, stream).batches(range(7), 0, CPU))) == 7


def test_a_crop_of_whole_latents_differs_near_its_ends_only(index, base, tmp_path):
    whole, crops = EncodedClips(index, tmp_path, base, "a", "t"), crops_of(index, base, tmp_path, keep=True)
    number = [clip.key for clip in index.clips].index("long")
    clip = index.clips[number]
    for slot in range(6):
        flipped = polarity_of_slot(3, slot)
        whole.encode_slot(base, clip, 3, slot, None)
        crops.encode_slot(base, clip, 3, slot)
        one, other = whole.latents(clip, flipped), crops.latents(clip, flipped)
        torch.testing.assert_close(one.peaks_T, other.peaks_T)
        start, _ = draw_crop(one.peaks_T, LIMIT, 3, slot)
        difference_T = (one.window(start, LIMIT) - other.window(start, LIMIT)).abs().amax(dim=0)
        # The tiny encoder has one layer with a window of one frame; the released SAME-L has twelve.
        assert difference_T[2:-2].max() < 1e-4 * one.window(start, LIMIT).abs().max()


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="pre_encode: true has nothing to encode ahead with latents: on_the_fly"):
        config.build({"audio_data_url": "x", "latents": "on_the_fly", "pre_encode": True})
    with pytest.raises(ConfigError, match="latents: 'both' is not valid, expected one of whole, crop, on_the_fly"):
        config.build({"audio_data_url": "x", "latents": "both"})
