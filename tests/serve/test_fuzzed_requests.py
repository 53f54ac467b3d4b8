"""Two thousand requests that no client sends: none is a failure of the server, and none leaves a file behind."""

import asyncio
import json
import random
import re
from urllib.parse import quote, urlsplit

import psutil

from sa3dist.request.fields import EndpointFields
from sa3dist.serve.app import create_app
from sa3dist.serve.job_store import JobStore
from sa3dist.serve.keys import Keys
from sa3dist.serve.server_options import DEFAULT_APP, WebOptions
from tests.helpers import asgi
from tests.helpers.fuzzing import HOSTILE_VALUES, mutated

COUNT, WARM = 2000, 500
MOST_GROWTH_BYTES = 64 << 20
GOOD = {"audio_data_url": "data:application/zip;base64,UEsFBgAAAAAAAAAAAAAAAAAAAAAAAA==", "number_of_steps": 7}
# As a server of HTTP lets them through: no control characters but the tab.
WORDS = [b"", b"0", b"-1", b"1", b"9" * 40, b"1e400", b"NaN", b"\xff\xfe", b"\t", b"{", b"[]", b"null", b"x" * 5000]
WORDS += [
    b"../../etc/passwd",
    b"[::1",
    b"http://[",
    b"a:b@c:99999",
    "\u0661".encode(),
    b"%00%ff",
    b"true",
    b'"',
    b"a=1,b",
]
WORDS += [b'{"server_error": {"retries": 2}}', b'{"expiration_duration_seconds": 1e999}', b"[" * 3000, b"low"]
NAMES = ["Host", "Origin", "Content-Length", "Content-Type", "X-Fal-Request-Timeout", "X-Fal-Queue-Priority"]
NAMES += ["X-Fal-Retry-Config", "X-Fal-File-Name", "X-Fal-Object-Lifecycle", "X-Fal-Tags", "Idempotency-Key", "Expect"]
NAMES += [
    "X-Fal-Target-Url",
    "X-Fal-Object-Lifecycle-Preference",
    "X-Fal-No-Retry",
    "Access-Control-Request-Method",
    "Transfer-Encoding",
    "Range",
]
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "get", "\xe9"]
QUERIES = [b"fal_webhook=", b"fal_max_queue_length=", b"logs=", b"expires=", b"signature=", b"limit="]
QUERIES += [b"before=", b"logs_at=", b"attempt=", b"rows_at="]


