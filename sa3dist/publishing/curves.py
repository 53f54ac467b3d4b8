"""Draw a run's losses over its steps as an SVG file."""

from collections.abc import Sequence
from typing import Any

from sa3dist.report.charts import running_median

WIDTH, HEIGHT, LEFT, MARGIN = 720, 300, 60, 30
# More points would not be visible at this width.
MOST_POINTS = 360
# Colour of each curve by its name in metrics.jsonl.
CURVES = {"loss": "#2563eb", "val/loss": "#c2410c"}


def points_of(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Steps and smoothed values of one curve, thinned out to MOST_POINTS, always including the last."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    values = running_median([value for _, value in points])
    every = -(-len(points) // MOST_POINTS) or 1
    indices = sorted({*range(0, len(points), every), len(points) - 1} - {-1})
    return [(points[i][0], values[i]) for i in indices]


def draw(rows: Sequence[dict[str, Any]]) -> str | None:
    """An SVG document from rows of metrics.jsonl; None if no curve has two points."""
    curves = {name: points for name in CURVES if len(points := points_of(rows, name)) > 1}
    if not curves:
        return None
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points]
    first, last, least, most = min(steps), max(steps), min(values), max(values)
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN

    def place(step: int, value: float) -> tuple[float, float]:
        across = (step - first) / ((last - first) or 1)
        up = (value - least) / ((most - least) or 1)
        return LEFT + across * (right - LEFT), bottom - up * (bottom - MARGIN)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{LEFT} {MARGIN}V{bottom}H{right}" fill="none" stroke="#888"/>',
    ]
    for value in (least, most):
        lines.append(f'<text x="{LEFT - 6}" y="{place(first, value)[1] + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        lines.append(f'<text x="{place(step, least)[0]:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{step}</text>')
    lines.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">step</text>')
    for number, (name, points) in enumerate(curves.items()):
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{CURVES[name]}" stroke-width="1.5"/>')
        lines.append(f'<text x="{LEFT + 80 * number}" y="18" fill="{CURVES[name]}">{name}</text>')
    return "\n".join([*lines, "</svg>", ""])
