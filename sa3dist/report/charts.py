"""The charts of a report: their data, titles and notes.

A chart is a dict that page.js draws. Its ``series`` are {label, x, y, kind, colour}, where kind is "line", "faint"
(single values behind a trend), "level" (a dashed line), "mark" (a highlighted point) or "bar".
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from sa3dist.report.run_folder import RunFolder, is_number

# Window of the running median: a 20th of the rows, within these limits.
TREND_SHARE, TREND_LEAST, TREND_MOST = 20, 5, 101
NOISE_BINS = ("0 to 0.2", "0.2 to 0.4", "0.4 to 0.6", "0.6 to 0.8", "0.8 to 1")
VALIDATION_TIMES = ("0.1", "0.3", "0.5", "0.7", "0.9")
GIGABYTE = 1e9
# Use a logarithmic axis if the largest value is more than this many times the smallest.
LOG_RATIO = 50

Points = tuple[Sequence[float], Sequence[float]]
Chart = dict[str, Any]


def running_median(values: Sequence[float]) -> list[float]:
    """Running median, with smaller windows at the ends. Unlike a mean it ignores single outliers."""
    half = trend_width(len(values)) // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def trend_width(count: int) -> int:
    """Size of the running median's window for ``count`` values; odd."""
    return min(max(count // TREND_SHARE, TREND_LEAST), TREND_MOST) | 1


def all_charts(runs: Sequence[RunFolder]) -> list[Chart]:
    """All charts that have data. One run is shown in detail; of several runs, each is one line."""
    charts = [
        *(_loss(runs), _validation(runs), _gain_by_noise(runs), _loss_by_noise(runs)),
        _plain(runs, "lr", "Learning rate", "Of every step, after warm-up and schedule.", lambda run: run.curve("lr")),
        _noisy(
            runs, "grad_norm", "Gradient norm", "Before the step. Lasting growth is a warning, single peaks are not."
        ),
        _plain(runs, "clips", "Clips per second", "Over all processes.", _clips_per_second),
        _plain(
            *(runs, "data_wait", "Waiting for data", "Share of the time in which the device had nothing to do."),
            lambda run: _scaled(run.curve("data_wait"), 100),
            unit="%",
        ),
        *(_memory(runs), _drift(runs)),
        *(_health(runs, *about) for about in HEALTH_CHARTS),
    ]
    for chart in charts:
        chart["series"] = [line for line in chart["series"] if line["x"]]
    return [chart for chart in charts if chart["series"]]


def series(label: str, points: Points, kind: str = "line", colour: int = 0) -> dict[str, Any]:
    """One series of a chart. colour: number in the page's palette."""
    return {"label": label, "x": list(points[0]), "y": list(points[1]), "kind": kind, "colour": colour}


def chart(name: str, title: str, note: str, lines: list[dict[str, Any]], **more: Any) -> Chart:
    return {"name": name, "title": title, "note": note, "series": lines, "x": "step", "unit": "", **more}


def histogram(name: str, title: str, note: str, edges: Sequence[float], counts: Sequence[int], unit: str) -> Chart:
    """A histogram of clips. edges: of the bins, one more than ``counts``."""
    middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
    bars = series("clips", (middles, counts), "bar")
    return chart(name, title, note, [bars], x=unit, edges=list(edges))


def _loss(runs: Sequence[RunFolder]) -> Chart:
    note = "Every step trains on other clips, crops and noise levels, so single values jump. The line is the trend."
    return _noisy(runs, "loss", "Training loss", note)


def _noisy(runs: Sequence[RunFolder], key: str, title: str, note: str) -> Chart:
    lines = []
    for number, run in enumerate(runs):
        steps, values = run.curve(key)
        if len(runs) == 1:
            lines.append(series("as logged", (steps, values), "faint"))
        label = f"median of {trend_width(len(values))} rows" if len(runs) == 1 else run.name
        lines.append(series(label, (steps, running_median(values)), colour=number))
    values = [value for run in runs for value in run.curve(key)[1]]
    wide = bool(values) and 0 < min(values) < max(values) / LOG_RATIO
    return chart(key, title, note, lines, log=wide)


def _plain(
    runs: Sequence[RunFolder], name: str, title: str, note: str, points: Callable[[RunFolder], Points], unit: str = ""
) -> Chart:
    lines = [
        series(title.lower() if len(runs) == 1 else run.name, points(run), colour=number)
        for number, run in enumerate(runs)
    ]
    return chart(name, title, note, lines, unit=unit)


def base_loss(run: RunFolder) -> float | None:
    """Validation loss of the base: from the row of step 0, or from any row's loss minus gain."""
    for row in run.rows:
        loss, gain = row.get("val/loss"), row.get("val/gain")
        if is_number(loss) and (row["step"] == 0 or is_number(gain)):
            return loss if row["step"] == 0 else loss - gain
    return None


def _validation(runs: Sequence[RunFolder]) -> Chart:
    lines = []
    for number, run in enumerate(runs):
        steps, values = run.curve("val/loss")
        name = "held-out files" if len(runs) == 1 else run.name
        lines.append(series(name, (steps, values), colour=number))
        base = base_loss(run)
        if base is not None and steps and number == 0:
            lines.append(series("the base", ([steps[0], steps[-1]], [base, base]), "level", 5))
        if run.best_step in steps:
            best = [run.best_step], [values[steps.index(run.best_step)]]
            lines.append(series("best" if len(runs) == 1 else f"best of {run.name}", best, "mark", number))
    note = (
        "On files that are never trained on, with the same noise each time. Below the base's line the adapter helps; "
        "where it turns upwards the run begins to learn its clips by heart."
    )
    return chart("validation", "Validation loss", note, lines)


def _gain_by_noise(runs: Sequence[RunFolder]) -> Chart:
    lines = []
    for number, time in enumerate(VALIDATION_TIMES if len(runs) == 1 else ()):
        steps, values = runs[0].curve(f"val/loss_{time}")
        if 0 in steps:
            base = values[steps.index(0)]
            lines.append(series(f"t = {time}", (steps, [value - base for value in values]), colour=number))
    note = "Validation loss minus the base's, by noise level t. Below 0 the adapter is better than the base."
    return chart("gain_by_noise", "Validation by noise level", note, lines)


def _loss_by_noise(runs: Sequence[RunFolder]) -> Chart:
    lines = []
    for number, label in enumerate(NOISE_BINS if len(runs) == 1 else ()):
        points = [
            (row["step"], row["loss_by_timestep"][number])
            for row in runs[0].rows
            if isinstance(row.get("loss_by_timestep"), list)
            and len(row["loss_by_timestep"]) == len(NOISE_BINS)
            and is_number(row["loss_by_timestep"][number])
        ]
        steps = [step for step, _ in points]
        lines.append(series(f"t {label}", (steps, running_median([value for _, value in points])), colour=number))
    note = "Training loss by noise level t, as running medians: a loss at one level can be compared over time."
    return chart("loss_by_timestep", "Training loss by noise level", note, lines)


def _clips_per_second(run: RunFolder) -> Points:
    rows = [row for row in run.rows if row["step"] > 0]
    points = [
        (row["step"], row["clips_seen"] / row["step"] / row["step_seconds"])
        for row in rows
        if is_number(row.get("step_seconds")) and row["step_seconds"] > 0 and is_number(row.get("clips_seen"))
    ]
    return [step for step, _ in points], [value for _, value in points]


def _scaled(points: Points, factor: float) -> Points:
    return points[0], [factor * value for value in points[1]]


def _memory(runs: Sequence[RunFolder]) -> Chart:
    lines = []
    for number, run in enumerate(runs):
        kinds = (
            {"in use": "peak_bytes", "taken from the device": "reserved_bytes"}
            if len(runs) == 1
            else {run.name: "peak_bytes"}
        )
        for extra, (label, key) in enumerate(kinds.items()):
            lines.append(series(label, _scaled(run.curve(key), 1 / GIGABYTE), colour=number + extra))
    return chart("memory", "Memory", "The most that process 0 has used so far.", lines, unit="GB")


def health_points(run: RunFolder, *keys: str) -> Points:
    """Steps and values of a number in health.jsonl. keys: its path in the row."""
    points = []
    for row in run.health:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if is_number(value):
            points.append((row["step"], value))
    return [step for step, _ in points], [value for _, value in points]


HEALTH_CHARTS = (
    (
        "update_ratio",
        "Size of the update",
        "Mean over layers of |update| / |base weight|: how far the adapter has moved.",
    ),
    ("effective_rank", "Effective rank", "Mean over layers of how many directions the update really uses."),
)


def _health(runs: Sequence[RunFolder], key: str, title: str, note: str) -> Chart:
    return _plain(runs, key, title, note, lambda run: health_points(run, key))


def _drift(runs: Sequence[RunFolder]) -> Chart:
    lines = []
    for number, run in enumerate(runs):
        lines.append(series("mean" if len(runs) == 1 else run.name, health_points(run, "drift", "mean"), colour=number))
        for key, label in (
            (("p5", "5 % of rows are below"), ("p95", "95 % of rows are below")) if len(runs) == 1 else ()
        ):
            lines.append(series(label, health_points(run, "drift", key), "level", number + 1))
    note = "Learned magnitude over the norm of the adapted weight. Healthy runs stay close below 1."
    return chart("drift", "Magnitude drift", note, lines)
