"""Trackers as an output of a run. Each is called in its own thread, so it can neither slow down nor end training."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3dist.errors import counted
from sa3dist.formats import write_json
from sa3dist.tracking import kinds

if TYPE_CHECKING:
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)

ID_NAME = "trackers.json"
# Maximum of queued rows and previews per tracker; further ones are dropped.
MAX_QUEUED = 1000
# Columns about speed and memory, grouped as perf/; others are grouped as train/.
PERFORMANCE = {
    *("step_seconds", "data_wait", "recomputed_blocks", "peak_bytes", "reserved_bytes"),
    *("startup_seconds", "previews_seconds", "previews_missing"),
    "validation_seconds",
}
NO_CURVES = {"step", "clips", "resumed_from"}


def tags(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row, named for trackers: ``train/loss``, ``perf/clips_per_second``; ``val/...`` unchanged."""
    values = {}
    for name, value in row.items():
        group = "perf/" if name in PERFORMANCE else "" if "/" in name else "train/"
        parts = {f"/{part}": number for part, number in value.items()} if isinstance(value, dict) else {"": value}
        if name not in NO_CURVES:
            values |= {group + name + part: number for part, number in parts.items() if isinstance(number, int | float)}
    if row.get("step_seconds"):
        values["perf/clips_per_second"] = row["clips_seen"] / row["step"] / row["step_seconds"]
    return values


class Trackers:
    """A ``metrics.Output`` for all trackers in ``settings.log_with``."""

    def __init__(self, settings: Settings, output_dir: Path, resumed_from: int | None) -> None:
        """resumed_from: step of the checkpoint that is continued; the trackers' runs are then continued, too."""
        # Without addresses of data, which may contain secrets.
        left_out = {"audio_data_url", "lora_checkpoint_url", *(["validation"] if settings.validation_source else [])}
        values = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in settings.as_dict().items()
            if name not in left_out
        }
        run_id = _run_id(output_dir, resumed_from)
        run = kinds.TrackedRun(settings.log_project, settings.name, run_id, output_dir, resumed_from, values)
        self._resumed = resumed_from is not None
        self._threads = [
            _TrackerThread(name, partial(kind, run)) for name, kind in kinds.chosen(settings.log_with).items()
        ]

    def write(self, row: dict[str, Any]) -> None:
        for thread in self._threads:
            thread.put(lambda tracker: tracker.log(row["step"], tags(row)))

    def add_previews(self, step: int, folder: Path) -> None:
        # On resume, previews of the base have been logged by the first start.
        if step or not self._resumed:
            for thread in self._threads:
                thread.put(lambda tracker: _log_previews(tracker, step, folder))

    def sync(self) -> None:
        """Does nothing: rows that a tracker may miss are in metrics.jsonl."""

    def finish(self) -> None:
        for thread in self._threads:
            thread.end()

    def close(self, until: float) -> None:
        """Wait until all trackers have finished, or until the deadline."""
        for thread in self._threads:
            thread.join(until)


def _run_id(output_dir: Path, resumed_from: int | None) -> str:
    path = output_dir / ID_NAME
    if resumed_from is not None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["id"]
    run_id = uuid.uuid4().hex[:12]
    write_json(path, {"id": run_id})
    return run_id


def _log_previews(tracker: kinds.Tracker, step: int, folder: Path) -> None:
    # A preview's JSON file is written last, so its audio and picture exist.
    for path in sorted(folder.glob("*.json")):
        info = json.loads(path.read_text(encoding="utf-8"))
        audio, picture = path.with_suffix(".flac"), path.with_suffix(".png")
        tracker.log_preview(step, kinds.Preview(info["number"], info["prompt"], audio, picture))


class _TrackerThread:
    """Opens a tracker and makes queued calls to it. The first failure is logged, later ones are not."""

    def __init__(self, name: str, open_tracker: Callable[[], kinds.Tracker]) -> None:
        self._name, self._open = name, open_tracker
        self._calls: queue.SimpleQueue[Callable[[kinds.Tracker], None] | None] = queue.SimpleQueue()
        # Acquired by the first warning, and never released.
        self._warned = threading.Lock()
        # A daemon, so that the process can end without waiting for it.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[kinds.Tracker], None]) -> None:
        """Queue a call, without waiting."""
        if not self._thread.is_alive():
            return
        if self._calls.qsize() < MAX_QUEUED:
            self._calls.put(call)
        else:
            self._warn(f"does not keep up: {counted(MAX_QUEUED, 'row')} wait for it")

    def end(self) -> None:
        self._calls.put(None)

    def join(self, until: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._warn("did not take everything in the time it has at the end")

    def _work(self) -> None:
        tracker = self._try(self._open)
        if tracker is None:
            return
        while (call := self._calls.get()) is not None:
            self._try(partial(call, tracker))
        self._try(tracker.finish)

    def _try(self, call: Callable[[], Any]) -> Any:
        """The result of ``call``; None, with a warning, if it fails."""
        try:
            return call()
        # Some trackers end the program if they cannot log in.
        except (Exception, SystemExit) as failure:
            self._warn(f"{type(failure).__name__}: {failure}".splitlines()[0])
            return None

    def _warn(self, reason: str) -> None:
        if self._warned.acquire(blocking=False):
            log.warning("tracker %s: %s; training goes on, metrics.jsonl has every row", self._name, reason)
