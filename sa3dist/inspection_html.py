"""The inspection as one HTML file: pictures inside it, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from pathlib import Path

import numpy as np

from sa3dist.formats import atomic_path
from sa3dist.inspection import InspectedClip, Report
from sa3dist.wording import counted, span

# 4 kB a picture: beyond this a browser suffers; the figures of all clips are still in the table.
MAX_PICTURES = 2000
# From the loudest band of a clip downwards.
PICTURE_RANGE_DB = 70.0

_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1200px;padding:0 1rem;color:#223}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}td,th{padding:.25rem .6rem;text-align:left;border-bottom:1px solid #dde}
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.skipped{background:#fdecec}tr.cropped{background:#fff7e0}
img{image-rendering:pixelated;width:200px;height:64px}svg{background:#f6f7fb}.bad{color:#b00020}
"""


def write_html(report: Report, path: Path) -> None:
    """Write the report to ``path``, atomically."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The report as an HTML document. Names and captions come from strangers and are escaped."""
    summary = report.summary()
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(report.source)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(report.source)}</h1>",
        f"<p>{summary['usable']} of {counted(summary['clips'], 'clip')} usable, {span(3600 * summary['hours'])}; "
        f"training crops to {report.crop_seconds:.1f} s.</p>",
    ]
    parts += [f"<p class=bad>{html.escape(line)}</p>" for line in report.verdict]
    usable = report.usable
    if usable:
        edges, counts = report.length_histogram()
        labels = [f"{low:.1f} to {high:.1f} s" for low, high in zip(edges, edges[1:], strict=False)]
        loudness = [clip.figures.lufs for clip in usable if clip.figures.lufs > -np.inf]
        parts += ["<h2>Length</h2>", bars(counts, labels), f"<p>0 to {edges[-1]:.1f} s, clips per bin</p>"]
        if loudness:
            counts, edges = np.histogram(loudness, 20)
            labels = [f"{low:.1f} to {high:.1f} LUFS" for low, high in zip(edges, edges[1:], strict=False)]
            parts += ["<h2>Integrated loudness</h2>", bars(counts.tolist(), labels)]
            parts += [f"<p>{edges[0]:.1f} to {edges[-1]:.1f} LUFS (ITU-R BS.1770-4), clips per bin</p>"]
    parts += _duplicates(report)
    parts.append(
        "<h2>Clips</h2><table><tr><th>clip<th>spectrogram<th>s<th>Hz<th>ch<th>LUFS<th>peak dBFS<th>silent<th>clipped"
        "<th>caption<th>training</tr>"
    )
    parts += [_row(clip, number < MAX_PICTURES) for number, clip in enumerate(report.clips)]
    if len(report.clips) > MAX_PICTURES:
        parts.append(f"<p>Pictures of the first {MAX_PICTURES} clips only.</p>")
    return "\n".join([*parts, "</table></html>\n"])


def bars(counts: list[int], labels: list[str]) -> str:
    """Counts as an inline SVG bar chart, each bar with its label as tooltip."""
    width, height, highest = 720, 120, max(max(counts), 1)
    step = width / len(counts)
    rects = [
        f'<rect x="{number * step:.1f}" y="{height - height * count / highest:.1f}" width="{step - 2:.1f}" '
        f'height="{height * count / highest:.1f}" fill="#4a6fd4"><title>{count}: {html.escape(label)}</title></rect>'
        for number, (count, label) in enumerate(zip(counts, labels, strict=True))
    ]
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(rects)}</svg>'


def png(pixels_HW: np.ndarray) -> bytes:
    """A greyscale PNG of uint8 pixels. Source: the PNG specification, 8-bit grey, filter 0 on every row."""
    height, width = pixels_HW.shape
    rows = np.pad(pixels_HW, ((0, 0), (1, 0))).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def thumbnail(spectrogram_SP: np.ndarray) -> bytes:
    """PNG of a spectrogram in dB, low bands at the bottom, loud dark."""
    level = 1 + (spectrogram_SP - spectrogram_SP.max()) / PICTURE_RANGE_DB
    return png((255 * (1 - level.clip(0, 1))).astype(np.uint8)[::-1])


def _row(clip: InspectedClip, with_picture: bool) -> str:
    name, training = html.escape(clip.key), f"{clip.treatment}: {html.escape(clip.reason)}"
    if clip.facts is None or clip.figures is None:
        return f"<tr class=skipped><td>{name}<td colspan=9><td>{training}</tr>"
    picture = ""
    if with_picture:
        data = base64.b64encode(thumbnail(clip.figures.spectrogram_SP)).decode()
        picture = f'<img alt="spectrogram" src="data:image/png;base64,{data}">'
    facts, figures = clip.facts, clip.figures
    numbers = (
        f"{clip.seconds:.2f}",
        f"{facts.sample_rate_hz}",
        f"{facts.channels}",
        f"{figures.lufs:.1f}",
        f"{figures.peak_dbfs:.1f}",
        f"{100 * figures.silent_share:.0f} %",
        f"{figures.clipped_samples}",
    )
    cells = "".join(f"<td class=n>{number}" for number in numbers)
    caption = html.escape(clip.caption)
    return f"<tr class={clip.treatment}><td>{name}<td>{picture}{cells}<td>{caption}<td>{training}</tr>"


def _duplicates(report: Report) -> list[str]:
    if not report.exact and not report.near:
        return []
    items = [f"equal bytes: {html.escape(', '.join(keys))}" for keys in report.exact]
    items += [f"sound alike ({d:.1f} dB apart): {html.escape(a)}, {html.escape(b)}" for a, b, d in report.near]
    return ["<h2>Duplicates</h2><ul>", *(f"<li>{item}</li>" for item in items), "</ul>"]
