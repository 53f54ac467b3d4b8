"""Servers on loopback that real ones are like on bad days: HTTP with any fault, and moto's S3."""

import contextlib
import hashlib
import http.server
import re
import socket
import threading
import time
import urllib.request

import pytest


class HostileServer(http.server.BaseHTTPRequestHandler):
    """Files by name; what goes wrong stands before it in the address: /drop,norange,etag/file.zip."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(send=False)

    def do_GET(self):
        self._answer(send=True)

    def _answer(self, send):
        traits = self.path.split("/")[1].split(",")
        name = self.path.split("/")[-1].partition("?")[0]
        self.server.requests.append((self.command, self.headers.get("Range")))
        gets = sum(method == "GET" for method, _ in self.server.requests)
        content = self.server.files.get(name, self.server.content)
        if "redirect" in traits:
            return self._end(302, f"/etag/{self.path.split('/')[-1]}")
        if "loop" in traits:
            return self._end(302, self.path)
        if ("flaky" in traits and send and gets % 2) or "busy" in traits:
            return self._end(503)
        if content is None:
            return self._end(404)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        ranged = asked and "norange" not in traits
        start = int(asked[1]) if ranged else 0
        body = content[start : int(asked[2] or len(content)) + 1] if ranged else content
        told = len(body) + 5000 * ("claims-more" in traits) - 5000 * ("claims-less" in traits)
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(content)}")
        if "etag" in traits:
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        if "nolength" not in traits and not (ranged and "endless" in traits):
            self.send_header("Content-Length", str(told))
        self.send_header("Connection", "close")
        self.end_headers()
        if not send:
            return None
        if "changes" in traits and start == 0:
            self.server.content = bytes(reversed(self.server.content))
        if "drop" in traits:
            body = body[: self.server.drop_after]
        if ranged and ("corrupt" in traits or ("glitch" in traits and gets % 2)):
            body = body[:-1] + bytes([body[-1] ^ 1])
        with contextlib.suppress(OSError):
            self._write(body[:told] if "claims-less" in traits else body, traits, ranged)
        self.close_connection = True
        return None

    def _end(self, status, location=None):
        """An answer without a body."""
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _write(self, body, traits, ranged):
        while ranged and "endless" in traits:
            self.wfile.write(bytes(1 << 16))
            self.server.sent += 1 << 16
        if "stall" in traits:
            self.wfile.write(body[:1000])
            time.sleep(5)
        elif "throttle" in traits:
            for at in range(0, len(body), 100_000):
                self.wfile.write(body[at : at + 100_000])
                time.sleep(0.02)
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def hostile_http(content=None, files=None):
    """A running server: .url, .requests as (method, Range), .content of any name that is not in .files.

    .sent   bytes of endless answers so far
    """
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HostileServer) as running:
        running.content, running.files, running.requests, running.drop_after = content, files or {}, [], 200_000
        running.sent = 0
        running.url = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@contextlib.contextmanager
def s3_bucket(monkeypatch):
    """moto's S3 server with one bucket; gives the s3fs file system that talks to it."""
    pytest.importorskip("flask")
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    running.start()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")).close()
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("clips")
    yield system
    running.stop()
    s3fs.S3FileSystem.clear_instance_cache()
