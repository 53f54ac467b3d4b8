"""The table of previews: a row per prompt, a column per step or run; and which audio is embedded in the page."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import soundfile

from sa3dist.formats import ClipEntry
from sa3dist.report.document import Space, data_url
from sa3dist.report.run_folder import Preview, RunFolder, is_number
from sa3dist.report.sound import ogg, training_clip

# Length of a training clip's excerpt if the preview's length is unknown.
NEAREST_SECONDS = 10.0


@dataclasses.dataclass
class Nearest:
    """The training clip nearest to a preview, from copies.jsonl. audio: its address, or ""."""

    clip: str
    begin_seconds: float
    rank: float | None
    warning: str
    audio: str = ""


@dataclasses.dataclass
class Cell:
    """One preview. audio, picture: addresses, possibly data: URLs; file: address of the FLAC file."""

    preview: Preview
    file: str
    audio: str
    picture: str
    nearest: Nearest | None = None

    @property
    def inside(self) -> bool:
        return self.audio.startswith("data:")


@dataclasses.dataclass(frozen=True)
class Column:
    """The previews of one step of a run. notes: "base", "newest", "best"."""

    run: RunFolder
    step: int
    label: str
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Grid:
    """The table of previews.

    columns   from the base to the newest step
    rows      (prompt, cell or None per column)
    left      number of previews that are not embedded in the page
    """

    columns: list[Column]
    rows: list[tuple[str, list[Cell | None]]]
    left: int


def make_grid(runs: Sequence[RunFolder], page: Path, space: Space, inside: bool) -> Grid:
    """Make the table. page: path of the report, for relative addresses; inside: whether to embed audio."""
    columns = _columns(runs)
    by_column = [_cells(column, page) for column in columns]
    # Embed the newest first, then the other noted columns, then the rest from the newest on, until the page is full.
    order = sorted(range(len(columns)), key=lambda n: (not columns[n].notes, "newest" not in columns[n].notes, -n))
    for number in order if inside else ():
        for cell in by_column[number].values():
            _embed(cell, space)
        if not columns[number].notes and not all(cell.inside for cell in by_column[number].values()):
            break
    for number in order:
        if {"newest", "best"} & set(columns[number].notes):
            for cell in by_column[number].values():
                _embed_nearest(columns[number].run, cell, space)
    keys = dict.fromkeys(key for cells in by_column for key in cells)
    rows = [(prompt, [cells.get((number, prompt)) for cells in by_column]) for number, prompt in sorted(keys)]
    return Grid(columns, rows, sum(not cell.inside for cells in by_column for cell in cells.values()))


def _columns(runs: Sequence[RunFolder]) -> list[Column]:
    columns = []
    for run in runs:
        steps = list(run.previews)
        for step in steps:
            notes = [
                *(["base"] if step == 0 else []),
                *(["newest"] if step and step == steps[-1] else []),
                *(["best"] if step and step == _best_of(run, steps) else []),
            ]
            # Of several runs, show only noted steps, and the base once.
            if len(runs) == 1 or (notes and not (step == 0 and any(column.step == 0 for column in columns))):
                label = f"step {step}" if step else "the base"
                of_run = f"{run.name}, {label}" if len(runs) > 1 and step else label
                columns.append(Column(run, step, of_run, tuple(notes)))
    return columns


def _best_of(run: RunFolder, steps: Sequence[int]) -> int | None:
    """The step of the previews nearest to the best checkpoint."""
    later = [step for step in steps if step]
    return min(later, key=lambda step: abs(step - run.best_step)) if later and run.best_step is not None else None


def _cells(column: Column, page: Path) -> dict[tuple[int, str], Cell]:
    cells = {}
    for number, preview in column.run.previews[column.step].items():
        file = _address(preview.audio, page)
        picture = _address(preview.picture, page) if preview.picture.exists() else ""
        cells[number, preview.prompt] = Cell(preview, file, file, picture, _nearest(column.run, preview))
    return cells


def _address(path: Path, page: Path) -> str:
    """The relative address of a file in the page."""
    return quote(Path(os.path.relpath(path, page.parent)).as_posix())


def _nearest(run: RunFolder, preview: Preview) -> Nearest | None:
    for row in run.copies:
        if row["step"] == preview.step:
            for match in _dicts(row.get("previews")):
                if match.get("number") == preview.number and match.get("clip"):
                    begin = match.get("seconds")
                    rank = match.get("rank")
                    return Nearest(
                        str(match["clip"]),
                        begin if is_number(begin) else 0.0,
                        rank if is_number(rank) else None,
                        str(match.get("warning") or ""),
                    )
    return None


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    yield from (item for item in value if isinstance(item, dict)) if isinstance(value, list) else ()


def _embed(cell: Cell, space: Space) -> None:
    # A missing or incomplete file is not embedded.
    with contextlib.suppress(OSError, soundfile.SoundFileError):
        audio = data_url("audio/ogg", ogg(cell.preview.audio))
        if space.take(audio):
            cell.audio = audio
            if cell.picture:
                picture = data_url("image/png", cell.preview.picture.read_bytes())
                cell.picture = picture if space.take(picture) else cell.picture


def _embed_nearest(run: RunFolder, cell: Cell, space: Space) -> None:
    clip = cell.nearest and _entry(run, cell.nearest.clip)
    if clip is None:
        return
    seconds = cell.preview.about.get("seconds")
    with contextlib.suppress(OSError, soundfile.SoundFileError):
        source = training_clip(run.index, clip)
        audio = ogg(source, cell.nearest.begin_seconds, seconds if is_number(seconds) else NEAREST_SECONDS)
        address = data_url("audio/ogg", audio)
        cell.nearest.audio = address if space.take(address) else ""


def _entry(run: RunFolder, key: str) -> ClipEntry | None:
    return next((clip for clip in (run.index.clips if run.index else ()) if clip.key == key), None)
