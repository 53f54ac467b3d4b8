"""Shards that stay remote: read clip by clip over ranges, never a wrong byte, in a cache of bounded size."""

import contextlib
import dataclasses
import hashlib
import logging
import multiprocessing
import os
import random
import threading
import time

import pytest
import torch

from sa3dist import config
from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.shards import LatentShard, read_member
from sa3dist.data.latents.source import fetch_latents, latent_shards_of, read_latents
from sa3dist.data.remote import download
from sa3dist.data.remote.disk_cache import ClipCache
from sa3dist.data.remote.ranges import read_range
from sa3dist.data.source.audio import load_clip_audio
from sa3dist.data.source.build import build_shards
from sa3dist.data.source.remote_index import attach, index_remote
from sa3dist.errors import DataError, EnvironmentFailure, Interrupted
from sa3dist.formats import DatasetIndex
from sa3dist.pipeline import Run
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from tests.helpers.clips import captioned, encode, tone, write_tar, write_zip
from tests.helpers.latent_sets import ENCODERS, Framing, write_set
from tests.helpers.servers import hostile_http, s3_bucket


def never():
    return False


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(download, "RETRY_PAUSES_SECONDS", (0.01,) * 5)
    monkeypatch.setattr("sa3dist.data.remote.fetch.SILENT_SECONDS", 0.5)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Index of 9 clips in several shards, written by the shard stage."""
    folder = tmp_path_factory.mktemp("local")
    members = captioned(8, seconds=0.2) | {"long.wav": encode(tone(1.5, hertz=99, channels=2)), "long.txt": b"a drone"}
    index = build_shards(str(write_zip(folder / "a.zip", members)), folder / "work", max_shard_bytes=60_000)
    assert len(index.shards) > 3
    return index


@pytest.fixture
def site(local):
    with hostile_http(files={path.name: path.read_bytes() for path in local.directory.iterdir()}) as server:
        server.drop_after = 50_000
        yield server


@pytest.fixture(scope="module")
def audio(local):
    return {clip.key: load_clip_audio(local, clip, 44100) for clip in local.clips}


def opened(source, work, cache_bytes=1 << 30, **options):
    index, urls = index_remote(source, work, **options, cache_bytes=cache_bytes)
    # Every rank reads the index that rank 0 has left.
    return attach(DatasetIndex.read(index.directory), urls, work, cache_bytes, never)


def assert_audio(index, audio):
    assert len(index.clips) == len(audio)
    for clip in index.clips:
        assert torch.equal(load_clip_audio(index, clip, 44100), audio[clip.key])


def bytes_asked(server):
    return sum(int(a.split("-")[1]) - int(a.split("=")[1].split("-")[0]) + 1 for _, a in server.requests if a)


@pytest.mark.parametrize("traits", ["etag", "plain", "redirect", "throttle", "drop", "flaky", "flaky,drop", "glitch"])
def test_clips_are_read_by_range_from(site, local, audio, tmp_path, monkeypatch, traits):
    monkeypatch.setattr(download, "SMALLEST_BLOCK_BYTES", 20_000)
    index = opened(f"{site.url}/{traits}/index.json", tmp_path)
    assert (index.clips, index.shards, index.digest) == (local.clips, local.shards, local.digest)
    site.requests.clear()
    assert_audio(index, audio)
    assert all(asked for method, asked in site.requests if method == "GET"), "a whole file was fetched"
    # What was read once comes from the disk.
    site.requests.clear()
    assert_audio(index, audio)
    assert site.requests == []
    assert not list(tmp_path.rglob("*.tar"))


def test_a_part_that_never_ends_is_refused_after_what_was_asked_for(site, local):
    entry = local.clips[2]
    with pytest.raises(DataError, match=r"answers a request for \d+ bytes with more") as caught:
        read_range(f"{site.url}/endless/{entry.shard}?key=secret", 10**6, entry.audio_offset, entry.audio_bytes, never)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    # One request, no retries; what the sockets between hold has been sent too.
    assert len(site.requests) == 1
    assert site.sent < 32 << 20


def test_only_the_clips_asked_for_are_fetched(site, local, tmp_path):
    index = opened(f"{site.url}/plain/index.json", tmp_path)
    site.requests.clear()
    load_clip_audio(index, index.clips[2], 44100)
    assert bytes_asked(site) == index.clips[2].audio_bytes


def test_named_shards_of_an_indexed_set_give_their_own_clips(site, local, audio, tmp_path):
    index = opened(f"{site.url}/etag/shard-{{000001..000002}}.tar", tmp_path, allow_any_dataset_size=True)
    assert {clip.shard for clip in index.clips} == {"shard-000001.tar", "shard-000002.tar"}
    assert list(index.clips) == [clip for clip in local.clips if clip.shard in ("shard-000001.tar", "shard-000002.tar")]
    assert_audio(index, {clip.key: audio[clip.key] for clip in index.clips})


@pytest.fixture
def foreign(tmp_path):
    """Tars as others write them, two of them with the same names inside, without an index."""
    files = {}
    for number, hertz in enumerate((300, 700, 700)):
        members = {}
        for clip in range(3):
            members[f"{clip if number else clip + 10}.wav"] = encode(tone(0.2 + number / 20, hertz=hertz + 50 * clip))
            members[f"{clip if number else clip + 10}.txt"] = f"tone {number} {clip}".encode()
        files[f"x-{number:03d}.tar"] = write_tar(tmp_path / "x.tar", members).read_bytes()
    with hostile_http(files=files) as server:
        yield server


def test_shards_without_an_index_are_read_once_and_then_by_range(foreign, tmp_path):
    source = f"{foreign.url}/etag/x-{{000..002}}.tar"
    index = opened(source, tmp_path / "work")
    assert [clip.key for clip in index.clips] == [f"x-000/{n}" for n in (10, 11, 12)] + [
        f"x-00{number}/{n}" for number in (1, 2) for n in range(3)
    ]
    whole = sum(len(data) for data in foreign.files.values())
    assert bytes_asked(foreign) <= whole + 10_000
    for entry in index.shards:
        data = foreign.files[entry.name]
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    # The clips stayed in the cache: nothing is fetched twice, and no shard is kept.
    foreign.requests.clear()
    for clip in index.clips:
        load_clip_audio(index, clip, 44100)
    assert foreign.requests == []
    assert not list((tmp_path / "work").rglob("*.tar"))
    downloaded = build_shards(source, tmp_path / "other")
    sounds = {clip.audio_sha256: load_clip_audio(downloaded, clip, 44100) for clip in downloaded.clips}
    # With an empty cache every clip comes by itself.
    again = attach(index, index.reader.urls, tmp_path / "fresh", 0, never)
    for clip in again.clips:
        assert torch.equal(load_clip_audio(again, clip, 44100), sounds[clip.audio_sha256])
    assert bytes_asked(foreign) <= 2 * whole + sum(clip.audio_bytes for clip in index.clips)


def test_a_known_shard_is_not_read_again_and_a_changed_one_is(foreign, tmp_path):
    source = f"{foreign.url}/etag/x-{{000..002}}.tar"
    first = opened(source, tmp_path / "work")
    foreign.requests.clear()
    assert opened(source, tmp_path / "work") == first
    assert bytes_asked(foreign) <= 2
    changed = captioned(3, seconds=0.3)
    foreign.files["x-001.tar"] = write_tar(tmp_path / "y.tar", changed).read_bytes()
    foreign.requests.clear()
    second = opened(source, tmp_path / "work")
    # No name is shared any more.
    assert {"clip0", "clip1", "clip2", "0", "1", "2", "10"} <= {clip.key for clip in second.clips}
    assert bytes_asked(foreign) <= len(foreign.files["x-001.tar"]) + 2
    assert second.digest != first.digest


def test_bad_clips_of_remote_shards_are_listed_or_skipped(foreign, tmp_path):
    members = {"bad.wav": b"no audio", "bad.txt": b"x", "orphan.wav": encode(tone())}
    foreign.files["x-002.tar"] = write_tar(tmp_path / "y.tar", members).read_bytes()
    source = f"{foreign.url}/etag/x-{{000..002}}.tar"
    with pytest.raises(DataError) as caught:
        opened(source, tmp_path / "work")
    lines = str(caught.value).split("\n")
    assert len(lines) == 2
    assert "x-002.tar, bad.wav: cannot be decoded" in lines[0]
    assert "x-002.tar, orphan.wav: audio without a caption" in lines[1]
    index = opened(source, tmp_path / "work", on_bad_clip="skip")
    assert len(index.clips) == 6
    skipped, _ = index_remote(source, tmp_path / "work", on_bad_clip="skip")
    assert [line.split(":")[0] for line in skipped.skipped] == ["x-002.tar, bad.wav", "x-002.tar, orphan.wav"]
    with pytest.raises(DataError, match="found 6 usable clips, expected 4 to 2000|bad.wav"):
        opened(source, tmp_path / "work")


def test_what_remote_shards_hold_besides_clips_is_named_each_time(foreign, tmp_path):
    for number in (1, 2):
        members = captioned(3, folder=f"{number}/") | {"song.m4a": b"", "cover.jpg": b"", ".DS_Store": b""}
        foreign.files[f"x-00{number}.tar"] = write_tar(tmp_path / "y.tar", members).read_bytes()
    for _ in range(2):
        index = opened(f"{foreign.url}/etag/x-{{000..002}}.tar", tmp_path / "work")
        assert [(kind.what, kind.count, kind.names) for kind in index.left_out] == [
            ("m4a file", 2, ("x-001.tar/song.m4a", "x-002.tar/song.m4a")),
            ("other file", 2, ("x-001.tar/cover.jpg", "x-002.tar/cover.jpg")),
            ("system file", 2, ()),
        ]
        assert "x-001.tar/song.m4a" in (index.directory / "report.txt").read_text()


def test_a_server_without_ranges_is_said_and_its_shards_are_downloaded_whole(site, audio, tmp_path, caplog):
    source = f"{site.url}/etag,norange/shard-{{000000..00000{len(site.files) - 3}}}.tar"
    settings = config.build({"audio_data_url": source, "work_dir": str(tmp_path / "work")})
    with caplog.at_level(logging.WARNING):
        index = Run(settings, Group(0, 1, torch.device("cpu")), StopRequest()).shard()
    assert "does not send parts of files, downloading the shards whole" in caplog.text
    assert index.reader is None
    assert_audio(index, audio)


@pytest.mark.parametrize(
    ("traits", "failure", "message"),
    [
        ("corrupt", DataError, r"shard-\d+.tar, clip \S+: the audio bytes are not the ones in the index"),
        ("busy", EnvironmentFailure, r"shard-\d+.tar: download failed \(status 503\); run again"),
        ("stall", EnvironmentFailure, r"shard-\d+.tar: download failed"),
        ("norange", EnvironmentFailure, r"shard-\d+.tar: the server does not send parts of files"),
    ],
)
def test_a_server_that_turns_bad_gives_one_line(site, tmp_path, monkeypatch, traits, failure, message):
    monkeypatch.setattr(download, "RETRY_PAUSES_SECONDS", (0.01,))
    index = opened(f"{site.url}/plain/index.json", tmp_path)
    urls = {name: f"{site.url}/{traits}/{name}?signature=hunter2" for name in index.reader.urls}
    bad = attach(index, urls, tmp_path / "bad", 1 << 20, never)
    begin = time.monotonic()
    with pytest.raises(failure, match=message) as caught:
        load_clip_audio(bad, bad.clips[-1], 44100)
    assert time.monotonic() - begin < 20
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert not [path for path in (tmp_path / "bad").rglob("*") if path.is_file()]


def test_shards_that_do_not_fit_their_index_are_refused_or_noticed_when_read(site, local, tmp_path):
    name = local.clips[0].shard
    whole = site.files[name]
    site.files[name] = whole + bytes(512)
    with pytest.raises(DataError, match=rf"{name}: {len(whole) + 512} bytes, its index says {len(whole)}"):
        opened(f"{site.url}/plain/index.json", tmp_path)
    site.files[name] = bytes(len(whole))
    index = opened(f"{site.url}/plain/index.json", tmp_path)
    with pytest.raises(DataError, match=f"{name}, clip {local.clips[0].key}: the audio bytes are not the ones"):
        load_clip_audio(index, local.clips[0], 44100)
    del site.files[name]
    with pytest.raises(DataError, match=f"{name}: not found"):
        opened(f"{site.url}/plain/index.json", tmp_path)


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "html"])
def test_a_missing_or_damaged_index_is_one_line(site, tmp_path, damage):
    whole = site.files.pop("index.json")
    if damage != "missing":
        made = {"flipped": whole.replace(b"tone number 3", b"tone number 4"), "cut": whole[:-9], "html": b"<html>"}
        site.files["index.json"] = made[damage]
    message = {
        "missing": "not found",
        "flipped": "damaged, its digest does not match",
        "html": "the server sends a web page",
    }.get(damage, "not a readable shard index")
    with pytest.raises(DataError, match=f"plain/index.json: {message}") as caught:
        index_remote(f"{site.url}/plain/index.json", tmp_path / "work")
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": "../../etc/passwd"}, "lies in a shard that is not listed"),
        ({"audio_offset": -1}, "has no usable place"),
        ({"audio_bytes": 1 << 40}, "has no usable place"),
        ({"audio_offset": 10**6}, "lies outside its shard"),
        ({"audio_sha256": "../x"}, "has no usable digest"),
        ({"extension": "exe"}, "has no usable digest or extension"),
        ({"samples": "many"}, "has no usable length"),
        ({"sample_rate_hz": 0}, "has no usable length"),
        ({"caption": " "}, "has no caption"),
        ({"key": "../x"}, "has an unusable name"),
    ],
)
def test_a_strangers_index_is_not_believed(site, local, tmp_path, change, message):
    clips = sorted([dataclasses.replace(local.clips[0], **change), *local.clips[1:]], key=lambda clip: clip.key)
    dataclasses.replace(local, directory=tmp_path, clips=tuple(clips)).write()
    site.files["index.json"] = (tmp_path / "index.json").read_bytes()
    with pytest.raises(DataError, match=rf"index.json: .*{message}") as caught:
        opened(f"{site.url}/plain/index.json", tmp_path / "work")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "work" / "shards").exists()


def test_a_stop_request_ends_the_pauses_of_a_read(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RETRY_PAUSES_SECONDS", (60,))
    begin = time.monotonic()
    with pytest.raises(Interrupted):
        read_range(f"{site.url}/busy/shard-000000.tar", 10_000, 512, 100, lambda: True)
    assert time.monotonic() - begin < 60


@pytest.fixture
def bucket(monkeypatch):
    with s3_bucket(monkeypatch) as system:
        yield system


def test_shards_in_s3_are_read_by_range_with_and_without_an_index(bucket, local, audio, tmp_path):
    for path in local.directory.iterdir():
        bucket.pipe(f"clips/set/{path.name}", path.read_bytes())
    last = len(local.shards) - 1
    for source in ("s3://clips/set", "s3://clips/set/index.json", f"s3://clips/set/shard-{{000000..00000{last}}}.tar"):
        index = opened(source, tmp_path / "with", cache_bytes=0)
        assert index.clips == local.clips
        assert_audio(index, audio)
    bucket.rm("clips/set/index.json")
    index = opened("s3://clips/set", tmp_path / "without", cache_bytes=0)
    assert index.clips == local.clips
    assert_audio(index, audio)
    assert not list(tmp_path.rglob("*.tar"))


def test_a_remote_folder_of_shards_with_clips_below_is_refused_and_what_lies_beside_them_is_named(
    bucket, local, tmp_path, caplog
):
    for path in local.directory.iterdir():
        bucket.pipe(f"clips/set/{path.name}", path.read_bytes())
    bucket.pipe("clips/set/notes/old.zip", b"PK")
    assert opened("s3://clips/set", tmp_path / "work").clips == local.clips
    assert "s3://clips/set: left out: 1 file (notes/old.zip): beside shards" in caplog.text
    bucket.pipe("clips/set/drums/kick.wav", b"RIFF")
    with pytest.raises(DataError, match=r"holds shards \(shard-000000.tar\) and clips \(drums/kick.wav\)"):
        opened("s3://clips/set", tmp_path / "work")


class _Clips(torch.utils.data.Dataset):
    def __init__(self, index):
        self.index = index

    def __len__(self):
        return len(self.index.clips)

    def __getitem__(self, number):
        return self.index.clips[number].key, load_clip_audio(self.index, self.index.clips[number], 44100)


def test_loader_workers_read_remote_clips_after_their_parent_has(site, audio, tmp_path):
    index = opened(f"{site.url}/etag/index.json", tmp_path, cache_bytes=100_000)
    load_clip_audio(index, index.clips[0], 44100)
    for key, samples in torch.utils.data.DataLoader(_Clips(index), batch_size=None, num_workers=2):
        assert torch.equal(samples, audio[key])


def test_a_run_encodes_remote_shards_and_its_cache_keeps_to_cache_bytes(site, local, demo_base, tmp_path):
    values = {"audio_data_url": f"{site.url}/etag/index.json", "work_dir": str(tmp_path / "work")}
    values |= {"model": str(demo_base), "cache_bytes": 100_000, "encode_batch": 4}
    run = Run(config.build(values), Group(0, 1, torch.device("cpu")), StopRequest())
    index = run.shard()
    base = run.open_base()
    passes = []
    original = base.encode_audio
    base.encode_audio = lambda audio_BCN: passes.append(len(audio_BCN)) or original(audio_BCN)
    encoded = run.encode(base, index, everything=True).encoded
    assert max(passes) == 4
    assert sum(passes) == 2 * len(local.clips) + 1
    for clip in index.clips:
        assert encoded.latents(clip, False).valid_frames == -(-clip.samples // 4096)
    held = list((tmp_path / "work" / "clip-cache").glob("??/*"))
    assert 0 < sum(path.stat().st_size for path in held) <= 100_000


# The cache by itself.


def named(data):
    return hashlib.sha256(data).hexdigest()


def held_by(cache):
    return {path.name for path in cache.directory.glob("??/*")}


def held_path(cache, blob):
    (found,) = cache.directory.glob(f"??/{named(blob)}")
    return found


def test_the_cache_lets_go_of_what_was_used_least_recently(tmp_path):
    cache = ClipCache(tmp_path, 1000)
    blobs = [bytes([n]) * 240 for n in range(6)]
    for number, blob in enumerate(blobs[:4]):
        cache.put(named(blob), blob)
        os.utime(held_path(cache, blob), ns=(number, number))
    assert cache.get(named(blobs[0])) == blobs[0]
    cache.put(named(blobs[4]), blobs[4])
    assert held_by(cache) == {named(blobs[n]) for n in (0, 2, 3, 4)}
    assert cache.get(named(blobs[1])) is None
    # What is larger than all of it is not kept, and drives nothing out.
    cache.put(named(bytes(1001)), bytes(1001))
    assert len(held_by(cache)) == 4


def test_a_damaged_cached_clip_is_never_returned(tmp_path):
    cache = ClipCache(tmp_path, 1000)
    cache.put(named(b"clip"), b"clip")
    held_path(cache, b"clip").write_bytes(b"clap")
    assert cache.get(named(b"clip")) is None
    cache.put(named(b"clip"), b"clip")
    assert cache.get(named(b"clip")) == b"clip"


@pytest.mark.parametrize("damage", ["", "nonsense", "0", "-5", "999999"])
def test_a_wrong_count_or_a_killed_writer_never_lets_the_cache_stay_above_its_bound(tmp_path, damage):
    cache = ClipCache(tmp_path, 1000)
    blobs = [bytes([n]) * 300 for n in range(9)]
    for blob in blobs[:3]:
        cache.put(named(blob), blob)
    (tmp_path / ".bytes").write_text(damage)
    (tmp_path / "ab").mkdir(exist_ok=True)
    (tmp_path / "ab" / "killed.tmp").write_bytes(bytes(5000))
    for blob in blobs[3:]:
        cache.put(named(blob), blob)
        assert cache.get(named(blob)) == blob
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 1000


def _use_cache(directory, seed):
    cache, draw = ClipCache(directory, 60_000), random.Random(seed)
    blobs = [random.Random(n).randbytes(1000 + 900 * (n % 9)) for n in range(40)]
    hits = 0
    for _ in range(120):
        blob = draw.choice(blobs)
        found = cache.get(named(blob))
        assert found in (None, blob)
        hits += found is not None
        if found is None:
            cache.put(named(blob), blob)
    assert hits > 15


def test_processes_that_share_a_cache_never_pass_its_bound_and_never_read_a_wrong_byte(tmp_path):
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=_use_cache, args=(tmp_path, seed)) for seed in range(3)]
    for process in running:
        process.start()
    largest = 0
    while any(process.is_alive() for process in running):
        total = 0
        for path in tmp_path.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        largest = max(largest, total)
        time.sleep(0.01)
    assert [process.exitcode for process in running] == [0] * 3
    # The look itself takes time: a clip may be counted that goes while another comes.
    assert 30_000 < largest <= 70_000
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 60_000


def test_threads_that_share_a_cache_keep_its_count_right(tmp_path):
    cache = ClipCache(tmp_path, 1 << 20)
    blobs = [bytes([n]) * (100 + n) for n in range(64)]
    threads = [
        threading.Thread(target=lambda part=part: [cache.put(named(blob), blob) for blob in blobs[part::2]])
        for part in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int((tmp_path / ".bytes").read_text()) == sum(map(len, blobs))


@pytest.fixture
def latent_site(tmp_path):
    """A server with three latent shards, and their paths."""
    (tmp_path / "made").mkdir()
    paths = write_set(tmp_path / "made", [3, 3, 3])
    with hostile_http(files={path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}) as server:
        yield server, paths


def remote_latents(server, traits, work, later="etag"):
    """The shards as opened from a server with ``traits``, which is another one when their members are read."""
    url = f"{server.url}/{traits}/latents-{{000000..000002}}.tar"
    paths = fetch_latents(latent_shards_of(url), work, never, 1 << 30)
    paths = [(tar.replace(f"/{traits}/", f"/{later}/"), index, size) for tar, index, size in paths]
    index = read_latents(url, paths, ClipCache(work / "clip-cache", 1 << 30), never)
    encoded = EncodedClips(index, work, Framing, ENCODERS.autoencoder, ENCODERS.text_encoder)
    encoded.add_shards(index.latent_shards)
    return encoded


@pytest.mark.parametrize(("traits", "later"), [("etag", "etag"), ("etag", "glitch"), ("etag,norange", "etag")])
def test_latents_of_remote_shards_equal_the_local_ones_and_only_those_asked_for_are_fetched(
    latent_site, tmp_path, traits, later
):
    server, paths = latent_site
    encoded = remote_latents(server, traits, tmp_path / "work", later)
    local = {found.clip.key: (shard.path, found) for shard in map(LatentShard.read, paths) for found in shard.clips}
    assert [clip.key for clip in encoded.clips] == sorted(local)
    few = encoded.clips[1], encoded.clips[7]
    server.requests.clear()
    for clip in few:
        path, found = local[clip.key]
        for kind in ("latents", "flipped"):
            assert encoded.member(clip, kind) == read_member(path, found.places[kind], kind)
    if "norange" in traits:
        assert not server.requests
        return
    wanted = sum(local[clip.key][1].places[kind].bytes for clip in few for kind in ("latents", "flipped"))
    assert bytes_asked(server) == wanted * (2 if later == "glitch" else 1)
    assert wanted < sum(path.stat().st_size for path in paths) / 3
    assert not list((tmp_path / "work").rglob("*.tar"))
    # What was read once comes from the disk.
    server.requests.clear()
    assert torch.equal(encoded.latents(few[0], True).latents_DT[0], torch.full((10,), -1.0))
    assert server.requests == []


def test_a_remote_latent_shard_that_is_not_its_indexs_is_refused_or_named(latent_site, tmp_path):
    server, _ = latent_site
    encoded = remote_latents(server, "etag", tmp_path / "work", "corrupt")
    with pytest.raises(
        EnvironmentFailure, match=r"latents-000000.tar: the latents of clip .* do not match their digest"
    ):
        encoded.latents(encoded.clips[0], False)
    server.files["latents-000001.tar"] += b"longer"
    with pytest.raises(DataError, match=r"latents-000001.tar: \d+ bytes, expected \d+"):
        remote_latents(server, "etag", tmp_path / "other")
