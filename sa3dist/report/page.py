"""The report of one run, or of several side by side: charts, previews and facts in one HTML file."""

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from sa3dist.formats import write_whole
from sa3dist.report import charts, facts
from sa3dist.report.document import MEGABYTES, Space, render
from sa3dist.report.grid import make_grid
from sa3dist.report.layers import FIGURES, layer_picture
from sa3dist.report.run_folder import RunFolder, read_run, with_own_names

PAGE_NAME = "report.html"


def write_report(folders: Sequence[Path], page: Path, megabytes: float = MEGABYTES, inside: bool = True) -> None:
    """Write the report of one run, or of several side by side, to ``page``, atomically.

    megabytes   size limit of the page with embedded audio; further previews are played from the runs' folders
    inside      whether to embed previews
    Raises DataError if a folder is not a run's.
    """
    write_whole(page, render_runs([read_run(folder) for folder in folders], Path(page), megabytes, inside))


def render_runs(runs: Sequence[RunFolder], page: Path, megabytes: float = MEGABYTES, inside: bool = True) -> str:
    """The report as text; see ``write_report``."""
    runs = with_own_names(runs)
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
    # Render once without embedded audio, to know the size of the rest.
    size = len(render("page.html", {**values, "grid": make_grid(runs, page, Space(0), inside=False)}).encode())
    grid = make_grid(runs, page, Space(int(megabytes * 1e6) - size), inside)
    return render("page.html", {**values, "grid": grid})


SPEED_CHARTS = ("clips", "data_wait", "memory")
HEALTH_CHARTS = ("update_ratio", "effective_rank", "drift")


def _length_histogram(run: RunFolder) -> charts.Chart | None:
    lengths = [clip.seconds for clip in run.index.clips] if run.index else []
    if not lengths:
        return None
    counts, edges = np.histogram(lengths, facts.LENGTH_BINS, (0.0, max(lengths)))
    return charts.histogram("lengths", "Length of clips", "", edges.tolist(), counts.tolist(), "seconds")
