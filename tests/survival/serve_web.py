"""Web servers of an endpoint, killed and in pairs: what clients and the page see of the jobs goes on.

    python tests/survival/serve_web.py DIRECTORY [--only restart|pair] [--steps 150]

restart   SIGKILL to `sa3dist serve` while a job trains, twice; a new one at the same address adopts it. Clients see the
          same job finish once, in its first attempt, with the file of an undisturbed run.
pair      two servers on PostgreSQL: what is submitted to one is seen, cancelled and fetched at the other, and goes on
          when the one is killed.
"""

import argparse
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from sqlalchemy import func, select  # noqa: E402

from sa3dist.commands.demo import synthesise_clips  # noqa: E402
from sa3dist.model.tiny import write_tiny_base  # noqa: E402
from sa3dist.serve.job_store import JobStore  # noqa: E402
from sa3dist.serve.tables import deliveries  # noqa: E402
from tests.helpers.postgres import Postgres  # noqa: E402
from tests.helpers.serve import APP, marks, send  # noqa: E402
from tests.helpers.web_server import SETTINGS, WebServer  # noqa: E402

DEADLINE = 300
LOOK_SECONDS = 0.1
# Where nobody listens: the rows of its deliveries count the ends of a job.
WEBHOOK = "http://127.0.0.1:9/"
# Exact, and seen at every step.
EXACT = (*SETTINGS, "deterministic=true", "learning_rate=3e-3", "report=false", "health=false")


class Client:
    """What people do at one server, with the addresses that it gives."""

    def __init__(self, server: WebServer) -> None:
        self.server, self._http = server, httpx.Client(base_url=server.url, timeout=30)

    def submit(self, clips: Path, steps: int, **more) -> str:
        with clips.open("rb") as data:
            stored = self._http.put("/files/clips.zip", content=data).raise_for_status().json()["url"]
        request = {"audio_data_url": stored, "number_of_steps": steps, "rank": 4, "duration": 2, **more}
        asked = {"base_precision": "fp32", **request}
        answer = self._http.post(f"/{APP}", json=asked, params={"fal_webhook": WEBHOOK})
        return answer.raise_for_status().json()["request_id"]

    def status(self, job_id: str) -> str:
        """The wire's word. Raises httpx.HTTPError while the server is away."""
        return self._http.get(f"/{APP}/requests/{job_id}/status").raise_for_status().json()["status"]

    def shown(self) -> dict[str, dict]:
        """The jobs that the page lists, by id."""
        return {job["id"]: job for job in self._http.get("/api/jobs").raise_for_status().json()["jobs"]}

    def cancel(self, job_id: str) -> int:
        return self._http.put(f"/{APP}/requests/{job_id}/cancel").status_code

    def result(self, job_id: str) -> httpx.Response:
        return self._http.get(f"/{APP}/requests/{job_id}")

    def digest(self, address: str) -> str:
        """Of a file, by any server's address, fetched from this one."""
        return hashlib.sha256(
            self._http.get(httpx.URL(address).raw_path.decode()).raise_for_status().content
        ).hexdigest()

    def lora(self, job_id: str) -> str:
        return self.digest(self.result(job_id).raise_for_status().json()["lora_file"]["url"])

    def wait(self, until: Callable[[], bool]) -> None:
        """Ask again until it is so, while the server is away, too."""
        deadline = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if until():
                    return
            assert time.monotonic() < deadline, self.shown()
            time.sleep(LOOK_SECONDS)

    def wait_for_step(self, job_id: str, step: int) -> None:
        self.wait(lambda: self.shown()[job_id]["step"] >= step)

    def wait_for_end(self, job_id: str) -> dict:
        self.wait(lambda: self.status(job_id) == "COMPLETED")
        self.wait(lambda: self.shown()[job_id]["finished"] is not None)
        return self.shown()[job_id]


def ends(store: JobStore) -> dict[str, int]:
    """How often each job has ended, by the webhooks that were written with its end."""
    with store.database.reading() as connection:
        counted = select(deliveries.c.job_id, func.count()).group_by(deliveries.c.job_id)
        return dict(map(tuple, connection.execute(counted)))


