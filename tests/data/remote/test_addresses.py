"""Addresses as given: what a server is sent, to the byte, by which proxy, and what is said of what comes instead."""

import base64
import contextlib
import http.client
import http.server
import os
import socket
import threading
from urllib.parse import urljoin, urlsplit

import fsspec
import pytest
from yarl import URL

from sa3dist.data.latents.source import latent_shards_of, streamed_shards
from sa3dist.data.remote import download, fetch
from sa3dist.data.remote.http_request import resolved
from sa3dist.data.source.archive import expand_braces, open_container
from sa3dist.data.source.build import build_shards
from sa3dist.data.source.remote_index import index_remote
from sa3dist.data.source.remote_shards import tars_of
from sa3dist.errors import DataError, EnvironmentFailure
from tests.helpers.clips import captioned, write_tar, write_zip
from tests.helpers.servers import s3_bucket

# What signers, hubs and content networks put into a query, and characters that libraries like to rewrite.
QUERY = (
    "response-content-disposition=attachment%3B%20filename*%3DUTF-8%27%27clips.zip&Key=a%2Fb%2fc&Sig=a~b_%7E+%2B/:@!$'()*,;"
    '=[]{}|^`"<>\\&&empty=&%&%zz&t=1::2'
)


class Recorder(http.server.BaseHTTPRequestHandler):
    """Sends ``server.answers[path]``: (status, headers, body). Requests for other hosts are a proxy's."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        forward = self.server.forward
        if path.startswith("http://") and forward:
            return self.pass_on(*forward)
        path = urlsplit(path).path if path.startswith("http://") else path
        status, headers, body = self.server.answers.get(path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            # As bytes of UTF-8, which the standard library would not send.
            self._headers_buffer.append(f"{name}: {value}\r\n".encode())
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        return None

    def do_CONNECT(self):
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        self.send_error(self.server.connect_status)

    do_HEAD = do_GET

    def pass_on(self, host, port):
        connection = http.client.HTTPConnection(host, port)
        parts = urlsplit(self.path)
        connection.request(
            self.command, self.path.partition(parts.netloc)[2], headers={**self.headers, "Host": f"{host}:{port}"}
        )
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("server", "date", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def recorder(**answers):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as running:
        running.answers = {f"/{name}": value for name, value in answers.items()}
        running.seen, running.forward, running.connect_status = [], None, 403
        running.url = f"http://127.0.0.1:{running.server_port}"
        running.targets = lambda: [path for _, path, _ in running.seen]
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(download, "RETRY_PAUSES_SECONDS", (0,))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def clips(tmp_path):
    return write_zip(tmp_path / "clips.zip", captioned(4)).read_bytes()


@pytest.fixture
def server():
    with recorder() as running:
        yield running


def read(address, tmp_path) -> int:
    with open_container(address, tmp_path / "work") as container:
        return len(container.members)


def test_path_and_query_are_sent_byte_for_byte(server, clips, tmp_path):
    path = "/a%2Fb/%7Euser/x%20y/(1)+%2B'!;=:@,$&//z/../clips.zip"
    server.answers[path] = 200, {}, clips
    assert read(f"{server.url}{path}?{QUERY}", tmp_path) == 8
    assert set(server.targets()) == {f"{path}?{QUERY}"}


@pytest.mark.parametrize(
    "form",
    ["{url}/a%2Fb//clips.zip", "//{host}/a%2Fb//clips.zip", "/a%2Fb//clips.zip", "clips.zip", "./x/../clips.zip"],
)
def test_a_redirect_is_followed_byte_for_byte(server, clips, tmp_path, form):
    location = form.format(url=server.url, host=server.url.removeprefix("http://"))
    server.answers["/a%2Fb//r.zip"] = 302, {"Location": f"{location}?{QUERY}"}, b""
    server.answers["/a%2Fb//clips.zip"] = 200, {}, clips
    assert read(f"{server.url}/a%2Fb//r.zip", tmp_path) == 8
    assert set(server.targets()) == {"/a%2Fb//r.zip", f"/a%2Fb//clips.zip?{QUERY}"}


@pytest.mark.parametrize(
    "location",
    ["c.zip", "?q=%2F", "#f", "./c", "../c", "../../../c", "c/./d/..", "..", ".", "", "c:d/e", "/c?q", "//g/c"],
)
@pytest.mark.parametrize("base", ["http://h/a/b/r?x=1", "http://h:81/r", "http://h"])
def test_redirects_lead_where_the_standard_says(location, base):
    # The standard library's join is right where nothing is encoded and no part is empty.
    assert resolved(URL(base, encoded=True), location) == urljoin(base if base.count("/") > 2 else base + "/", location)


@pytest.mark.parametrize("redirected", [False, True])
def test_only_what_no_request_can_hold_is_encoded(server, clips, tmp_path, redirected):
    path, sent = (
        "/Loops Größe 日本/a%20b.zip?q=ü 'x'&s=%2f",
        "/Loops%20Gr%C3%B6%C3%9Fe%20%E6%97%A5%E6%9C%AC/a%20b.zip?q=%C3%BC%20'x'&s=%2f",
    )
    server.answers[sent.partition("?")[0]] = 200, {}, clips
    server.answers["/r.zip"] = 302, {"Location": path}, b""
    assert read(f"{server.url}{'/r.zip' if redirected else path}", tmp_path) == 8
    assert sent in server.targets()


def test_what_follows_a_hash_is_not_sent_and_said_where_it_is_missed(server, clips, tmp_path):
    server.answers["/clips.zip"] = 200, {}, clips
    assert read(f"{server.url}/clips.zip#part", tmp_path) == 8
    with pytest.raises(
        DataError, match=r"/Loops : not found; check the address; what follows # is not sent, write %23"
    ):
        read(f"{server.url}/Loops #1.zip", tmp_path)
    server.answers["/Loops%20%231.zip"] = 200, {}, clips
    assert read(f"{server.url}/Loops %231.zip", tmp_path) == 8


def test_user_and_password_are_sent_as_basic_auth_to_their_host_only_and_never_shown(server, clips, tmp_path):
    with recorder(**{"clips.zip": (200, {}, clips)}) as other:
        server.answers["/r.zip"] = 302, {"Location": f"{other.url.replace('127.0.0.1', 'localhost')}/clips.zip"}, b""
        address = server.url.replace("://", "://us%40er:p%40ss%2Fwörd@")
        assert read(f"{address}/r.zip", tmp_path) == 8
    sent = {headers.get("Authorization") for _, _, headers in server.seen}
    assert sent == {"Basic " + base64.b64encode("us@er:p@ss/wörd".encode()).decode()}
    assert {headers.get("Authorization") for _, _, headers in other.seen} == {None}
    with pytest.raises(DataError, match="^http://127.0.0.1:[0-9]+/missing.zip: not found") as caught:
        read(f"{address}/missing.zip?sig=secret", tmp_path)
    assert not any(part in str(caught.value) for part in ("us%40er", "p%40", "secret"))


@pytest.mark.parametrize("address", ["http://", "http:///a.zip", "http://host:port/a.zip", "http://[::1/a.zip"])
def test_what_is_no_address_is_one_line(address, tmp_path):
    with pytest.raises(DataError, match="no valid address"):
        read(address, tmp_path)


def test_other_schemes_keep_a_hash_in_a_name(tmp_path, clips):
    import fsspec

    fsspec.filesystem("memory").pipe("/Loops #1/clips.zip", clips)
    assert read("memory://Loops #1/clips.zip", tmp_path) == 8
    assert fetch.redacted("memory://Loops #1/clips.zip") == "memory://Loops #1/clips.zip"
    (tmp_path / "Loops #1?.zip").write_bytes(clips)
    assert read(f"FILE://{tmp_path}/Loops #1?.zip", tmp_path) == 8
    assert read(f"file://localhost{tmp_path}/Loops%20%231%3F.zip", tmp_path) == 8


# Proxies.


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}", "http://me:s3cr3t@127.0.0.1:{}/"])
def test_a_proxy_is_asked_for_the_address_as_given(server, clips, tmp_path, monkeypatch, variable, form):
    monkeypatch.setenv(variable, form.format(server.server_port))
    server.answers["/clips.zip"] = 200, {}, clips
    address = "http://clips.example/clips.zip?Sig=%27%2F+"
    assert read(address, tmp_path) == 8
    assert set(server.targets()) == {address}
    sent = {headers.get("Proxy-Authorization") for _, _, headers in server.seen}
    assert sent == {"Basic " + base64.b64encode(b"me:s3cr3t").decode() if "@" in form else None}


@pytest.mark.parametrize("exempt", ["127.0.0.1", "x,127.0.0.0/8", "*", "a, 127.0.0.1:{}", ".example,127.0.0.1"])
def test_no_proxy_goes_straight(server, clips, tmp_path, monkeypatch, exempt):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", exempt.format(server.server_port))
    server.answers["/clips.zip"] = 200, {}, clips
    assert read(f"{server.url}/clips.zip", tmp_path) == 8
    assert set(server.targets()) == {"/clips.zip"}


def test_a_redirect_out_of_the_proxys_realm_goes_straight(server, clips, tmp_path, monkeypatch):
    with recorder(**{"clips.zip": (200, {}, clips)}) as inside:
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        server.answers["/r.zip"] = 302, {"Location": f"{inside.url}/clips.zip"}, b""
        assert read("http://clips.example/r.zip", tmp_path) == 8
    assert set(server.targets()) == {"http://clips.example/r.zip"}
    assert set(inside.targets()) == {"/clips.zip"}


@pytest.mark.parametrize("status", [403, 407])
def test_https_goes_through_the_proxy_as_well_and_its_refusal_is_named(server, tmp_path, monkeypatch, status):
    monkeypatch.setenv("https_proxy", server.url)
    server.connect_status = status
    with pytest.raises(
        DataError, match=rf"^https://clips.example/a.zip: the proxy refuses it \(status {status}\); check"
    ):
        read("https://clips.example/a.zip", tmp_path)
    assert {(method, path) for method, path, _ in server.seen} == {("CONNECT", "clips.example:443")}


@pytest.mark.parametrize("value", ["socks5://me:s3cr3t@host:1080", "http://", "http://host:port"])
def test_what_is_no_http_proxy_is_named_without_its_password(value, tmp_path, monkeypatch):
    monkeypatch.setenv("all_proxy", value)
    with pytest.raises(DataError, match="^all_proxy: is no HTTP proxy; expected http://host:port") as caught:
        read("http://clips.example/a.zip", tmp_path)
    assert "s3cr3t" not in str(caught.value)


def test_a_bucket_is_read_through_the_proxy(clips, tmp_path, monkeypatch):
    with s3_bucket(monkeypatch) as bucket, recorder() as proxy:
        bucket.pipe("clips/Loops #1 ü+%.zip", clips)
        moto = urlsplit(os.environ["AWS_ENDPOINT_URL"])
        proxy.forward = moto.hostname, moto.port
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example")
        monkeypatch.setenv("http_proxy", proxy.url)
        type(bucket).clear_instance_cache()
        assert read("s3://clips/Loops #1 ü+%.zip", tmp_path) == 8
    assert proxy.seen
    assert all(path.startswith("http://s3.example/clips/Loops%20%231%20%C3%BC%2B%25.zip") for path in proxy.targets())


# What comes instead.

PAGES = {
    "a page": b"<!DOCTYPE html><html><title>Sign in - Big Drive</title></html>",
    "a bare page": b"\xef\xbb\xbf\n  <HTML><head>\n<title>Sign\n in - Big&nbsp;Drive</title>",
    "xhtml": b'<?xml version="1.0"?><!-- made by hand --><html xmlns="x"><title>Sign in - Big Drive</title>',
    "a script": b"<!-- c --><script>location='/login'</script><title>Sign in - Big Drive</title>",
}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "x-{000..001}.tar", "a", "index.json"])
@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_web_page_is_named_and_does_not_stay(server, tmp_path, page, name):
    for part in expand_braces(f"/{name}"):
        server.answers[part] = 200, {"Content-Type": "text/html", "ETag": '"1"'}, page

    def prepare(source):
        if index_remote(source, tmp_path / "work") is None:
            build_shards(source, tmp_path / "work")

    wanted = r"the server sends a web page \('Sign in - Big.Drive'\); is it a share link\? Give the address of the file"
    with pytest.raises(DataError, match=wanted) as caught:
        prepare(f"{server.url}/{name}")
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "sends a Git LFS pointer"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "sends an answer in XML"),
    ],
)
def test_other_answers_with_status_200_are_named(server, tmp_path, body, said):
    server.answers["/a.zip"] = 200, {}, body
    with pytest.raises(DataError, match=said):
        read(f"{server.url}/a.zip", tmp_path)


def test_a_page_among_the_files_of_a_bucket_is_no_answer(tmp_path, clips):
    import fsspec

    system = fsspec.filesystem("memory")
    for name, data in (captioned(4) | {"index.html": PAGES["a page"]}).items():
        system.pipe(f"/pages/{name}", data)
    assert read("memory://pages", tmp_path) == 9


# Braces before a query.


@pytest.mark.parametrize(
    ("source", "first", "last"),
    [
        (
            "https://h/x-{000..003}.tar?sig=%2F{1..2}",
            "https://h/x-000.tar?sig=%2F{1..2}",
            "https://h/x-003.tar?sig=%2F{1..2}",
        ),
        (
            "https://u:{p}@h/{1..2}/x-{0..1}.tar#f",
            "https://u:{p}@h/{1..2}/x-{0..1}.tar#f",
            "https://u:{p}@h/{1..2}/x-{0..1}.tar#f",
        ),
        ("https://h/{1..2}/x-{08..10}.tar?a=b", "https://h/1/x-08.tar?a=b", "https://h/2/x-10.tar?a=b"),
        ("https://h/get?file=x-{0..3}.tar", "https://h/get?file=x-0.tar", "https://h/get?file=x-3.tar"),
        ("s3://b/Loops #1/x-{0..3}.tar", "s3://b/Loops #1/x-0.tar", "s3://b/Loops #1/x-3.tar"),
        ("/d/Loops? #1/x-{0..3}.tar", "/d/Loops? #1/x-0.tar", "/d/Loops? #1/x-3.tar"),
    ],
)
def test_braces_are_expanded_before_a_query(source, first, last):
    parts = expand_braces(source)
    assert (parts[0], parts[-1]) == (first, last)


def test_signed_shards_are_read_one_by_one_and_known_by_their_names(server, tmp_path):
    for number in range(3):
        part = {name.replace("clip", f"part{number}-"): data for name, data in captioned(2).items()}
        server.answers[f"/x-00{number}.tar"] = 200, {"ETag": '"1"'}, write_tar(tmp_path / "x.tar", part).read_bytes()
    source = f"{server.url}/x-{{000..002}}.tar?sig=%27a%2Fb"
    # This server sends whole files only.
    assert index_remote(source, tmp_path / "work") is None
    assert len(build_shards(source, tmp_path / "work").clips) == 6
    assert set(server.targets()) == {f"/x-00{number}.tar?sig=%27a%2Fb" for number in range(3)}
    assert tars_of(source, lambda: False) == [f"{server.url}/x-00{number}.tar?sig=%27a%2Fb" for number in range(3)]
    assert len(streamed_shards(source).urls) == 3
    other = source.replace("sig=%27a%2Fb", "sig=another")
    # A new signature is no new data set.
    assert streamed_shards(other).digest == streamed_shards(source).digest
    assert len(latent_shards_of("https://h/latents-{000..002}.tar?sig=a/b")) == 3


@pytest.mark.parametrize("lists", [latent_shards_of, streamed_shards, lambda source: tars_of(source, lambda: False)])
def test_a_remote_folder_that_cannot_be_listed_is_asked_again_or_refused_in_one_line(lists, monkeypatch):
    monkeypatch.setattr(download, "RETRY_PAUSES_SECONDS", (0, 0))
    memory = fsspec.filesystem("memory")
    memory.pipe("/listed/latents-000000.tar", b"x")
    failures = []

    def failing(question):
        def ask(*words, **options):
            if failures:
                raise failures.pop()
            return question(*words, **options)

        return ask

    for name in ("isdir", "ls"):
        monkeypatch.setattr(memory, name, failing(getattr(memory, name)))
    failures[:] = [OSError("slow down")] * 2
    assert len(getattr(found := lists("memory://listed"), "urls", found)) == 1
    failures[:] = [PermissionError("expired")]
    with pytest.raises(DataError, match=r"^memory://listed: access denied; check the address and the credentials$"):
        lists("memory://listed")


def test_an_address_whose_server_does_not_answer_or_that_lacks_a_part_is_one_line():
    with socket.socket() as taken:
        # Nobody listens there.
        taken.bind(("127.0.0.1", 0))
        address = f"ftp://127.0.0.1:{taken.getsockname()[1]}/x.zip"
        with pytest.raises(EnvironmentFailure, match=r"^ftp://127.0.0.1:\d+/x.zip: cannot be reached \(.*refused"):
            fetch.filesystem(address)
    with pytest.raises(DataError, match=r"^dir://x: dir:// is no known kind of location"):
        fetch.filesystem("dir://x")


@pytest.mark.parametrize("location", ["/loop.zip", "file:///etc/passwd", "http://["])
def test_redirects_that_lead_nowhere_are_refused_without_another_try(location, server, tmp_path):
    server.answers["/loop.zip"] = 302, {"Location": location}, b""
    with pytest.raises(DataError, match=r"/loop.zip: redirects without end, or to no http\(s\) address; check"):
        build_shards(f"{server.url}/loop.zip", tmp_path / "work")
