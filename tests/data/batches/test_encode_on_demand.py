"""Encoding on first use: another thread reads the audio ahead; the samples are those of encoding everything first."""

import signal
import threading
import time

import psutil
import pytest
import torch

from sa3dist.data.batches.encode_on_demand import EncodeOnDemand
from sa3dist.data.batches.loader import MicroBatches
from sa3dist.data.batches.micro_batch import SampleSettings
from sa3dist.data.batches.order import ClipOrder
from sa3dist.data.latents import cache
from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.encode_tasks import whole_clip_tasks
from sa3dist.data.source import prefetch
from sa3dist.data.source.audio import load_clip_audio
from sa3dist.data.source.build import build_shards
from sa3dist.encode import encode_all
from sa3dist.errors import DataError
from sa3dist.model.loading import load_base
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from tests.helpers.clips import encode, tone, write_zip
from tests.helpers.forked_trainers import ForkedTrainer

CPU = torch.device("cpu")
CLIPS, MICRO_BATCH = 5, 2
# Two epochs, in which most clips come in both polarities.
INDICES = range(2 * CLIPS // MICRO_BATCH)


@pytest.fixture
def base(demo_base):
    return load_base(demo_base)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    members = {f"c{n}.wav": encode(tone(0.2 + 0.1 * n, hertz=200 + 50 * n, channels=2)) for n in range(CLIPS)}
    members |= {f"c{n}.txt": f"tone {n}".encode() for n in range(CLIPS)}
    return build_shards(str(write_zip(folder / "a.zip", members)), folder / "work")


@pytest.fixture
def reads(monkeypatch):
    """(clip, whether this thread read it) of every clip that is decoded."""
    seen = []

    def watched(index, clip, rate):
        seen.append((clip.key, threading.current_thread() is threading.main_thread()))
        return load_clip_audio(index, clip, rate)

    monkeypatch.setattr(cache, "load_clip_audio", watched)
    return seen


@pytest.fixture
def first_use(base, index):
    def made(work_dir, before_work=lambda doing: None):
        encoded = EncodedClips(index, work_dir, base, "a", "t")
        stream = MicroBatches(encoded, SampleSettings(3, MICRO_BATCH, 12, 0.1, "file", None))
        return encoded, stream, EncodeOnDemand(base, stream, before_work)

    return made


@pytest.mark.parametrize("workers", [0, 1])
def test_the_samples_are_those_of_encoding_everything_first(base, index, first_use, tmp_path, reads, workers):
    encoded, stream, _ = first_use(tmp_path / "before")
    encode_all(base, whole_clip_tasks(encoded), Group(0, 1, CPU), StopRequest())
    expected = [stream[number] for number in INDICES]
    reads.clear()
    encoded, stream, use = first_use(tmp_path / "on_the_way")
    found = list(use.batches(INDICES, workers, CPU))
    for one, other in zip(expected, found, strict=True):
        assert one.clips == other.clips
        torch.testing.assert_close(one.noised_BDT, other.noised_BDT, rtol=1e-5, atol=1e-5)
    polarities = sum(encoded.has_latents(clip, flipped) for clip in index.clips for flipped in (False, True))
    assert {main for _, main in reads} == {False}
    assert CLIPS <= len(reads) <= 2 * polarities


def test_nothing_is_read_where_everything_is_encoded(base, first_use, tmp_path, reads):
    encoded, stream, use = first_use(tmp_path)
    encode_all(base, whole_clip_tasks(encoded), Group(0, 1, CPU), StopRequest())
    reads.clear()
    doing = []
    encoded, stream, use = first_use(tmp_path, doing.append)
    assert len(list(use.batches(INDICES, 0, CPU))) == len(INDICES)
    assert not reads
    assert not doing


def test_a_request_to_stop_does_not_break_off_steps_that_lack_nothing(base, index, tmp_path, monkeypatch):
    # However slow the machine is, nothing that is there is waited for that long.
    monkeypatch.setattr(prefetch, "TICK_SECONDS", 60)
    encoded = EncodedClips(index, tmp_path, base, "a", "t")
    encode_all(base, whole_clip_tasks(encoded), Group(0, 1, CPU), StopRequest())
    stream = MicroBatches(encoded, SampleSettings(3, MICRO_BATCH, 12, 0.1, "file", None))
    use = EncodeOnDemand(base, stream, before_work=pytest.fail, check_stop=lambda: pytest.fail("broken off"))
    assert len(list(use.batches(INDICES, 0, CPU))) == len(INDICES)


def test_a_clip_that_cannot_be_read_ends_the_run_when_its_turn_comes(first_use, tmp_path, monkeypatch):
    encoded, stream, use = first_use(tmp_path)
    # The first clip that no earlier micro batch has.
    third = set(stream_clips(stream, 2)) - {clip for n in (0, 1) for clip in stream_clips(stream, n)}
    bad = min(third)

    def broken(index, clip, rate):
        if clip.key == bad:
            raise DataError(f"clip {clip.key}: damaged")
        return load_clip_audio(index, clip, rate)

    monkeypatch.setattr(cache, "load_clip_audio", broken)
    ready = use.batches(INDICES, 0, CPU)
    assert [next(ready).clips, next(ready).clips] == [stream_clips(stream, 0), stream_clips(stream, 1)]
    with pytest.raises(DataError, match=f"^clip {bad}: damaged$"):
        next(ready)


def stream_clips(stream, number):
    slots = range(number * MICRO_BATCH, (number + 1) * MICRO_BATCH)
    return [stream.encoded.clips[stream.order.clip_of_slot(slot)].key for slot in slots]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "a damaged clip"])
def test_a_run_that_ends_while_clips_are_encoded_leaves_no_process_behind(tmp_path, demo_base, how):
    members = {f"c{n}.wav": encode(tone(3.0, hertz=200 + 50 * n, channels=2)) for n in range(12)}
    members |= {f"c{n}.txt": f"tone {n}".encode() for n in range(12)}
    words = [f"audio_data_url={write_zip(tmp_path / 'a.zip', members)}", f"model={demo_base}", "num_workers=2"]
    words += [f"output_dir={tmp_path / 'run'}", "number_of_steps=500", "batch_size=4", "duration=2", "rank=2", "seed=7"]
    if how == "a damaged clip":
        index = build_shards(words[0].partition("=")[2], tmp_path / "sa3dist-work")
        shard = index.directory / index.shards[0].name
        content = bytearray(shard.read_bytes())
        # The first micro batch is good; the others, which are prepared before the first step, are not.
        good = [ClipOrder(7, 12).clip_of_slot(slot) for slot in range(4)]
        for clip in (clip for number, clip in enumerate(index.clips) if number not in good):
            content[clip.audio_offset + 5000] ^= 1
        shard.write_bytes(content)
    words += ["base_precision=fp32", "mixed_precision=no", "report=false", "gradient_checkpointing=off"]
    with ForkedTrainer(words, tmp_path / "said") as process:
        deadline = time.monotonic() + 120
        while how == "SIGTERM" and "training 500 steps" not in process.said():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        if how == "SIGTERM":
            time.sleep(0.2)
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == (75 if how == "SIGTERM" else 2)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert "Traceback" not in process.said()