@contextlib.contextmanager
def servers(folder: Path, base: Path, count: int, *more: str) -> Iterator[list[Client]]:
    """Started servers of one data folder; whatever runs in the end is killed."""
    folder.mkdir(parents=True)
    words = ["--allow-private-webhooks", "--slots", "1", *more]
    made = [WebServer(folder, base, *words, settings=EXACT) for _ in range(count)]
    try:
        for server in made:
            server.start()
        yield [Client(server) for server in made]
    finally:
        for server in made:
            if server.process is not None:
                server.kill()
        store = str(folder / "data" / "jobs")
        while left := [process for process, mark in marks() if mark.store == store]:
            for process in left:
                send(process, 9)


def restart(folder: Path, base: Path, clips: Path, steps: int) -> dict:
    with servers(folder, base, 1) as (client,):
        first = client.submit(clips, steps)
        undisturbed = client.wait_for_end(first)
        digest = client.lora(first)
        # The same adapter comes of it.
        second, seen = client.submit(clips, steps), []
        for step in (2, steps // 2):
            client.wait_for_step(second, step)
            client.server.kill()
            client.server.start()
            seen.append(client.shown()[second]["state"])
        done = client.wait_for_end(second)
        store = JobStore(f"sqlite:///{client.server.data / 'jobs.db'}")
        found = {
            "jobs": len(client.shown()),
            "states": [undisturbed["state"], *seen, done["state"]],
            "attempts": [undisturbed["attempts"], done["attempts"]],
            "ends": sorted(ends(store).values()),
            "identical": client.lora(second) == digest,
        }
        store.close()
    good = {
        "jobs": 2,
        "states": ["SUCCEEDED", "RUNNING", "RUNNING", "SUCCEEDED"],
        "attempts": [1, 1],
        "ends": [1, 1],
        "identical": True,
    }
    return found | {"ok": found == good}


def pair(folder: Path, base: Path, clips: Path, steps: int) -> dict:
    postgres = Postgres()
    try:
        with servers(folder, base, 2, "--database", postgres.url) as (one, other):
            long = one.submit(clips, 20000)
            other.wait_for_step(long, 1)
            waiting = other.submit(clips, steps, seed=1)
            one.wait(lambda: one.shown()[waiting]["queue_position"] == 0)
            codes = [other.cancel(long), one.cancel(waiting)]
            cancelled = [one.wait_for_end(long)["state"], other.wait_for_end(waiting)["state"]]
            answers = [one.result(long).status_code, other.result(waiting).status_code]
            # What one has begun the other ends.
            left = one.submit(clips, steps, seed=2)
            other.wait_for_step(left, 2)
            address = one.server.url
            one.server.kill()
            seen = other.shown()[left]["state"]
            done = other.wait_for_end(left)
            one.server.start()
            links = [client.result(left).json()["lora_file"]["url"] for client in (one, other)]
            store = JobStore(postgres.url, other.server.data / "jobs")
            found = {
                "cancel": codes,
                "cancelled": cancelled,
                "results": answers,
                "left": [seen, done["state"], done["attempts"]],
                "ends": sorted(ends(store).values()),
                "fetched_at_both": links[0].startswith(address) and one.digest(links[1]) == other.digest(links[0]),
            }
            store.close()
    finally:
        postgres.close()
    good = {
        "cancel": [202, 202],
        "cancelled": 2 * ["CANCELLED"],
        "results": [499, 499],
        "left": ["RUNNING", "SUCCEEDED", 1],
    }
    return found | {"ok": found == good | {"ends": [1, 1, 1], "fetched_at_both": True}}


CASES = {"restart": restart, "pair": pair}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", choices=CASES, help="one of the cases")
    parser.add_argument("--steps", type=int, default=150)
    words = parser.parse_args()
    directory = words.directory.absolute()
    base, clips = directory / "base", directory / "clips.zip"
    if not clips.exists():
        write_tiny_base(base)
        synthesise_clips(clips, seed=1, count=8)
    found = {}
    for name in [words.only] if words.only else CASES:
        begin = time.monotonic()
        folder = directory / f"{name}-{time.time_ns()}"
        found[name] = CASES[name](folder, base, clips, words.steps) | {"seconds": round(time.monotonic() - begin)}
    print(json.dumps(found, indent=1))
    return 0 if all(case["ok"] for case in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