class Requests:
    """Requests drawn from a seed, of a client with these keys; it remembers the addresses that it is answered."""

    def __init__(self, seed: int, keys: list[str]) -> None:
        self._draw = random.Random(seed)
        self._keys = [f"Key {key}".encode() for key in keys]
        self._known = [f"/{DEFAULT_APP}/requests/{'0' * 32}"]

    def one(self):
        """(method, path, query, headers, body)"""
        draw = self._draw
        kind = draw.choice([self._submit, self._submit, self._follow, self._follow, self._upload, self._anything])
        method, path, body = kind()
        headers = [(b"authorization", draw.choice(self._keys) if draw.random() < 0.95 else self._word())]
        headers += [(draw.choice(NAMES).lower().encode(), self._word()) for _ in range(draw.choice([0, 1, 2, 4]))]
        query = b"&".join(draw.choice(QUERIES) + quote(self._word()).encode() for _ in range(draw.choice([0, 0, 1, 2])))
        if draw.random() < 0.1:
            target = f"https://queue.fal.run{quote(path)}?{query.decode()}".encode()
            return method, "/api/fal/proxy", b"", [*headers, (b"x-fal-target-url", target)], body
        return method, path, query, headers, body

    def learn(self, answer: asgi.Answer) -> None:
        """Take up the addresses in an answer."""
        if answer.status == 200 and len(answer.body) < 100_000:
            found = re.findall(rb'"http://[^"]*?(/[^"]*)"', answer.body)
            self._known = (self._known + [address.decode() for address in found])[-60:]

    def _word(self) -> bytes:
        return self._draw.choice(WORDS) if self._draw.random() < 0.8 else self._draw.randbytes(9).translate(PRINTED)

    def _submit(self):
        draw, fields = self._draw, dict(GOOD)
        for _ in range(draw.choice([0, 1, 1, 3])):
            name = draw.choice([*EndpointFields.model_fields, "work_dir", "\x00", "__class__", "output_dir"])
            fields[name] = draw.choice(
                [*HOSTILE_VALUES, draw.random(), "data:,x", "data:;base64,%", "http://[", [1, {}]]
            )
        body = json.dumps(fields).encode()
        body = mutated(draw, body) if draw.random() < 0.3 else body
        sub = draw.choice(["", "", "/x/../y", "/stream"])
        return "POST", draw.choice(["", "", "/run", "/queue"]) + f"/{DEFAULT_APP}{sub}", body

    def _follow(self):
        draw = self._draw
        path = urlsplit(draw.choice(self._known)).path
        path += draw.choice(["", "", "", "/status", "/status/stream", "/response", "/cancel", "/\x00", "/../.."])
        if draw.random() < 0.2:
            found = re.findall(r"[0-9a-f]{32}", path)
            path = f"/api/jobs/{found[0]}" if found and draw.random() < 0.8 else "/api/jobs"
            path += draw.choice(["", "", "/progress", "/report/1-x/report.html", "/report/9-x/previews/step-1/1.png"])
        if draw.random() < 0.1:
            path = mutated(draw, path.encode()).decode("latin-1")
        fitting = "PUT" if path.endswith("/cancel") else draw.choice(["GET", "GET", "DELETE"])
        return fitting if draw.random() < 0.9 else draw.choice(METHODS), path, self._word()

    def _upload(self):
        draw = self._draw
        routes = [
            "/rest/storage/auth/token",
            "/rest/storage/upload/initiate",
            "/rest/storage/upload/initiate-multipart",
        ]
        routes += ["/files/upload", "/files/upload/multipart", "/files/a b", "/files/\xe9", "/uploads/x"]
        known = urlsplit(draw.choice(self._known)).path
        path = draw.choice(
            [*routes, f"{known}/multipart/{draw.choice(['0' * 32, 'x'])}/{draw.choice(['1', '-1', 'x'])}"]
        )
        path = f"{known}/{draw.choice(['1', '0', '9' * 9, 'complete'])}" if "/multipart/" in known else path
        words = {"file_name": draw.choice(HOSTILE_VALUES), "content_type": draw.choice(HOSTILE_VALUES)}
        parts = {"parts": draw.choice([*HOSTILE_VALUES, [{"partNumber": draw.choice([1, 0, True, "1", 1e9])}]])}
        body = draw.choice([json.dumps(words).encode(), json.dumps(parts).encode(), self._word(), draw.randbytes(3000)])
        fitting = "PUT" if re.search(r"/[\w-]*\d$|/files/.[^/]*$|/uploads/", path) else "POST"
        return fitting if draw.random() < 0.9 else draw.choice(METHODS), path, body

    def _anything(self):
        draw = self._draw
        path = "/" + "/".join(self._word().decode("latin-1") for _ in range(draw.randrange(6)))
        return draw.choice(METHODS), path, self._word()


# Of random bytes those that may stand in a header.
PRINTED = bytes(byte if byte >= 32 and byte != 127 else 9 for byte in range(256))


async def send_all(app, requests: Requests) -> tuple[dict[int, int], int]:
    """How many answers there were of each status, and how much memory the later ones took up."""
    counts, process, before = {}, psutil.Process(), 0
    async with asgi.running(app):
        for number in range(COUNT):
            if number == WARM:
                before = process.memory_info().rss
            request = requests.one()
            answer = await asyncio.wait_for(asgi.ask(app, *request), 30)
            assert 200 <= answer.status < 500, (request, answer.body)
            counts[answer.status] = counts.get(answer.status, 0) + 1
            requests.learn(answer)
        assert (await asgi.ask(app, "GET", "/healthz")).status == 200
    return counts, process.memory_info().rss - before


def test_fuzzed_requests_are_answered_and_leave_no_file_behind(tmp_path):
    data = tmp_path / "data"
    keys = [Keys(data).add(name, "submit") for name in ("one", "two")]
    store = JobStore(f"sqlite:///{data / 'jobs.db'}")
    app = create_app(WebOptions(data_dir=data, is_open=False, min_free_bytes=0, max_body_bytes=1 << 20), store)
    counts, growth = asyncio.run(send_all(app, Requests(1, keys)))
    # The walk comes past every kind of answer.
    assert {200, 202, 400, 401, 404, 413, 422} <= counts.keys(), counts
    assert growth < MOST_GROWTH_BYTES
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert not [path for path in data.rglob("*") if path.name.endswith(".tmp")]
    stored = {path.suffix: set() for path in (data / "files").iterdir()}
    for path in (data / "files").iterdir():
        stored[path.suffix].add(path.stem)
    assert stored.keys() <= {".json", ".data", ".parts"}
    assert stored[".json"] == stored[".data"]
    for job in store.list(limit=COUNT):
        store.cancel(job.id)
        assert store.delete(job.id)
    assert sorted((data / "jobs").iterdir()) == []
    store.close()
