"""Remote sources: over real HTTP on loopback and fsspec's memory file system, whole or one clear line."""

import functools
import http.server
import sys
import threading

import fsspec
import pytest

from sa3dist.data.remote import download, fetch
from sa3dist.data.source.archive import open_container
from sa3dist.data.source.build import build_shards
from sa3dist.errors import DataError, EnvironmentFailure, Interrupted
from tests.helpers.clips import captioned, encode, tone, write_tar, write_zip


class _Server(http.server.SimpleHTTPRequestHandler):
    """The standard library's file server, plus the lies of real ones."""

    gets: list[str] = []

    def do_GET(self):
        self.gets.append(self.path)
        if self.path.startswith("/truncated"):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"PK" * 100)
        elif self.path.startswith(("/broken", "/secret")):
            self.send_error(500 if self.path.startswith("/broken") else 403)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(download, "RETRY_PAUSES_SECONDS", (0, 0))


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site").mkdir()
    _Server.gets = []
    handler = functools.partial(_Server, directory=tmp_path / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "site", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_a_zip_over_http_gives_the_clips_of_the_file(site, tmp_path):
    root, url = site
    local = write_zip(root / "a.zip", captioned(4))
    remote = build_shards(f"{url}/a.zip", tmp_path / "work")
    assert remote.clips == build_shards(str(local), tmp_path / "other").clips


@pytest.mark.parametrize(
    ("path", "failure", "message"),
    [
        ("missing.zip", DataError, "missing.zip: not found; check the address"),
        ("broken.zip", EnvironmentFailure, r"broken.zip: download failed \(status 500\)"),
        ("secret.zip", DataError, "secret.zip: access denied"),
        ("truncated.zip", EnvironmentFailure, "truncated.zip: "),
        ("page.html", DataError, "page.html: the server sends a web page; is it a share link?"),
    ],
)
def test_a_server_that_fails_gives_one_line_and_leaves_nothing(site, tmp_path, path, failure, message):
    root, url = site
    (root / "page.html").write_text("<html>log in first</html>")
    with pytest.raises(failure, match=message) as caught:
        build_shards(f"{url}/{path}?signature=hunter2", tmp_path / "work")
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and root not in file.parents]


def test_a_server_that_is_not_there_is_an_environment_failure(tmp_path):
    with pytest.raises(EnvironmentFailure, match=r"http://127.0.0.1:9/a.zip: download failed \(.+\); run again"):
        build_shards("http://127.0.0.1:9/a.zip", tmp_path / "work")


def test_a_file_of_known_version_is_fetched_once(site, tmp_path, monkeypatch):
    root, url = site
    write_zip(root / "a.zip", captioned(4))
    # The standard library's server sends no ETag; this stands for one that does.
    original = _Server.end_headers

    def with_etag(self):
        self.send_header("ETag", '"v1"')
        original(self)

    monkeypatch.setattr(_Server, "end_headers", with_etag)
    first = build_shards(f"{url}/a.zip", tmp_path / "work")
    fetched = len(_Server.gets)
    assert fetched > 0
    assert build_shards(f"{url}/a.zip", tmp_path / "work") == first
    assert len(_Server.gets) == fetched


def test_remote_shards_and_remote_folders_are_sources(memory, tmp_path):
    for number in range(2):
        part = {name.replace("clip", f"part{number}-"): data for name, data in captioned(2).items()}
        memory.pipe(f"/set/x-{number:03d}.tar", write_tar(tmp_path / "x.tar", part).read_bytes())
    for name, data in captioned(4, folder="kit/").items():
        memory.pipe(f"/folder/{name}", data)
    shards = build_shards("memory://set/x-{000..001}.tar", tmp_path / "work")
    assert [clip.key for clip in shards.clips] == ["part0-0", "part0-1", "part1-0", "part1-1"]
    assert build_shards("memory://set", tmp_path / "work").clips == shards.clips
    folder = build_shards("memory://folder", tmp_path / "work")
    assert [clip.key for clip in folder.clips] == [f"kit/clip{n}" for n in range(4)]


def test_downloads_are_bounded_also_when_the_size_is_not_told(memory, tmp_path, monkeypatch):
    memory.pipe("/a.zip", write_zip(tmp_path / "a.zip", captioned(4)).read_bytes())
    with pytest.raises(DataError, match=r"memory://a.zip: \d+ bytes, expected at most 50000"):
        build_shards("memory://a.zip", tmp_path / "work", max_download_bytes=50_000)
    monkeypatch.setattr(type(memory), "info", lambda self, path, **_: {"name": path, "type": "file", "size": None})
    with pytest.raises(DataError, match="memory://a.zip: more than 50000 bytes"):
        build_shards("memory://a.zip", tmp_path / "work", max_download_bytes=50_000)
    assert not [file for file in (tmp_path / "work").rglob("*") if file.is_file()]


def test_a_signal_stops_a_download_and_leaves_no_part(memory, tmp_path):
    memory.pipe("/a.zip", write_zip(tmp_path / "a.zip", captioned(4)).read_bytes())
    with pytest.raises(Interrupted, match="memory://a.zip: stopped while downloading; run again"):
        build_shards("memory://a.zip", tmp_path / "work", should_stop=lambda: True)
    assert not [file for file in (tmp_path / "work").rglob("*") if file.is_file()]


def test_a_refused_download_does_not_stay(memory, tmp_path):
    bad = captioned(4) | {"orphan.wav": encode(tone())}
    memory.pipe("/a.zip", write_zip(tmp_path / "a.zip", bad).read_bytes())
    with pytest.raises(DataError, match="orphan.wav: audio without a caption"):
        build_shards("memory://a.zip", tmp_path / "work")
    assert not (tmp_path / "work" / "downloads").exists()


def test_a_missing_optional_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # A class that fsspec has met once is not imported again.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(
        DataError, match=r"s3://bucket/a.zip: s3:// needs an optional package .* pip install 'sa3dist\[s3\]'"
    ):
        build_shards("s3://bucket/a.zip", tmp_path / "work")


def test_an_unknown_kind_of_location_is_refused(tmp_path):
    with pytest.raises(DataError, match="gopher://x/a.zip: gopher:// is no known kind of location"):
        build_shards("gopher://x/a.zip", tmp_path / "work")


def test_names_shown_keep_no_secrets():
    assert fetch.redacted("https://me:pw@host.org/a.zip?X-Sig=abc#x") == "https://host.org/a.zip"
    assert fetch.redacted("/local/odd?name.zip") == "/local/odd?name.zip"


def test_the_source_is_closed_and_cleaned_when_the_reader_fails(memory, tmp_path):
    memory.pipe("/a.zip", write_zip(tmp_path / "a.zip", captioned(4)).read_bytes())

    def refuse():
        with open_container("memory://a.zip", tmp_path / "work"):
            assert len(list((tmp_path / "work" / "downloads").iterdir())) == 1
            raise DataError("told so")

    with pytest.raises(DataError, match="told so"):
        refuse()
    assert not (tmp_path / "work" / "downloads").exists()
