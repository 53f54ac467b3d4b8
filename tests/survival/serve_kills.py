"""Random SIGKILLs and pauses of an endpoint's schedulers, runners and trainers, and a database that goes away.

    python tests/survival/serve_kills.py DIRECTORY [--events 40] [--seed 0] [--database sqlite|postgresql]

With PostgreSQL two schedulers work as two hosts, each with locks of its own, so that the lease alone keeps their
attempts apart. Jobs come in as others end. In the end every job has to be finished once, with the file of an
undisturbed run.
"""

import argparse
import collections
import contextlib
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from sqlalchemy import func, select  # noqa: E402

from sa3dist.commands.demo import synthesise_clips  # noqa: E402
from sa3dist.model.tiny import write_tiny_base  # noqa: E402
from sa3dist.serve.job_store import JobStore  # noqa: E402
from sa3dist.serve.tables import DatabaseAway, deliveries  # noqa: E402
from tests.helpers import serve  # noqa: E402
from tests.helpers.postgres import Postgres  # noqa: E402

TARGETS = ("scheduler", "runner", "trainer", "all")
LOOK_SECONDS = 0.05
# Where nobody listens: the row counts the ends of a job.
WEBHOOK = "http://127.0.0.1:9/"


class Watch:
    """Sees what attempts write: nothing of an older one once a newer one has begun."""

    def __init__(self, store: JobStore) -> None:
        self._store, self._seen, self.overlaps = store, {}, []

    def look(self) -> None:
        for folder in self._store.folder.iterdir():
            numbers = sorted(int(run.parent.name.partition("-")[2]) for run in folder.glob("attempt-*/run"))
            for number in numbers[:-1]:
                written = self._written(folder / f"attempt-{number}" / "run")
                before = self._seen.setdefault((folder.name, number, numbers[-1]), written)
                # Removed when a later one has succeeded.
                if written is not None and before is not None and written > before:
                    self.overlaps.append((folder.name, number, numbers[-1]))
                    self._seen[folder.name, number, numbers[-1]] = written

    @staticmethod
    def _written(run: Path) -> tuple[int, list[str]] | None:
        with contextlib.suppress(OSError):
            rows = run / "metrics.jsonl"
            saved = sorted(path.name for path in run.glob("checkpoints/step-*"))
            return (rows.stat().st_size if rows.exists() else 0, saved)
        return None


