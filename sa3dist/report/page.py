"""Put a page together: its template, its charts and clips, and the library that draws, in one HTML file."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from sa3dist.formats import write_whole
from sa3dist.report import charts, facts
from sa3dist.report.grid import Space, make_grid
from sa3dist.report.layers import FIGURES, layer_picture
from sa3dist.report.run_folder import RunFolder, read_run

PAGE_NAME = "report.html"
MEGABYTES = 20.0
ASSETS = Path(__file__).parent / "assets"
STYLES = ("uplot/uPlot.min.css", "page.css")
SCRIPTS = ("uplot/uPlot.iife.min.js", "page.js")


def write_report(folders: Sequence[Path], page: Path, megabytes: float = MEGABYTES, inside: bool = True) -> None:
    """Write the page of one run, or of several side by side, to ``page``, whole or not at all.

    megabytes   of the page with its clips; what does not fit is played from the runs' folders
    inside      whether previews stand in the page at all
    Raises DataError where a folder is none of a run.
    """
    write_whole(page, render_runs([read_run(folder) for folder in folders], Path(page), megabytes, inside))


def render_runs(runs: Sequence[RunFolder], page: Path, megabytes: float = MEGABYTES, inside: bool = True) -> str:
    """The page as text; see ``write_report``."""
    drawn = {chart["name"]: chart for chart in charts.all_charts(runs)}
    groups = {
        "learning": [name for name in drawn if name not in {*SPEED_CHARTS, *HEALTH_CHARTS}],
        "speed": [name for name in SPEED_CHARTS if name in drawn],
        "health": [name for name in HEALTH_CHARTS if name in drawn],
    }
    histogram = _length_histogram(runs[0]) if len(runs) == 1 else None
    if histogram:
        drawn["lengths"] = histogram
    values = {
        "runs": runs,
        "facts": facts,
        "charts": drawn,
        "groups": groups,
        "pictures": [layer_picture(run.health[-1].get("layers")) if run.health else None for run in runs],
        "figures": FIGURES,
        "title": " · ".join(run.name for run in runs),
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    # What the rest of the page takes is known only once it is written.
    empty = make_grid(runs, page, Space(0), inside=False)
    taken = len(render("page.html", {**values, "grid": empty}).encode())
    grid = make_grid(runs, page, Space(int(megabytes * 1e6) - taken), inside)
    return render("page.html", {**values, "grid": grid})


SPEED_CHARTS = ("clips", "data_wait", "memory")
HEALTH_CHARTS = ("update_ratio", "effective_rank", "drift")


def render(template: str, values: dict[str, Any]) -> str:
    """A template of ASSETS with ``values``, which are escaped, and with the styles and scripts of all pages.

    The page may load nothing from elsewhere and run no other script: its policy names the digests of these.
    """
    scripts = [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    page = (
        _environment()
        .get_template(template)
        .render(
            styles=[Markup((ASSETS / name).read_text(encoding="utf-8")) for name in STYLES],
            scripts=[Markup(script) for script in scripts],
            policy=" ".join(f"'sha256-{digest}'" for digest in digests),
            **values,
        )
    )
    # Halves of characters, which JSON can hold, would not be written: those of a pair are joined.
    return page.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _length_histogram(run: RunFolder) -> charts.Chart | None:
    lengths = [clip.seconds for clip in run.index.clips] if run.index else []
    if not lengths:
        return None
    counts, edges = np.histogram(lengths, facts.LENGTH_BINS, (0.0, max(lengths)))
    return charts.histogram("lengths", "Length of clips", "", edges.tolist(), counts.tolist(), "seconds")
