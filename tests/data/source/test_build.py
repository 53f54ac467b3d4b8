"""The shard stage: all problems at once, shards that depend on the clips alone, and no work done twice."""

import dataclasses
import hashlib
import json
import os
import tarfile
import threading

import pytest
import webdataset

from sa3dist import formats
from sa3dist.data.source import audio, build, check, prefetch
from sa3dist.data.source.audio import check_audio, load_clip_audio
from sa3dist.data.source.build import build_shards
from sa3dist.data.source.tar_writer import member_stem
from sa3dist.errors import DataError, EnvironmentFailure, Interrupted
from sa3dist.formats import DatasetIndex
from tests.helpers.clips import captioned, encode, tone, write_folder, write_zip

FORMATS = [("wav", "WAV"), ("flac", "FLAC"), ("ogg", "OGG"), ("mp3", "MP3"), ("aiff", "AIFF")]


def varied():
    members = {}
    for number, (extension, container) in enumerate(FORMATS * 2):
        name = f"Set A/{'take.' * (number % 2)}{number} häuser"
        data = tone(0.1 + 0.05 * number, (22050, 44100, 48000)[number % 3], 1 + number % 2, hertz=200 + 50 * number)
        members[f"{name}.{extension}"] = encode(data, (22050, 44100, 48000)[number % 3], container)
        members[f"{name}.txt"] = f"Klang {number}".encode()
    members["Set A/5 opus.opus"] = encode(tone(0.5, 48000), 48000, "OGG", "OPUS")
    members["Set A/5 opus.txt"] = b"an opus clip"
    return members


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_hold_the_bytes_that_came_in_and_the_index_says_where(tmp_path):
    members = varied()
    index = build_shards(str(write_zip(tmp_path / "a.zip", members)), tmp_path / "work", max_shard_bytes=30_000)
    assert len(index.clips) == 11
    assert len(index.shards) > 3
    assert [clip.key for clip in index.clips] == sorted(clip.key for clip in index.clips)
    for clip in index.clips:
        original = members[f"{clip.key}.{clip.extension}"]
        data = (index.directory / clip.shard).read_bytes()
        assert data[clip.audio_offset : clip.audio_offset + clip.audio_bytes] == original
        assert clip.audio_sha256 == hashlib.sha256(original).hexdigest()
        assert clip.caption == members[f"{clip.key}.txt"].decode()
        facts = check_audio(original)
        assert (clip.samples, clip.sample_rate_hz, clip.channels) == dataclasses.astuple(facts)
        assert load_clip_audio(index, clip, 44100).shape == (2, -(-clip.samples * 44100 // clip.sample_rate_hz))
    assert DatasetIndex.read(index.directory) == index
    for entry in index.shards:
        data = (index.directory / entry.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)


def test_plain_webdataset_reads_the_shards_back(tmp_path):
    members = varied()
    index = build_shards(str(write_zip(tmp_path / "a.zip", members)), tmp_path / "work", max_shard_bytes=30_000)
    urls = [str(index.directory / entry.name) for entry in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == len(index.clips)
    for sample, clip in zip(samples, index.clips, strict=True):
        assert sample[clip.extension] == members[f"{clip.key}.{clip.extension}"]
        assert sample["txt"].decode() == clip.caption
        assert sample["__key__"] == member_stem(clip.key)
    with tarfile.open(urls[0]) as archive:
        assert {(info.mtime, info.uid, info.mode) for info in archive} == {(0, 0, 0o644)}


def test_member_names_are_plain_and_never_collide():
    hashed = member_stem("a.b")
    keys = ["a.b", "a_b", "a b", "a/b", hashed, "x" * 200, "x" * 201, "kick_01", "é"]
    stems = [member_stem(key) for key in keys]
    assert len(set(stems)) == len(keys)
    assert all(stem.isascii() and "." not in stem and "/" not in stem and len(stem) <= 64 for stem in stems)
    assert member_stem("kick_01") == "kick_01"


def test_the_shards_do_not_depend_on_workers_archive_or_order(tmp_path):
    members = varied()
    build_shards(str(write_zip(tmp_path / "a.zip", members)), tmp_path / "w1", num_workers=1)
    backwards = write_zip(tmp_path / "b.zip", dict(reversed(members.items())))
    build_shards(str(backwards), tmp_path / "w4", num_workers=4)
    build_shards(str(write_folder(tmp_path / "folder", members)), tmp_path / "w0")
    assert files_of(tmp_path / "w1") == files_of(tmp_path / "w4") == files_of(tmp_path / "w0")


def test_a_second_run_decodes_nothing_and_writes_nothing(tmp_path, monkeypatch):
    source = str(write_zip(tmp_path / "a.zip", varied()))
    first = build_shards(source, tmp_path / "work")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*")}
    monkeypatch.setattr(check, "check_audio", lambda data: pytest.fail("decoded again"))
    monkeypatch.setattr(build, "write_shard", lambda *_: pytest.fail("written again"))
    assert build_shards(source, tmp_path / "work") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*")} == before


def test_one_changed_clip_is_the_only_one_decoded(tmp_path, monkeypatch):
    members = varied()
    first = build_shards(str(write_zip(tmp_path / "a.zip", members)), tmp_path / "work")
    members["Set A/5 opus.opus"] = encode(tone(0.7, 48000, hertz=90), 48000, "OGG", "OPUS")
    decoded = []
    monkeypatch.setattr(check, "check_audio", lambda data: decoded.append(data) or check_audio(data))
    second = build_shards(str(write_zip(tmp_path / "a.zip", members)), tmp_path / "work")
    assert decoded == [members["Set A/5 opus.opus"]]
    assert second.digest != first.digest
    assert sum(a.audio_sha256 == b.audio_sha256 for a, b in zip(first.clips, second.clips, strict=True)) == 10


@pytest.mark.parametrize("damage", ["missing shard", "short shard", "damaged index", "missing index", "other index"])
def test_a_damaged_result_is_made_again(tmp_path, damage):
    source = str(write_zip(tmp_path / "a.zip", captioned(4)))
    index = build_shards(source, tmp_path / "work")
    whole = files_of(tmp_path / "work")
    tar, table = index.directory / "shard-000000.tar", index.directory / "index.json"
    match damage:
        case "missing shard":
            tar.unlink()
        case "short shard":
            tar.write_bytes(tar.read_bytes()[:-1])
        case "damaged index":
            table.write_text(table.read_text().replace("number 2", "number 3"))
        case "missing index":
            table.unlink()
        case "other index":
            dataclasses.replace(index, digest="0" * 64).write()
    build_shards(source, tmp_path / "work")
    assert files_of(tmp_path / "work") == whole


def test_every_flipped_byte_of_the_index_is_noticed_or_harmless(tmp_path):
    index = build_shards(str(write_zip(tmp_path / "a.zip", captioned(4))), tmp_path / "work")
    path = index.directory / "index.json"
    whole = path.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            read = DatasetIndex.read(index.directory)
        except DataError:
            noticed += 1
        else:
            # White space between the fields may change.
            read_is_same = read == index
            assert read_is_same, place
    assert noticed > 100


def test_an_index_of_another_version_is_refused(tmp_path):
    index = build_shards(str(write_zip(tmp_path / "a.zip", captioned(4))), tmp_path / "work")
    path = index.directory / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(DataError, match="index version 99, expected 2; run sa3dist shard"):
        DatasetIndex.read(index.directory)


def spoiled():
    return captioned(5) | {
        "bad0.wav": b"no audio",
        "bad0.txt": b"\xff\xfe",
        "bad1.wav": encode(tone(peak=0)),
        "bad1.txt": b"silence",
        "bad2.wav": encode(tone()[:1]),
        "bad2.txt": b"one sample",
        "orphan.flac": encode(tone(), container="FLAC"),
        "widow.txt": b"nothing to hear",
        "twin.wav": encode(tone()),
        "twin.mp3": encode(tone(), container="MP3"),
        "twin.txt": b"which one",
    }


def test_all_problems_are_reported_at_once_and_nothing_is_left(tmp_path):
    source = write_zip(tmp_path / "a.zip", spoiled())
    with pytest.raises(DataError) as caught:
        build_shards(str(source), tmp_path / "work")
    lines = [line.removeprefix(f"{source}: ") for line in str(caught.value).split("\n")]
    assert [line.split(":")[0] for line in lines] == [
        "bad0.txt",
        "bad0.wav",
        "bad1.wav",
        "bad2.wav",
        "orphan.flac",
        "twin.mp3 and twin.wav and twin.txt",
        "widow.txt",
    ]
    assert list(tmp_path.iterdir()) == [source]


def test_skipping_names_what_is_left_out_and_trains_on_the_rest(tmp_path):
    source = write_zip(tmp_path / "a.zip", spoiled())
    index = build_shards(str(source), tmp_path / "work", on_bad_clip="skip")
    assert [clip.key for clip in index.clips] == [f"clip{n}" for n in range(5)]
    assert [line.split(":")[0].split(" ")[0] for line in index.skipped] == [
        "bad0.txt",
        "bad1.wav",
        "bad2.wav",
        "orphan.flac",
        "twin.mp3",
        "widow.txt",
    ]
    assert "bad0.wav: cannot be decoded" in index.skipped[0]
    clean = build_shards(str(write_zip(tmp_path / "b.zip", captioned(5))), tmp_path / "work")
    assert (clean.digest, clean.clips, clean.skipped) == (index.digest, index.clips, ())


def test_a_hostile_member_is_never_skipped(tmp_path):
    source = write_zip(tmp_path / "a.zip", captioned(5) | {"../x.wav": b""})
    with pytest.raises(DataError, match=r"\.\./x.wav: points outside"):
        build_shards(str(source), tmp_path / "work", on_bad_clip="skip")


def test_many_problems_are_capped_and_counted(tmp_path):
    source = write_zip(tmp_path / "a.zip", captioned(4) | {f"{n:03d}.wav": b"x" for n in range(57)})
    with pytest.raises(DataError) as caught:
        build_shards(str(source), tmp_path / "work")
    lines = str(caught.value).split("\n")
    assert len(lines) == 21
    assert lines[-1] == f"{source}: and 37 more problems"


@pytest.mark.parametrize("on_bad_clip", ["raise", "skip"])
def test_the_number_of_clips_is_limited_unless_lifted(tmp_path, monkeypatch, on_bad_clip):
    three = str(write_zip(tmp_path / "3.zip", captioned(3)))
    with pytest.raises(DataError, match="found 3 usable clips, expected 4 to 2000; set allow_any_dataset_size: true"):
        build_shards(three, tmp_path / "work", on_bad_clip=on_bad_clip)
    lifted = build_shards(three, tmp_path / "work", on_bad_clip=on_bad_clip, allow_any_dataset_size=True)
    assert len(lifted.clips) == 3
    monkeypatch.setattr(check, "CLIP_COUNT_RANGE", (4, 6))
    seven = str(write_zip(tmp_path / "7.zip", captioned(7)))
    with pytest.raises(DataError, match="found 7 usable clips, expected 4 to 6"):
        build_shards(seven, tmp_path / "work", on_bad_clip=on_bad_clip)
    none = str(write_zip(tmp_path / "0.zip", {"readme.pdf": b"x"}))
    with pytest.raises(DataError, match="found no usable clip"):
        build_shards(none, tmp_path / "work", on_bad_clip=on_bad_clip, allow_any_dataset_size=True)


def test_too_few_clips_after_skipping_says_why(tmp_path):
    source = write_zip(tmp_path / "a.zip", captioned(3) | {"x.wav": b"no audio", "x.txt": b"x"})
    with pytest.raises(DataError) as caught:
        build_shards(str(source), tmp_path / "work", on_bad_clip="skip")
    count, reason = str(caught.value).split("\n")
    assert "found 3 usable clips" in count
    assert "x.wav: cannot be decoded" in reason


def test_progress_is_reported_clip_by_clip(tmp_path):
    seen = []
    source = str(write_zip(tmp_path / "a.zip", captioned(6)))
    build_shards(source, tmp_path / "work", report=lambda done, total: seen.append((done, total)), num_workers=3)
    assert seen == [(n, 6) for n in range(1, 7)]


@pytest.mark.parametrize("polls", [1, 5, 8, 11])
def test_a_stop_request_ends_either_phase_and_leaves_nothing(tmp_path, polls):
    source = write_zip(tmp_path / "a.zip", captioned(6))
    asked = []
    with pytest.raises(Interrupted, match="a.zip: stopped while (checking clips|writing shards); run again"):
        build_shards(str(source), tmp_path / "work", should_stop=lambda: asked.append(1) or len(asked) > polls)
    assert len(asked) == polls + 1
    assert not list(tmp_path.rglob("*.t*r")) + list(tmp_path.rglob("*.tmp"))


def test_a_clip_that_changes_between_check_and_write_is_noticed(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "in", captioned(4))
    original = build.raise_or_skip

    def meddle(*args):
        data = bytearray((folder / "clip2.wav").read_bytes())
        data[-1] ^= 1
        (folder / "clip2.wav").write_bytes(data)
        return original(*args)

    monkeypatch.setattr(build, "raise_or_skip", meddle)
    with pytest.raises(DataError, match=r"clip2.wav changed while it was read; run again"):
        build_shards(str(folder), tmp_path / "work")
    assert files_of(tmp_path / "work") == {}


def test_a_full_disk_is_an_environment_failure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_shard", full)
    with pytest.raises(EnvironmentFailure, match="cannot write shards .No space left on device."):
        build_shards(str(write_zip(tmp_path / "a.zip", captioned(4))), tmp_path / "work")
    assert files_of(tmp_path / "work") == {}


def test_leftovers_of_a_killed_run_are_cleared_once_they_are_old(tmp_path):
    fresh, old = (tmp_path / "work" / "shards" / name for name in (".aa.1.tmp", ".bb.2.tmp"))
    for leftover in (fresh, old):
        leftover.mkdir(parents=True)
        (leftover / "shard-000000.tar").write_bytes(b"half")
    os.utime(old, (0, 0))
    build_shards(str(write_zip(tmp_path / "a.zip", captioned(4))), tmp_path / "work")
    assert fresh.exists()
    assert not old.exists()


def test_two_runs_at_once_share_one_result(tmp_path):
    source = str(write_zip(tmp_path / "a.zip", varied()))
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(build_shards(source, tmp_path / "work"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result == results[0] for result in results)
    assert [path.name for path in (tmp_path / "work" / "shards").iterdir()] == [results[0].digest[:16]]


def test_clips_in_flight_are_bounded_by_bytes(tmp_path, monkeypatch):
    lock, live, most = threading.Lock(), set(), []
    monkeypatch.setattr(prefetch, "IN_FLIGHT_BYTES", 60_000)

    def watched(data):
        with lock:
            live.add(id(data))
            most.append(len(live))
        facts = audio.check_audio(data)
        with lock:
            live.discard(id(data))
        return facts

    monkeypatch.setattr(check, "check_audio", watched)
    # 26 kB each: two fit.
    build_shards(str(write_zip(tmp_path / "a.zip", captioned(12))), tmp_path / "work", num_workers=8)
    assert max(most) <= 2


def test_an_old_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("old")
    with formats.atomic_directory(target) as temporary:
        (temporary / "new").write_text("new")
        assert files_of(target) == {"old": b"old"}
    assert files_of(tmp_path) == {"result/new": b"new"}


def test_where_no_folder_can_be_made_the_reason_is_raised(tmp_path):
    (tmp_path / "work").symlink_to(tmp_path / "unmounted")
    with pytest.raises(FileExistsError, match="work"), formats.atomic_directory(tmp_path / "work" / "in" / "result"):
        pass


def test_a_folder_is_not_replaced_by_half_of_another(tmp_path):
    target = write_folder(tmp_path / "result", {"new": b"new"})

    def fail():
        with formats.atomic_directory(target) as temporary:
            (temporary / "newer").write_text("newer")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with formats.atomic_directory(target, unless=lambda: True) as temporary:
        (temporary / "newer").write_text("newer")
    assert files_of(tmp_path) == {"result/new": b"new"}