class Series:
    def __init__(self, directory: Path, words: argparse.Namespace) -> None:
        self._words, self._random = words, random.Random(words.seed)
        base, clips = directory / "base", directory / "clips.zip"
        if not clips.exists():
            write_tiny_base(base)
            synthesise_clips(clips, seed=1, count=8)
        self._data = directory / f"data-{words.database}"
        shutil.rmtree(self._data, ignore_errors=True)
        self._data.mkdir()
        self._postgres = Postgres() if words.database == "postgresql" else None
        url = self._postgres.url if self._postgres else f"sqlite:///{self._data / 'jobs.db'}"
        self._store = JobStore(url, self._data / "jobs")
        self._request = serve.request(clips, words.steps)
        names, slots = ("a", "b") if self._postgres else ("a",), [0] if self._postgres else list(range(words.slots))
        self._at_once = len(names) * len(slots)
        options = {"devices": slots, "lease_seconds": words.lease}
        self.hosts = [serve.Host(name, self._store, self._data, base, **options) for name in names]
        self._watch = Watch(self._store)
        self._events, self._jobs = collections.Counter(), []
        self._later: list[tuple[float, object]] = []

    def run(self) -> dict:
        begin = time.monotonic()
        for host in self.hosts:
            host.start()
        try:
            reference = self._undisturbed()
            self._disturb()
            self._wait(lambda: all(job.is_finished for job in self._now()))
            found = self._judge(reference)
        finally:
            for host in self.hosts:
                host.end_all()
            self._store.close()
            if self._postgres:
                self._postgres.close()
        return found | {"seconds": round(time.monotonic() - begin)}

    def _submit(self) -> None:
        words = {"app": serve.APP, "key": "series", "settings": serve.SETTINGS, "webhook": WEBHOOK, "retries": 100}
        # A client that is not answered sends it again.
        dedup = f"job {len(self._jobs)}"
        job = self._answered(lambda: self._store.submit(self._request, **words, dedup=dedup))
        self._jobs.append(job.id)

    def _answered(self, ask):
        while True:
            try:
                return ask()
            except DatabaseAway:
                self._pass_time()

    def _now(self) -> list:
        return [self._answered(lambda job_id=job_id: self._store.get(job_id)) for job_id in self._jobs]

    def _undisturbed(self) -> str:
        self._submit()
        self._wait(lambda: self._now()[0].is_finished)
        (job,) = self._now()
        assert (job.state, job.attempts) == ("SUCCEEDED", 1), job
        return serve.lora_digest(job)

    def _disturb(self) -> None:
        names = [*self._words.away, *self._words.events * [None]]
        self._random.shuffle(names)
        for away in names:
            # There is always one more than can run.
            while sum(not job.is_finished for job in self._now()) <= self._at_once:
                self._submit()
            until = time.monotonic() + self._random.uniform(*self._words.gap)
            self._wait(lambda until=until: time.monotonic() > until)
            self._take_database_away(away) if away else self._strike()

    def _take_database_away(self, seconds: float) -> None:
        self._events[f"database away {seconds:g} s"] += 1
        self._postgres.stop()
        until = time.monotonic() + seconds
        self._wait(lambda: time.monotonic() > until)
        self._postgres.start()

    def _strike(self) -> None:
        """Kill or pause one thing of one host that is there."""
        while True:
            host, target = self._random.choice(self.hosts), self._random.choice(TARGETS)
            kill = self._random.random() < 0.6
            seconds = self._random.choice((2, self._words.lease * 1.5))
            hit = [psutil.Process(host.scheduler.pid)] if target in ("scheduler", "all") else []
            for kind in ("runner", "trainer"):
                found = host.processes(kind) if target in (kind, "all") else []
                hit += found if target == "all" else found[:1]
            # A scheduler alone is hit as often as the rest.
            if hit and (len(hit) > 1 or target != "all"):
                break
            self._pass_time()
        self._events[f"{'SIGKILL' if kill else f'pause {seconds:g} s'} {target}"] += 1
        for process in hit:
            serve.send(process, signal.SIGKILL if kill else signal.SIGSTOP)
        if not kill:
            self._later.append((time.monotonic() + seconds, lambda: [serve.send(p, signal.SIGCONT) for p in hit]))
        elif target in ("scheduler", "all"):
            host.scheduler.wait()
            self._later.append((time.monotonic() + 1, host.start))

    def _pass_time(self) -> None:
        due = [act for at, act in self._later if at <= time.monotonic()]
        self._later = [(at, act) for at, act in self._later if at > time.monotonic()]
        for act in due:
            act()
        self._watch.look()
        time.sleep(LOOK_SECONDS)

    def _wait(self, until) -> None:
        deadline = time.monotonic() + 300
        while not until():
            assert time.monotonic() < deadline, [(job.id, job.state, job.stage, job.step) for job in self._now()]
            self._pass_time()

    def _judge(self, reference: str) -> dict:
        jobs = self._now()
        with self._store.database.reading() as connection:
            counted = select(deliveries.c.job_id, func.count()).group_by(deliveries.c.job_id)
            ends = dict(map(tuple, connection.execute(counted)))
        begin = time.monotonic()
        while left := [process.pid for process, mark in serve.marks() if mark.store == str(self._store.folder)]:
            if time.monotonic() - begin > 2 * self._words.lease:
                break
            self._pass_time()
        done = [job for job in jobs if job.state == "SUCCEEDED"]
        return {
            "events": dict(sorted(self._events.items())),
            "jobs": len(jobs),
            "succeeded": len(done),
            "ended_once": sum(ends.get(job.id) == 1 for job in jobs),
            "identical": sum(serve.lora_digest(job) == reference for job in done),
            "attempts": sum(job.attempts for job in jobs),
            "overlaps": self._watch.overlaps,
            "processes_left": left,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--events", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lease", type=float, default=6.0, help="seconds")
    parser.add_argument("--slots", type=int, default=2, help="jobs at once; with PostgreSQL one on each host")
    parser.add_argument("--gap", type=float, nargs=2, default=(3.0, 9.0), help="seconds between two events")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--away", type=float, nargs="*", default=(), help="seconds that PostgreSQL is away, each once")
    words = parser.parse_args()
    found = Series(words.directory.absolute(), words).run()
    print(json.dumps(found, indent=1))
    once = found["jobs"] == found["succeeded"] == found["ended_once"] == found["identical"]
    return 0 if once and not found["overlaps"] and not found["processes_left"] else 1


if __name__ == "__main__":
    sys.exit(main())
