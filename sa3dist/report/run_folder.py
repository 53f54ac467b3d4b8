"""Read a run's output_dir, also during the run, and with missing or incomplete files."""

import collections
import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sa3dist.data.remote.fetch import redacted
from sa3dist.errors import DataError
from sa3dist.formats import RESULT_NAME, RUN_CONFIG_NAME, DatasetIndex, dataset_digest
from sa3dist.training.row_files import METRICS_NAME, read_rows

WARNINGS_NAME, STARTS_NAME = "warnings.jsonl", "starts.jsonl"
_STEP_FOLDER = re.compile(r"step-(\d{8})")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"]+", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Preview:
    """One preview made after ``step``: ``<number>.flac``, its picture, and the content of its JSON file."""

    step: int
    number: int
    audio: Path
    picture: Path
    about: dict[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.about.get("prompt", ""))


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The content of a run's output_dir. Missing parts are empty.

    rows, health, copies, warnings, starts   one dict per line of metrics.jsonl and of the files of these names
    settings, status, result, best           from run.yaml, status.json, result.json, best.json
    description                              from the newest checkpoint, or config.json
    previews                                 by step, then by number
    shown_as                                 a name for the page in place of the run's own
    """

    folder: Path
    rows: list[dict[str, Any]]
    health: list[dict[str, Any]]
    copies: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    settings: dict[str, Any]
    status: dict[str, Any]
    result: dict[str, Any]
    best: dict[str, Any]
    description: dict[str, Any]
    previews: dict[int, dict[int, Preview]]
    shown_as: str | None = None

    @property
    def name(self) -> str:
        return self.shown_as or str(self.settings.get("name") or self.folder.name)

    @property
    def step(self) -> int:
        """The last step with a row."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def best_step(self) -> int | None:
        step = self.best.get("step")
        return step if isinstance(step, int) else None

    @property
    def held_out(self) -> list[Any]:
        """Keys of held-out clips."""
        keys = self.description.get("held_out_clips")
        return keys if isinstance(keys, list) else []

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column of metrics.jsonl, from rows that have it."""
        points = [(row["step"], row[key]) for row in self.rows if is_number(row.get(key))]
        return [step for step, _ in points], [value for _, value in points]

    @functools.cached_property
    def index(self) -> DatasetIndex | None:
        """The training clips, from the run's shards on this machine; None if they are elsewhere or removed."""
        digest, work = self.description.get("dataset_sha256"), self.settings.get("work_dir")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest) or not work:
            return None
        held_out = set(map(str, self.held_out))
        # work_dir may be relative to another directory, or may have been moved together with the output_dir.
        for work_dir in (Path(work), self.folder.parent / Path(work).name):
            for directory in sorted((work_dir / "shards").glob("[0-9a-f]*")):
                index = DatasetIndex.find(directory)
                if index is None:
                    continue
                # The run's digest does not cover held-out clips, though the shards contain them. If they are from
                # another data set, the shards do not, but a training clip may have the key of a held-out one.
                trained = tuple(clip for clip in index.clips if clip.key not in held_out)
                for clips in (trained, index.clips):
                    if dataset_digest(clips) == digest:
                        return dataclasses.replace(index, clips=clips, digest=digest)
        return None


def with_own_names(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """The runs; those that share a name are called by their folder, or by its path if folders share a name, too."""
    names = collections.Counter(run.name for run in runs)
    folders = collections.Counter(run.folder.absolute().name for run in runs)

    def own_name(run: RunFolder) -> str | None:
        if names[run.name] == 1:
            return None
        folder = run.folder.absolute()
        return folder.name if folders[folder.name] == 1 else str(run.folder)

    return [dataclasses.replace(run, shown_as=own_name(run)) for run in runs]


def read_run(folder: Path) -> RunFolder:
    """Read an output_dir. Raises DataError if it has neither settings nor rows of a run."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in ("run.yaml", METRICS_NAME)):
        raise DataError(f"{folder}: no run's folder, it has neither run.yaml nor metrics.jsonl; give an output_dir")
    return RunFolder(
        folder,
        rows=[row for row in read_rows(folder / METRICS_NAME) if isinstance(row.get("step"), int)],
        health=_by_step(folder / "health.jsonl"),
        copies=_by_step(folder / "copies.jsonl"),
        warnings=[
            {**row, "message": without_keys(str(row.get("message", "")))} for row in read_rows(folder / WARNINGS_NAME)
        ],
        starts=read_rows(folder / STARTS_NAME),
        settings={name: _public(value) for name, value in _mapping(folder / "run.yaml").items()},
        status={name: _public(value) for name, value in _mapping(folder / "status.json").items()},
        result=_mapping(folder / RESULT_NAME),
        best=_mapping(folder / "best.json"),
        description=_description(folder),
        previews=_previews(folder / "previews"),
    )


def without_keys(text: str) -> str:
    """``text`` with every address redacted, since addresses may contain keys."""
    return _ADDRESS.sub(lambda match: redacted(match[0]), text)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _public(value: Any) -> Any:
    if isinstance(value, list):
        return [_public(item) for item in value]
    return without_keys(value) if isinstance(value, str) else value


def _by_step(path: Path) -> list[dict[str, Any]]:
    """The last row of every step, sorted by step."""
    rows = {row["step"]: row for row in read_rows(path) if isinstance(row.get("step"), int)}
    return [rows[step] for step in sorted(rows)]


def _mapping(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        # Not with yaml, which is a hundred times slower for JSON.
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if isinstance(value, dict):
            return value
    return {}


def _description(folder: Path) -> dict[str, Any]:
    saved = sorted((folder / "checkpoints").glob("step-" + "[0-9]" * 8))
    state = _mapping(saved[-1] / "state.json") if saved else {}
    description = state.get("description")
    if not isinstance(description, dict):
        description = _mapping(folder / RUN_CONFIG_NAME)
    return {**description, **({"torch": state["torch"]} if "torch" in state else {})}


def _previews(folder: Path) -> dict[int, dict[int, Preview]]:
    previews: dict[int, dict[int, Preview]] = {}
    for directory in sorted(folder.glob("step-*")):
        match = _STEP_FOLDER.fullmatch(directory.name)
        for path in sorted(directory.glob("*.json")) if match else ():
            audio, about = path.with_suffix(".flac"), _mapping(path)
            # The JSON file is written last: without it the others may be incomplete.
            if path.stem.isdecimal() and about and audio.exists():
                step, number = int(match[1]), int(path.stem)
                preview = Preview(step, number, audio, path.with_suffix(".png"), about)
                previews.setdefault(step, {})[number] = preview
    return {step: dict(sorted(of_step.items())) for step, of_step in sorted(previews.items())}
