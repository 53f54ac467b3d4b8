"""Streaming mode: shards dealt to workers, clips checked on the way, draws by slot, workers continued in place."""

import itertools
import random
import shutil
from collections import Counter

import fsspec
import pytest
import torch

from sa3dist.config import build
from sa3dist.data.batches import streaming
from sa3dist.data.batches.micro_batch import SampleSettings
from sa3dist.data.batches.worker_shards import SEGMENT_SHARDS, RankCursors, StreamCursor, WorkerShards
from sa3dist.data.latents.source import streamed_shards
from sa3dist.errors import CheckpointError, ConfigError, DataError, EnvironmentFailure
from sa3dist.flow.crops import draw_crop, polarity_of_slot
from sa3dist.model.config import ShiftConfig
from sa3dist.runtime.process_group import Group
from tests.helpers.clips import captioned, encode, tone, write_tar
from tests.helpers.latent_sets import Framing, write_set
from tests.helpers.latent_stream import source_of

CPU = torch.device("cpu")
WORLDS, WORKERS, SHARDS = (1, 2, 3, 4, 8), (1, 2, 3), (1, 2, 5, 16, 33)


@pytest.mark.parametrize("shards", SHARDS)
def test_an_epoch_deals_every_shard_once_and_leaves_no_worker_without(shards):
    for world, workers, epoch in itertools.product(WORLDS, WORKERS, range(3)):
        owned, borrowers = Counter(), 0
        for dist_rank, number in itertools.product(range(world), range(workers)):
            segments, borrowed = WorkerShards(3, shards, dist_rank, world, number, workers).segments(epoch)
            mine = [shard for segment in segments for shard in segment]
            assert mine
            assert all(0 < len(segment) <= SEGMENT_SHARDS for segment in segments)
            borrowers += borrowed
            if not borrowed:
                owned.update(mine)
        assert owned == Counter(range(shards)), (world, workers)
        assert (borrowers > 0) == (shards // world < workers)


def test_epochs_deal_differently_and_workers_shuffle_differently():
    workers = [WorkerShards(3, 16, rank, 2, number, 2) for rank in range(2) for number in range(2)]
    assert len({str(workers[0].segments(epoch)) for epoch in range(8)}) == 8
    assert (
        len({worker.shuffle_seed(epoch, segment) for worker in workers for epoch in (0, 1) for segment in (0, 1)}) == 16
    )


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Six shards of 1 to 9 clips, 27 in all."""
    return write_set(tmp_path_factory.mktemp("set"), [4, 1, 7, 2, 9, 4])


def taken(source, worker, cursor, count, buffer=5):
    return list(itertools.islice(source.clips(worker, cursor, buffer), count))


def test_a_worker_gives_its_clips_once_per_epoch_and_says_when_it_repeats(paths):
    found = taken(source_of(paths), WorkerShards(1, 6, 0, 1, 0, 1), StreamCursor(), 3 * 27)
    for begin in range(0, 3 * 27, 27):
        keys = [clip.clip.key for clip, _, _ in found[begin : begin + 27]]
        assert sorted(keys) == sorted(set(keys))
        assert keys != sorted(keys)
        assert {repeated for _, _, repeated in found[begin : begin + 27]} == {begin > 0}
    # Fewer shards than workers: the second one's clips are all repeats.
    assert all(
        repeated for _, _, repeated in taken(source_of(paths[:1]), WorkerShards(1, 1, 0, 1, 1, 2), StreamCursor(), 4)
    )


def test_a_worker_continued_at_any_cursor_gives_the_rest(paths):
    source, worker = source_of(paths), WorkerShards(1, 6, 1, 2, 0, 1)
    whole = taken(source, worker, StreamCursor(), 40)
    for place in range(0, 39, 3):
        rest = taken(source, worker, whole[place][1], 39 - place)
        assert [(clip.clip.key, cursor) for clip, cursor, _ in rest] == [
            (clip.clip.key, cursor) for clip, cursor, _ in whole[place + 1 :]
        ]


def clips_of(folder, paths, base=Framing):
    index = streamed_shards(str(paths[0].parent))
    return streaming.StreamedClips(index, folder, base, "a", "t", max_bytes=1 << 30)


def make_settings(**changes):
    values = {"seed": 3, "micro_batch": 2, "crop_frames": 5, "prompt_dropout": 0.1, "seconds_total_of": "file"}
    return SampleSettings(**{**values, "shift": ShiftConfig(), **changes})


def loaded(encoded, rank, workers, steps, cursors=None, first=0):
    """Micro batches of one rank for some steps, and where its workers then are. rank: its number, of how many."""
    cursors = cursors or RankCursors([StreamCursor()] * max(1, workers))
    batches = streaming.StreamedBatches(encoded, make_settings(), *rank, cursors.cursors, first, buffer=5)
    ready = streaming.streaming_loader(batches, pytest.fail, cursors, workers, CPU)
    found = list(itertools.islice(ready, steps))
    ready.close()
    cursors.advance(repeated=sum(batch.repeated_clips for batch in found))
    return found, cursors


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_continued_after_any_step_gives_the_rest(paths, tmp_path, workers):
    encoded = clips_of(tmp_path, paths)
    whole, _ = loaded(encoded, (1, 2), workers, 11)
    for done in (3, 7):
        head, cursors = loaded(encoded, (1, 2), workers, done)
        rest, _ = loaded(encoded, (1, 2), workers, 11 - done, cursors, first=done)
        for batch, expected in zip(head + rest, whole, strict=True):
            assert batch.clips == expected.clips
            assert torch.equal(batch.noised_BDT, expected.noised_BDT)
            assert torch.equal(batch.t_B, expected.t_B)


def test_a_slot_draws_as_in_indexed_mode_and_its_clip_is_in_the_slots_polarity(paths, tmp_path):
    encoded = clips_of(tmp_path, paths)
    batches, _ = loaded(encoded, (1, 2), 0, 6)
    for local, batch in enumerate(batches):
        for row, slot in enumerate(range(2 * (2 * local + 1), 2 * (2 * local + 1) + 2)):
            number = float(batch.clips[row].split()[1])
            sign = -1 if polarity_of_slot(3, slot) else 1
            assert set(batch.latents_BDT[row, 0].tolist()) <= {sign * number, 0.0}
            start, _ = draw_crop(torch.ones(6), 5, 3, slot)
            assert batch.latents_BDT[row, 1, 0] == start
            assert batch.hidden_BLH[row, 0, 0] == number // 2


def test_a_flipped_byte_anywhere_in_a_shard_is_noticed_and_named_or_changes_nothing(tmp_path):
    (path,) = write_set(tmp_path, [4])
    source, worker = source_of([path]), WorkerShards(1, 1, 0, 1, 0, 1)

    def everything():
        found = taken(source, worker, StreamCursor(), 8)
        return [
            (clip.clip, kind, clip.verified(kind, f"{kind} of {clip.clip.key}"))
            for clip, _, _ in found
            for kind in sorted(clip.content)
        ]

    whole, data = everything(), path.read_bytes()
    draw = random.Random(4)
    # Headers, facts, captions and paddings are as often hit as tensors.
    cursors = [draw.randrange(len(data)) for _ in range(150)] + [
        block + draw.randrange(200) for block in range(0, len(data), 512)
    ]
    noticed = []
    for place in cursors:
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :])
        try:
            assert everything() == whole, place
        except (DataError, EnvironmentFailure) as problem:
            noticed.append(str(problem))
    assert len(noticed) > len(cursors) // 3
    assert [message for message in noticed if path.name not in message or "\n" in message] == []


def test_a_truncated_shard_or_one_that_lost_a_clip_is_noticed(tmp_path):
    (path,) = write_set(tmp_path, [4])
    data = path.read_bytes()
    source, worker = source_of([path]), WorkerShards(1, 1, 0, 1, 0, 1)
    for length in (0, 300, 5000, len(data) // 2, len(data) // 512 // 2 * 512):
        path.write_bytes(data[:length])
        with pytest.raises((DataError, EnvironmentFailure), match=path.name):
            taken(source, worker, StreamCursor(), 5)
    first = data.index(b"clip_01")
    path.write_bytes(data[:first] + bytes(10240))
    with pytest.raises(EnvironmentFailure, match="clip 1 is not in its place"):
        taken(source, worker, StreamCursor(), 5)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_in_a_worker_reaches_the_step_as_its_own_one_line(tmp_path, workers):
    encoded = clips_of(tmp_path, write_set(tmp_path, [2]))
    encoded.source.encoders.__dict__["autoencoder"] = "another"
    with pytest.raises(
        DataError, match=r"latents-000000.tar: encoded with autoencoder a, this base has another"
    ) as caught:
        loaded(encoded, (0, 1), workers, 1)
    assert "\n" not in str(caught.value)


def test_audio_shards_give_the_batches_of_the_latents_made_of_them(demo_base, tmp_path):
    from sa3dist.data.latents.cache import EncodedClips
    from sa3dist.data.latents.encode_tasks import whole_clip_tasks
    from sa3dist.data.source.build import build_shards
    from sa3dist.encode import encode_all, pack_latents
    from sa3dist.model.loading import load_base
    from sa3dist.runtime.signals import StopRequest

    base = load_base(demo_base)
    audio = write_tar(tmp_path / "audio.tar", captioned(4, seconds=0.6))
    index = build_shards(str(audio), tmp_path / "work")
    encoded = EncodedClips(index, tmp_path / "work", base, "a", "t")
    alone = Group(0, 1, CPU)
    encode_all(base, whole_clip_tasks(encoded), alone, StopRequest())
    pack_latents(encoded, alone, StopRequest())
    found = {}
    for name, source in {"audio": audio, "latents": encoded.shards_dir}.items():
        streamed = streaming.StreamedClips(streamed_shards(str(source)), tmp_path, base, "a", "t", max_bytes=1)
        settings, cursors = make_settings(), RankCursors([StreamCursor()])
        batches = streaming.StreamedBatches(streamed, settings, 0, 1, cursors.cursors, 0, buffer=3)
        finish = streaming.encoder_of_decoded(base, streamed, settings)
        found[name] = list(itertools.islice(streaming.streaming_loader(batches, finish, cursors, 0, CPU), 3))
    for one, other in zip(found["audio"], found["latents"], strict=True):
        assert one.clips == other.clips
        for field in ("noised_BDT", "target_BDT", "hidden_BLH", "prompt_mask_BL", "seconds_total_B"):
            assert torch.equal(getattr(one, field), getattr(other, field)), field


def test_audio_that_cannot_be_used_is_named(tmp_path):
    good = captioned(2)
    for name, members in {
        "no caption": {k: v for k, v in good.items() if k != "clip1.txt"},
        "silent": good | {"clip1.wav": encode(tone(peak=0))},
        "broken": good | {"clip1.wav": b"RIFF" + bytes(50)},
        "empty caption": good | {"clip1.txt": b" "},
    }.items():
        path = write_tar(tmp_path / f"{name}.tar", members)
        with pytest.raises(DataError, match=rf"{name}.tar, clip clip1: "):
            taken(source_of([path], encoders=None), WorkerShards(1, 1, 0, 1, 0, 1), StreamCursor(), 3)
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", good)
    (tmp_path / "both.tar").write_bytes((tmp_path / "0.tar").read_bytes() + (tmp_path / "1.tar").read_bytes())
    with pytest.raises(DataError, match=r"both.tar: goes on behind its end, at byte \d+, as where tars were joined"):
        taken(source_of([tmp_path / "both.tar"], encoders=None), WorkerShards(1, 1, 0, 1, 0, 1), StreamCursor(), 3)
    with pytest.raises(DataError, match=r"none.tar: holds no clip"):
        taken(
            source_of([write_tar(tmp_path / "none.tar", {})], encoders=None),
            WorkerShards(1, 1, 0, 1, 0, 1),
            StreamCursor(),
            1,
        )


def test_remote_shards_are_read_through_one_file_per_worker_that_does_not_stay(paths, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in paths:
        memory.pipe(f"/streamed/{path.name}", path.read_bytes())
    urls = streamed_shards("memory://streamed").urls
    assert [url.rsplit("/", 1)[1] for url in urls] == [path.name for path in paths]
    worker, scratch = WorkerShards(1, 6, 0, 1, 0, 1), tmp_path / "scratch"
    expected = [clip.clip.key for clip, _, _ in taken(source_of(paths), worker, StreamCursor(), 30)]
    clips = source_of(paths, urls=urls, scratch=scratch).clips(worker, StreamCursor(), 5)
    assert [next(clips)[0].clip.key for _ in range(30)] == expected
    assert len(list(scratch.iterdir())) <= 1
    clips.close()
    assert list(scratch.iterdir()) == []
    with pytest.raises(DataError, match="max_download_bytes"):
        taken(source_of(paths, urls=urls, scratch=scratch, max_bytes=100), worker, StreamCursor(), 1)


def test_sources_that_cannot_be_streamed_are_refused(paths, tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    for source in (tmp_path / "a.zip", tmp_path):
        with pytest.raises(DataError, match="mode: streaming reads shards"):
            streamed_shards(str(source))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    shutil.copy(paths[0], mixed)
    write_tar(mixed / "audio.tar", captioned(1))
    with pytest.raises(DataError, match="side by side"):
        streamed_shards(str(mixed))


@pytest.mark.parametrize(
    "changed",
    [
        {"bucket_batches": 4},
        {"duration": None},
        {"latents": "crop"},
        {"latents": "on_the_fly"},
        {"pre_encode": True},
        {"on_bad_clip": "skip"},
    ],
)
def test_settings_that_need_an_index_are_refused_by_name(changed):
    values = {"audio_data_url": "x.tar", "mode": "streaming", "duration": 3}
    assert build(values).shuffle_buffer == 256
    with pytest.raises(ConfigError, match=rf"{next(iter(changed))}: with mode: streaming it "):
        build({**values, **changed})


def test_cursors_of_other_ranks_or_workers_are_refused():
    saved = {"cursors": [[[0, 1, 7], [1, 0, 2]], [[0, 0, 3], [0, 2, 1]]], "repeated": 9}
    assert RankCursors.of(saved, 1, 2, 2) == RankCursors([StreamCursor(0, 0, 3), StreamCursor(0, 2, 1)], 9)
    for world, workers in ((1, 2), (4, 2), (2, 1), (2, 4)):
        with pytest.raises(CheckpointError, match="by 2 processes with num_workers 2, this run has"):
            RankCursors.of(saved, 0, world, workers)
