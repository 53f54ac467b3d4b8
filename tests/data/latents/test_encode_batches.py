"""Encoding in batches and on several ranks: what shares a pass changes nothing, and everyone sees how far it is."""

import contextlib
import math
import threading
import time
from concurrent.futures import Future

import pytest
import torch
import torch.distributed as dist

from sa3dist import encode as stage
from sa3dist import progress as progress_module
from sa3dist.data.latents import cache, encode_tasks
from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.encode_tasks import CAPTION_COST, MAX_PASS_FRAMES, clip_tasks, rows_per_pass, whole_clip_tasks
from sa3dist.data.source.build import build_shards
from sa3dist.errors import DataError, Interrupted
from sa3dist.model.loading import load_base
from sa3dist.progress import clock_text, progress
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from tests.helpers.clips import encode, tone, write_zip

CPU = torch.device("cpu")
# Three lengths in frames, the most common one five times.
SECONDS = [0.1, 0.35, 0.1, 0.11, 0.6, 0.12, 0.35, 0.12]


@pytest.fixture(scope="module")
def base(demo_base):
    return load_base(demo_base)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    members = {f"c{n}.wav": encode(tone(s, hertz=200 + 50 * n, channels=2)) for n, s in enumerate(SECONDS)}
    members |= {f"c{n}.txt": f"tone {n}".encode() for n in range(len(SECONDS))}
    return build_shards(str(write_zip(folder / "a.zip", members)), folder / "work")


@pytest.fixture(autouse=True)
def _short_tail(monkeypatch):
    for module in ("cache", "encode_tasks"):
        monkeypatch.setattr(f"sa3dist.data.latents.{module}.SILENCE_TAIL_FRAMES", 4)


def encode_everything(base, index, work_dir, dist_rank=0, world_size=1, batch=1):
    encoded = EncodedClips(index, work_dir, base, "a", "t")
    stage.encode_all(base, whole_clip_tasks(encoded, batch), Group(dist_rank, world_size, CPU), StopRequest())
    return encoded


