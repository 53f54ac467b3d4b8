"""Requests given to an ASGI application as its server gives them: any bytes, and what is answered."""

import contextlib
import dataclasses
import re

# What uvicorn refuses to send, so that the client would see a broken connection.
BAD_NAME = re.compile(rb'[\x00-\x1f\x7f()<>@,;:\[\]={} \t\\"]')
BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


@dataclasses.dataclass
class Answer:
    status: int = 0
    headers: list[tuple[bytes, bytes]] = dataclasses.field(default_factory=list)
    body: bytes = b""


async def ask(app, method, path, query=b"", headers=(), body=b"") -> Answer:
    """The answer to one request, whose client is gone once it has sent its body."""
    answer, sent = Answer(), []

    async def receive():
        if sent:
            return {"type": "http.disconnect"}
        sent.append(True)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], list(message.get("headers", []))
        else:
            answer.body += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in headers],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    for name, value in answer.headers:
        assert not BAD_NAME.search(name), name
        assert not BAD_VALUE.search(value), value
    return answer


def running(app) -> contextlib.AbstractAsyncContextManager:
    """What runs beside an application, for a block."""
    return app.router.lifespan_context(app)
