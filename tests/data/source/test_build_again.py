"""The shard stage run again: after a change, after a kill at any moment, and what its report says."""

import random
import shutil

import numpy as np
import pytest

from sa3dist.data.source import build as stage
from sa3dist.data.source import clip_stats, shard_split
from sa3dist.data.source.audio import load_clip_audio
from sa3dist.data.source.build import build_shards
from sa3dist.formats import ClipEntry, DatasetIndex
from tests.helpers.clips import encode, tone, write_folder, write_zip
from tests.helpers.kills import Killable


def many(count=60):
    members = {}
    for number in range(count):
        members[f"take {number:03d}.wav"] = encode(tone(0.1 + 0.005 * number, hertz=200 + number))
        members[f"take {number:03d}.txt"] = f"take {number}".encode()
    return members


def build(members, tmp_path, name="work"):
    source = str(write_zip(tmp_path / "a.zip", members))
    return build_shards(source, tmp_path / name, max_shard_bytes=150_000)


def published(folder):
    """Everything but temporary folders and files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source, and the work directory of a first build."""
    directory = tmp_path_factory.mktemp("built")
    members = many()
    return members, build(members, directory), directory / "work"


@pytest.fixture
def members(built):
    return dict(built[0])


@pytest.fixture
def first(built, tmp_path):
    """The first build, as it lies in this test's own work directory."""
    _, index, work = built
    shutil.copytree(work, tmp_path / "work")
    return DatasetIndex.read(tmp_path / "work" / index.directory.relative_to(work))


@pytest.mark.parametrize("change", ["caption", "audio", "longer audio", "removed", "added"])
def test_one_changed_clip_rewrites_its_own_shard_and_a_neighbour_at_most(members, first, tmp_path, monkeypatch, change):
    assert len(first.shards) >= 8
    match change:
        case "caption":
            members["take 030.txt"] = b"other words"
        case "audio":
            members["take 030.wav"] = encode(tone(0.25, hertz=999))
        case "longer audio":
            members["take 030.wav"] = encode(tone(0.5))
        case "removed":
            del members["take 030.wav"], members["take 030.txt"]
        case "added":
            members |= {"take 030b.wav": encode(tone(0.2)), "take 030b.txt": b"one more"}
    written = []
    original = stage.write_shard
    monkeypatch.setattr(stage, "write_shard", lambda path, *rest: written.append(path.name) or original(path, *rest))
    second = build(members, tmp_path)
    assert 1 <= len(written) <= 2
    assert second.digest != first.digest
    monkeypatch.undo()
    fresh = build(members, tmp_path, "other")
    assert second.clips == fresh.clips
    assert second.shards == fresh.shards
    assert published(second.directory) == published(fresh.directory)
    for clip in second.clips:
        load_clip_audio(second, clip, 44100)


def test_a_damaged_shard_is_not_reused(members, first, tmp_path):
    untouched = first.shards[0]
    path = first.directory / untouched.name
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    members["take 059.txt"] = b"other words"
    second = build(members, tmp_path)
    assert published(second.directory) == published(build(members, tmp_path, "other").directory)


def test_cuts_hang_on_names_so_that_growth_elsewhere_moves_none():
    rng = np.random.default_rng(4)

    def clip(number, size):
        return ClipEntry(f"clip {number:05d}", "", 0, size, "", "wav", 1, 44100, 1, "x")

    clips = [clip(number, int(size)) for number, size in enumerate(rng.integers(1000, 9000, 4000))]
    groups = list(shard_split.split(clips, 100_000))
    assert [c for group in groups for c in group] == clips
    sizes = [sum(c.audio_bytes for c in group) for group in groups]
    assert max(sizes) <= 100_000
    assert len(groups) < 3.5 * sum(sizes) / 100_000
    changed = [clip(2000, 8999) if c.key == "clip 02000" else c for c in clips]
    before, after = ({tuple(c for c in g) for g in shard_split.split(cs, 100_000)} for cs in (clips, changed))
    assert len(before - after) <= 3
    # All that fits into one shard is one shard, and a clip beyond the limit is one of its own.
    assert len(list(shard_split.split(clips[:10], 100_000))) == 1
    assert [len(g) for g in shard_split.split([clip(0, 500), clip(1, 5000), clip(2, 500)], 1000)] == [1, 1, 1]


def test_the_report_tells_people_what_is_where(members, tmp_path):
    members |= {"bad.wav": b"x", "bad.txt": b"x"}
    source = str(write_zip(tmp_path / "a.zip", members))
    index = build_shards(source, tmp_path / "work", on_bad_clip="skip", max_shard_bytes=150_000)
    text = (index.directory / "report.txt").read_text()
    assert "clips        60, 14.9 s" in text
    assert "length       0.10 to 0.40 s, median 0.25 s" in text
    assert "skipped      1\n  bad.wav: cannot be decoded" in text
    assert all(f"{entry.name} {entry.bytes:>12}" in text for entry in index.shards)


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_nothing_wrong_and_the_next_run_gives_the_same_bytes(tmp_path):
    folder = write_folder(tmp_path / "in", many(40))
    program = (
        "from pathlib import Path; from sa3dist.data.source.build import build_shards\n"
        "from sa3dist.inspection.measure import measure_clip\n"
        f"def work(target): build_shards({str(folder)!r}, Path(target), max_shard_bytes=150_000, measure=measure_clip)"
    )
    draw = random.Random(7)
    killed = 0
    with Killable(program) as process:
        process.run(tmp_path / "warm")
        duration, _ = process.run(tmp_path / "whole")
        whole = published(tmp_path / "whole")
        assert clip_stats.NAME in whole
        for moment in range(4):
            work = tmp_path / f"killed-{moment}"
            # Half of them again and again in the same place, as a preempted job is.
            for times in range(1 + moment % 2):
                seconds, was_killed = process.run(work, kill_after=draw.uniform(0, duration))
                killed += was_killed
                if not (was_killed or times):
                    # The run that the moments are drawn by was a slow one.
                    duration = seconds
                for path in work.glob("shards/[0-9a-f]*"):
                    assert DatasetIndex.read(path).digest.startswith(path.name)
            process.run(work)
            assert published(work) == whole, moment
            index = build_shards(str(folder), work, max_shard_bytes=150_000)
            assert len(index.clips) == 40
    assert killed >= 2
