"""Write an inspection as one self-contained HTML page with players, spectrograms and charts."""

import dataclasses
from pathlib import Path

import numpy as np

from sa3dist.errors import counted, span
from sa3dist.formats import write_whole
from sa3dist.inspection.clip import InspectedClip
from sa3dist.inspection.png import png
from sa3dist.inspection.report import Report
from sa3dist.report.charts import Chart, histogram
from sa3dist.report.document import MEGABYTES, Space, data_url, render

# Pictures of 4 kB each; more make browsers slow. The table has all clips anyway.
MAX_PICTURES = 2000
# Range below the loudest band of a clip.
PICTURE_RANGE_DB = 70.0
# Most names in the lists of left-out files and of cut captions.
MAX_NAMES = 1000
FIGURES = ("s", "Hz", "channels", "LUFS", "peak dBFS", "silent", "clipped")
LOUDNESS_BINS = 20


@dataclasses.dataclass
class Row:
    """A row of the table. picture, sound: data: URLs, or ""; figures: (text, value to sort by)."""

    clip: InspectedClip
    figures: list[tuple[str, float | str]]
    picture: str = ""
    sound: str = ""


def write_html(report: Report, path: Path, megabytes: float = MEGABYTES) -> None:
    """Write the page to ``path``, atomically. megabytes: size limit; clips that do not fit have no player."""
    write_whole(Path(path), page_of(report, megabytes))


def page_of(report: Report, megabytes: float = MEGABYTES) -> str:
    """The page as text. Names and captions are untrusted and escaped."""
    summary = report.summary()
    rows = [Row(clip, _figures(clip)) for clip in report.clips]
    values = {
        "title": report.source,
        "standing": f"{summary['usable']} of {counted(summary['clips'], 'clip')} usable, "
        f"{span(3600 * summary['hours'])}; training crops to {report.crop_seconds:.1f} s.",
        # Without the first two, which are in the sentence above.
        "overview": report.overview()[2:],
        "stops": report.verdict,
        "passed_over": [
            *(f"left out: {kind.line(most=MAX_NAMES)}" for kind in report.left_out),
            *(cut.line(most=MAX_NAMES) for cut in [report.cut] if cut and cut.tokens),
        ],
        "duplicates": report.duplicates(),
        "charts": _charts(report),
        "heads": FIGURES,
        "rows": rows,
    }
    # Render once to know the page's size without pictures and sounds.
    space = Space(int(1e6 * megabytes) - len(render("data_set.html", {**values, "notes": []}).encode()))
    for row in rows[:MAX_PICTURES]:
        if row.clip.stats:
            picture = data_url("image/png", thumbnail(row.clip.stats.spectrogram_SP))
            row.picture = picture if space.take(picture) else ""
    for row in rows:
        sound = data_url("audio/ogg", row.clip.sound) if row.clip.sound else ""
        row.sound = sound if sound and space.take(sound) else ""
    return render("data_set.html", {**values, "notes": _notes(report, rows)})


def _notes(report: Report, rows: list[Row]) -> list[str]:
    """Notes on what is missing from the table."""
    usable = [row for row in rows if row.clip.stats]
    playing = sum(bool(row.sound) for row in usable)
    long = any(row.clip.seconds > report.excerpt_seconds for row in usable if row.sound)
    notes = []
    if playing and long:
        notes.append(f"Players hold the first {report.excerpt_seconds:.0f} s of a clip.")
    if usable and playing < len(usable) and report.excerpt_seconds:
        notes.append(
            f"{counted(len(usable) - playing, 'clip')} of {len(usable)} without a player: the page is full; "
            f"--megabytes makes it larger."
        )
    pictures = sum(bool(row.picture) for row in usable)
    return notes + ([f"Pictures of {pictures} of {len(usable)} clips only."] if pictures < len(usable) else [])


def _charts(report: Report) -> dict[str, Chart]:
    usable = report.usable
    loudness = [clip.stats.lufs for clip in usable if clip.stats.lufs > -np.inf]
    charts = []
    if usable:
        note = f"Clips longer than {report.crop_seconds:.1f} s are cropped, another part each time."
        charts.append(histogram("lengths", "Length", note, *report.length_histogram(), "seconds"))
    if loudness:
        counts, edges = np.histogram(loudness, LOUDNESS_BINS)
        note = "Of a whole clip, ITU-R BS.1770-4; silent clips have none."
        charts.append(histogram("loudness", "Integrated loudness", note, edges.tolist(), counts.tolist(), "LUFS"))
    return {chart["name"]: chart for chart in charts}


def _figures(clip: InspectedClip) -> list[tuple[str, float | str]]:
    """The clip's cells, each with the value to sort by, or ""."""
    if clip.facts is None or clip.stats is None:
        return [("", "")] * len(FIGURES)
    facts, stats = clip.facts, clip.stats
    values = [clip.seconds, facts.sample_rate_hz, facts.channels, stats.lufs, stats.peak_dbfs]
    values += [stats.silent_share, stats.clipped_samples]
    texts = ["silent" if value == -np.inf else text for text, value in zip(clip.cells(), values, strict=True)]
    return [(text, "" if value == -np.inf else value) for text, value in zip(texts, values, strict=True)]


def thumbnail(spectrogram_SP: np.ndarray) -> bytes:
    """PNG of a spectrogram in dB: low bands at the bottom, loud is dark."""
    level = 1 + (spectrogram_SP - spectrogram_SP.max()) / PICTURE_RANGE_DB
    return png((255 * (1 - level.clip(0, 1))).astype(np.uint8)[::-1])
