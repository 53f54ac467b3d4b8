"""A PostgreSQL server of the test's own: in a folder, on a Unix socket, with no port."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

# Debian keeps its programs out of the path.
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def is_here() -> bool:
    return bool(BINARIES) or shutil.which("postgres") is not None


class Postgres:
    """Started when made; ``stop`` and ``start`` take it away and bring it back with its data."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sa3dist-postgres-"))
        self._data = self._folder / "data"
        self._server: subprocess.Popen | None = None
        # It refuses to run as root.
        self._as = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        made = [self._program("initdb"), "-D", self._data, "-U", "sa3dist", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd=self._folder, **self._as)
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://sa3dist@/postgres?host={self._folder}"

    def start(self) -> None:
        words = ["-D", self._data, "-c", "listen_addresses=", "-k", self._folder, "-F"]
        log = (self._folder.parent / f"{self._folder.name}.log").open("ab")
        self._server = subprocess.Popen(
            [self._program("postgres"), *words], stdout=log, stderr=log, cwd=self._folder, **self._as
        )
        log.close()
        deadline = time.monotonic() + 60
        while subprocess.run([self._program("pg_isready"), "-q", "-h", self._folder]).returncode != 0:
            assert time.monotonic() < deadline, "PostgreSQL does not start"
            time.sleep(0.1)

    def stop(self) -> None:
        """At once, as a crash of its machine would."""
        # SIGQUIT: the server ends its processes and recovers at its next start.
        self._server.send_signal(3)
        self._server.wait()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)
        (self._folder.parent / f"{self._folder.name}.log").unlink()

    @staticmethod
    def _program(name: str) -> str:
        return str(BINARIES[-1] / name) if BINARIES else name