def published(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors") if not path.name.startswith(".")}


def passes_of(base, monkeypatch):
    """(rows, samples) of every pass through the encoder, as they happen."""
    seen = []
    original = type(base).encode_audio
    monkeypatch.setattr(
        type(base), "encode_audio", lambda self, audio: seen.append(tuple(audio.shape)) or original(self, audio)
    )
    return seen


def test_clips_of_one_length_share_passes_and_their_latents_stay_the_same_to_rounding(
    base, index, tmp_path, monkeypatch
):
    alone = encode_everything(base, index, tmp_path / "alone")
    seen = passes_of(base, monkeypatch)
    together = encode_everything(base, index, tmp_path / "together", batch=4)
    silence = [shape for shape in seen if shape[0] == 1]
    assert len(silence) == 1
    # 0.6 s: two rows; 0.35 s: two clips, four rows; 0.1 to 0.12 s: five clips in three passes.
    assert [shape[0] for shape in seen if shape not in silence] == [2, 4, 4, 4, 2]
    for clip in index.clips:
        for flipped in (False, True):
            one, other = alone.latents(clip, flipped), together.latents(clip, flipped)
            torch.testing.assert_close(one.latents_DT, other.latents_DT, rtol=1e-5, atol=1e-5)
            assert torch.equal(one.peaks_T, other.peaks_T)
        torch.testing.assert_close(alone.prompt(clip.caption), together.prompt(clip.caption), rtol=1e-4, atol=1e-4)


def test_an_interrupted_batch_is_finished_to_the_same_bytes_on_any_number_of_ranks(base, index, tmp_path):
    encoded = encode_everything(base, index, tmp_path, batch=4)
    whole = published(tmp_path)
    encoded.latents_path(index.clips[2], True).unlink()
    encoded.latents_path(index.clips[5], False).unlink()
    encoded.prompt_path(index.clips[1].caption).unlink()
    of_clips = clip_tasks(encoded, 4)
    assert [task.is_missing() for task in of_clips] == [False, False, True, True, False]
    encode_everything(base, index, tmp_path, batch=4)
    assert published(tmp_path) == whole


def test_captions_come_behind_some_clips_and_what_they_need_is_imported_meanwhile(base, index, tmp_path, monkeypatch):
    encoded, order, waited, imports = EncodedClips(index, tmp_path, base, "a", "t"), [], [], Future()
    imports.set_result(None)

    def begin():
        (order if threading.current_thread() is threading.main_thread() else waited).append("begin")
        return imports

    costs = [task.cost for task in clip_tasks(encoded, 1)]
    monkeypatch.setattr(encode_tasks, "AHEAD_COST", sum(costs[:2]) + 0.1)
    monkeypatch.setattr(encode_tasks, "begin_imports", begin)
    for kind in ("encode_prompts", "encode_together"):
        work = getattr(EncodedClips, kind)
        monkeypatch.setattr(EncodedClips, kind, lambda *given, kind=kind, work=work: order.append(kind) or work(*given))
    encode_everything(base, index, tmp_path)
    captions = len({clip.caption for clip in index.clips})
    assert order[:captions] == ["begin"] * captions
    # Both polarities of two clips, then all captions.
    assert order[captions : captions + 4] == ["encode_together"] * 4
    assert order[captions + 4 : 2 * captions + 4] == ["encode_prompts"] * captions
    assert len(waited) == captions
    # All is there: nothing is imported.
    order.clear()
    encode_everything(base, index, tmp_path)
    assert order == []


def test_a_signal_ends_the_wait_for_the_imports(base, index, tmp_path, monkeypatch):
    encoded, stop, imports = EncodedClips(index, tmp_path, base, "a", "t"), StopRequest(), Future()
    monkeypatch.setattr(encode_tasks, "begin_imports", lambda: stop.hear("SIGTERM on rank 0") or imports)
    monkeypatch.setattr(stage, "CLOSE_SECONDS", 0.1)
    with pytest.raises(Interrupted):
        stage.encode_all(base, encode_tasks.caption_tasks(encoded, 1), Group(0, 1, CPU), stop)
    imports.set_result(None)


def test_a_pass_holds_no_more_than_one_longest_clip(base, index, tmp_path):
    encoded = EncodedClips(index, tmp_path, base, "a", "t")
    tails = 2 * cache.SILENCE_TAIL_FRAMES
    for rows, frames in [
        (64, 7),
        (2, MAX_PASS_FRAMES // 2 - tails),
        (1, MAX_PASS_FRAMES // 2),
        (1, 9999),
    ]:
        assert rows_per_pass(frames, 64) == rows
    assert sum(task.count for task in clip_tasks(encoded, 64)) == len(SECONDS)


def test_a_clip_is_decoded_once_for_both_polarities(base, index, tmp_path, monkeypatch):
    decoded = []
    original = cache.load_clip_audio
    monkeypatch.setattr(
        cache, "load_clip_audio", lambda index, clip, rate: decoded.append(clip.key) or original(index, clip, rate)
    )
    encode_everything(base, index, tmp_path)
    assert sorted(decoded) == [f"c{n}" for n in range(len(SECONDS))]


def test_a_clip_that_cannot_be_read_ends_the_stage_in_its_own_line(base, index, tmp_path, monkeypatch):
    def broken(index, clip, rate):
        raise DataError(f"clip {clip.key}: damaged")

    monkeypatch.setattr(cache, "load_clip_audio", broken)
    # The longest goes first.
    with pytest.raises(DataError, match="^clip c4: damaged$"):
        encode_everything(base, index, tmp_path)


def as_two_ranks(monkeypatch, work):
    """work(dist_rank) in two threads with one store."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    threads = [threading.Thread(target=work, args=(dist_rank,)) for dist_rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_both_ranks_encode_and_return_together_and_rank_0_alone_shows_its_share(
    base, index, tmp_path, monkeypatch, capsys
):
    ended, original = [], EncodedClips.encode_together

    def slow_on_rank_1(self, base, rows):
        if threading.current_thread().name == "slow":
            time.sleep(0.05)
            assert not ended
        original(self, base, rows)

    monkeypatch.setattr(EncodedClips, "encode_together", slow_on_rank_1)

    def work(dist_rank):
        threading.current_thread().name = ("quick", "slow")[dist_rank]
        encode_everything(base, index, tmp_path, dist_rank, 2)
        ended.append(dist_rank)

    as_two_ranks(monkeypatch, work)
    assert sorted(ended) == [0, 1]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("encode ")]
    # Eight captions and eight clips, half of them on each rank.
    assert lines == ["encode 8/8 ETA 0:00"]
    assert len(published(tmp_path)) == 3 * len(SECONDS)


def test_the_time_left_goes_by_what_pieces_cost_not_by_how_many_they_are(base, index, tmp_path, monkeypatch):
    left = []
    # One second from one report to the next.
    monkeypatch.setattr(stage.time, "monotonic", lambda: float(len(left)))

    @contextlib.contextmanager
    def recorded(title, total, shown):
        yield lambda done, seconds_left: left.append(seconds_left)

    monkeypatch.setattr(stage, "progress", recorded)
    encode_everything(base, index, tmp_path)
    costs = [task.cost for task in whole_clip_tasks(EncodedClips(index, tmp_path, base, "a", "t"))]
    assert len(costs) == 2 * len(SECONDS)
    assert costs.count(CAPTION_COST) >= len(SECONDS)
    done = [sum(costs[:count]) for count in range(1, len(costs) + 1)]
    assert left[0] == math.inf
    expected = [seconds * (sum(costs) - cost) / cost for seconds, cost in enumerate(done, start=1)]
    assert left[1:] == pytest.approx(expected)


def test_a_bar_without_a_terminal_says_every_tenth_and_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    with progress("check", 100, shown=True) as update:
        for done in range(0, 101, 3):
            update(done, "x", seconds_left=float(100 - done))
        update(100, "x", seconds_left=0.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "check 0/100 x ETA 1:40"
    assert lines[1] == "check 12/100 x ETA 1:28"
    assert lines[-1] == "check 100/100 x ETA 0:00"
    assert len(lines) == 11


@pytest.mark.parametrize("total", [1, 4, 10, 1000])
def test_what_is_done_in_a_moment_is_one_line_of_a_log(capsys, total):
    with progress("check", total, shown=True) as update:
        for done in range(total + 1):
            update(done, "x", seconds_left=0.0)
    assert capsys.readouterr().err.splitlines() == [f"check {total}/{total} x ETA 0:00"]


def test_lines_of_a_log_keep_their_distance_but_for_the_last(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with progress("check", 10, shown=True) as update:
        for done in range(1, 11):
            update(done, seconds_left=0.0)
    said = [int(line.split()[1].partition("/")[0]) for line in capsys.readouterr().err.splitlines()]
    # Four seconds a clip: three of them are the first that make ten seconds.
    assert said == [3, 6, 9, 10]


def test_times_are_written_as_clocks_show_them():
    assert [clock_text(seconds) for seconds in (0, 9, 61.4, 3600, 90061, math.inf)] == [
        "0:00",
        "0:09",
        "1:01",
        "1:00:00",
        "25:01:01",
        "-",
    ]
