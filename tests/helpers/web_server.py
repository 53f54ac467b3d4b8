"""A started `sa3dist serve` as a process of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.program import ENVIRONMENT

DEADLINE = 120
# What keeps a small training exact and short.
SETTINGS = ("mixed_precision=no", "num_workers=0", "log_every=1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class WebServer:
    """One server on loopback: ``start`` it, ``kill`` or ``stop`` it, and start it again at the same address.

    folder   holds its data and what it says: data/ and server-PORT.log
    base     its medium-base; None: the released one, for a server that trains nothing
    more     further words of its command line
    """

    def __init__(self, folder: Path, base: Path | None, *more: str, settings: tuple[str, ...] = SETTINGS) -> None:
        self.port = free_port()
        self.data = folder / "data"
        self.log = folder / f"server-{self.port}.log"
        words = ["--port", str(self.port), "--state", str(self.data)]
        words += [] if base is None else ["--model", f"medium-base={base}"]
        words += [word for setting in settings for word in ("--set", setting)]
        self._command = [sys.executable, "-m", "sa3dist.cli", "serve", *words, *more]
        self.url = f"{'https' if '--tls' in more else 'http'}://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Return when it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to the server alone: jobs that run go on."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As an operator would: jobs go on."""
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def serving(folder: Path, base: Path | None, *more: str) -> Iterator[str]:
    """A started server; gives its address."""
    server = WebServer(folder, base, *more)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()
