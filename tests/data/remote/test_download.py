"""Downloads from real servers on loopback that drop, lie, throttle and change: the right bytes, or one clear line."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from sa3dist.data.remote import download
from sa3dist.data.remote.fetch import Downloads, fetch
from sa3dist.data.source.build import build_shards
from sa3dist.errors import DataError, EnvironmentFailure, Interrupted
from tests.helpers.clips import captioned, write_zip
from tests.helpers.servers import hostile_http, s3_bucket

CONTENT = bytes(hashlib.shake_256(b"a large file").digest(1_500_000))


@pytest.fixture
def server():
    with hostile_http(CONTENT) as running:
        yield running


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(download, "RETRY_PAUSES_SECONDS", (0.01,) * 5)
    monkeypatch.setattr(download, "BLOCK_BYTES", 400_000)
    monkeypatch.setattr("sa3dist.data.remote.fetch.SILENT_SECONDS", 0.5)


def get(url, tmp_path, **options):
    return fetch(url, tmp_path / "downloads", lambda: False, **options)


@pytest.mark.parametrize(
    "traits",
    [
        "etag",
        "plain",
        "norange",
        "etag,norange",
        "nolength",
        "redirect",
        "throttle",
        "etag,drop",
        "drop",
        "etag,flaky",
        "flaky,drop",
    ],
)
def test_the_right_bytes_arrive_from(server, tmp_path, traits):
    path = get(f"{server.url}/{traits}/file.zip", tmp_path)
    assert path.read_bytes() == CONTENT
    assert path.name.startswith(hashlib.sha256(CONTENT).hexdigest())
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("traits", "failure", "message"),
    [
        ("norange,drop", EnvironmentFailure, r"file.zip: download failed \(.*\); run again to continue"),
        ("claims-more,norange", EnvironmentFailure, r"file.zip: download failed \(.*\)"),
        ("busy", EnvironmentFailure, r"file.zip: download failed \(status 503\)"),
        ("loop", DataError, "file.zip: redirects without end"),
        ("stall", EnvironmentFailure, r"file.zip: download failed \(.*\)"),
        ("etag,changes", EnvironmentFailure, "file.zip: changed while it was downloaded; run again"),
    ],
)
def test_one_line_and_no_wrong_byte_from(server, tmp_path, monkeypatch, traits, failure, message):
    monkeypatch.setattr(download, "RETRY_PAUSES_SECONDS", (0.01,))
    begin = time.monotonic()
    with pytest.raises(failure, match=message) as caught:
        get(f"{server.url}/{traits}/file.zip?signature=hunter2", tmp_path)
    assert time.monotonic() - begin < 20
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".part")]


def test_a_server_that_claims_less_than_it_has_gives_no_usable_zip(server, tmp_path):
    server.content = write_zip(tmp_path / "a.zip", captioned(4)).read_bytes()
    with pytest.raises((DataError, EnvironmentFailure), match=r"file.zip: ") as caught:
        build_shards(f"{server.url}/claims-less/file.zip", tmp_path / "work")
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]


def test_a_broken_download_is_continued_by_the_next_run_with_range_requests(server, tmp_path):
    seen = []

    def stop_half_way():
        seen.append(None)
        return len(seen) > 2

    with pytest.raises(Interrupted):
        fetch(f"{server.url}/etag/file.zip", tmp_path / "downloads", stop_half_way)
    (part,) = (tmp_path / "downloads").glob("*.part")
    held = part.stat().st_size
    assert 0 < held < len(CONTENT)
    assert CONTENT.startswith(part.read_bytes())
    server.requests.clear()
    assert get(f"{server.url}/etag/file.zip", tmp_path).read_bytes() == CONTENT
    ranges = [asked for method, asked in server.requests if method == "GET"]
    assert ranges[0].startswith(f"bytes={held}-")


def test_a_part_of_another_version_is_never_continued(server, tmp_path):
    seen = []
    with pytest.raises(Interrupted):
        fetch(f"{server.url}/etag/file.zip", tmp_path / "downloads", lambda: seen.append(0) or len(seen) > 2)
    server.content = bytes(reversed(CONTENT))
    assert get(f"{server.url}/etag/file.zip", tmp_path).read_bytes() == server.content


def test_a_killed_download_is_continued_and_whole(server, tmp_path):
    program = (
        "import sys; from pathlib import Path; from sa3dist.data.remote import download, fetch\n"
        "download.BLOCK_BYTES = 50_000\n"
        "fetch.fetch(sys.argv[1], Path(sys.argv[2]), lambda: False)"
    )
    command = [sys.executable, "-c", program, f"{server.url}/etag,throttle/file.zip", str(tmp_path / "downloads")]
    running = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in (tmp_path / "downloads").glob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    held = sum(part.stat().st_size for part in (tmp_path / "downloads").glob("*.part"))
    assert held < len(CONTENT)
    server.requests.clear()
    assert get(f"{server.url}/etag,throttle/file.zip", tmp_path).read_bytes() == CONTENT
    # The killed process asked for 50,000 bytes at a time; its last request may be answered only now.
    spans = [[int(at) for at in asked.removeprefix("bytes=").split("-")] for method, asked in server.requests if asked]
    assert sum(last - first + 1 != 50_000 for first, last in spans) <= -(-(len(CONTENT) - held) // 400_000)


def test_one_content_under_two_addresses_is_kept_once_and_not_fetched_again(server, tmp_path):
    first = get(f"{server.url}/etag/file.zip", tmp_path)
    assert get(f"{server.url}/etag,other/file.zip", tmp_path) == first
    assert len(list(first.parent.glob("*.zip"))) == 1
    server.requests.clear()
    assert get(f"{server.url}/etag/file.zip", tmp_path) == first
    assert {method for method, _ in server.requests} == {"HEAD"}


def test_a_damaged_cached_file_is_fetched_again(server, tmp_path):
    path = get(f"{server.url}/etag/file.zip", tmp_path)
    path.write_bytes(CONTENT[:-1])
    assert get(f"{server.url}/etag/file.zip", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("traits", ["etag", "nolength"])
def test_max_download_bytes_bounds_one_file_and_all_of_a_source(server, tmp_path, traits):
    with pytest.raises(DataError, match="expected at most 1000000|more than 1000000 bytes"):
        get(f"{server.url}/{traits}/file.zip", tmp_path, max_bytes=1_000_000)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    both = Downloads(tmp_path / "downloads", lambda: False, 2_000_000)
    both.fetch(f"{server.url}/{traits}/0.tar")
    with pytest.raises(DataError, match="max_download_bytes"):
        both.fetch(f"{server.url}/{traits}/1.tar")


def test_a_signal_ends_the_pauses_at_once(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RETRY_PAUSES_SECONDS", (60,))
    asked = []
    begin = time.monotonic()
    with pytest.raises(Interrupted):
        fetch(f"{server.url}/busy/file.zip", tmp_path / "downloads", lambda: asked.append(0) or len(asked) > 2)
    assert time.monotonic() - begin < 60


@pytest.fixture
def bucket(monkeypatch):
    with s3_bucket(monkeypatch) as system:
        yield system


def test_zips_folders_and_shards_come_from_s3(bucket, tmp_path):
    members = captioned(4)
    local = write_zip(tmp_path / "a.zip", members)
    bucket.pipe("clips/a.zip", local.read_bytes())
    for name, data in members.items():
        bucket.pipe(f"clips/folder/{name}", data)
    expected = build_shards(str(local), tmp_path / "work0").clips
    assert build_shards("s3://clips/a.zip", tmp_path / "work").clips == expected
    assert build_shards("s3://clips/folder", tmp_path / "work").clips == expected
    with pytest.raises(DataError, match="s3://clips/none.zip: not found; check the address"):
        build_shards("s3://clips/none.zip", tmp_path / "work")
    with pytest.raises(DataError, match="s3://nobucket/a.zip: not found; check the address"):
        build_shards("s3://nobucket/a.zip", tmp_path / "work")


def test_an_unchanged_s3_folder_is_not_fetched_again_and_a_changed_one_is(bucket, tmp_path, monkeypatch):
    for name, data in captioned(4).items():
        bucket.pipe(f"clips/folder/{name}", data)
    get("s3://clips/folder", tmp_path)
    opened = []
    original = type(bucket).open

    def watched(self, path, *rest, **more):
        opened.append(path)
        return original(self, path, *rest, **more)

    monkeypatch.setattr(type(bucket), "open", watched)
    get("s3://clips/folder", tmp_path)
    assert opened == []
    bucket.pipe("clips/folder/clip2.txt", b"other words")
    bucket.rm("clips/folder/clip3.wav")
    opened.clear()
    folder = get("s3://clips/folder", tmp_path)
    assert opened == ["clips/folder/clip2.txt"]
    assert (folder / "clip2.txt").read_bytes() == b"other words"
    assert not (folder / "clip3.wav").exists()
