"""The inspection as one HTML file with its pictures inside: it loads nothing from elsewhere."""

import base64
import html
import struct
import zlib
from pathlib import Path

import numpy as np

from sa3dist.errors import counted, span
from sa3dist.formats import write_whole
from sa3dist.inspection.clip import InspectedClip
from sa3dist.inspection.report import Report

# 4 kB a picture: more make browsers slow; all clips are still in the table.
MAX_PICTURES = 2000
# From the loudest band of a clip downwards.
PICTURE_RANGE_DB = 70.0

# Longer captions are folded: a row would be higher than a screen.
FOLDED_CHARACTERS = 120
# Names of one kind of file that is left out, and clips whose captions are cut.
MAX_NAMES = 1000

_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1200px;padding:0 1rem;color:#223}
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin-top:2rem}p,li{overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
td,th{padding:.25rem .6rem;text-align:left;border-bottom:1px solid #dde}
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.skipped{background:#fdecec}tr.cropped{background:#fff7e0}
td.t{min-width:12rem;max-width:24rem;overflow-wrap:anywhere}summary{cursor:pointer}
img{image-rendering:pixelated;width:200px;height:64px}.bad{color:#b00020}
svg{display:block;width:100%;max-width:720px;height:auto;background:#f6f7fb}svg text{font:12px system-ui,sans-serif}
"""


def write_html(report: Report, path: Path) -> None:
    """Write the report to ``path``, atomically."""
    write_whole(Path(path), render(report))


def render(report: Report) -> str:
    """The report as an HTML document. Names and captions are untrusted and escaped."""
    summary = report.summary()
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        # Telephones show a page as wide as a desk's otherwise.
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(report.source)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(report.source)}</h1>",
        f"<p>{summary['usable']} of {counted(summary['clips'], 'clip')} usable, {span(3600 * summary['hours'])}; "
        f"training crops to {report.crop_seconds:.1f} s.</p>",
        *(f"<p class=bad>{html.escape(line)}</p>" for line in report.verdict),
        *(f"<p class=bad>left out: {html.escape(kind.line(most=MAX_NAMES))}</p>" for kind in report.left_out),
        *(f"<p class=bad>{html.escape(cut.line(most=MAX_NAMES))}</p>" for cut in [report.cut] if cut and cut.tokens),
    ]
    usable = report.usable
    if usable:
        edges, counts = report.length_histogram()
        loudness = [clip.stats.lufs for clip in usable if clip.stats.lufs > -np.inf]
        parts += ["<h2>Length</h2>", bars(counts, edges, "s")]
        if loudness:
            counts, edges = np.histogram(loudness, 20)
            parts += ["<h2>Integrated loudness</h2>", bars(counts.tolist(), edges.tolist(), "LUFS (ITU-R BS.1770-4)")]
    if duplicates := report.duplicates():
        parts += ["<h2>Duplicates</h2><ul>", *(f"<li>{html.escape(line)}</li>" for line in duplicates), "</ul>"]
    parts += [
        "<h2>Clips</h2><div class=wide><table>"
        "<tr><th>clip<th>spectrogram<th>s<th>Hz<th>ch<th>LUFS<th>peak dBFS<th>silent<th>clipped"
        "<th>caption<th>training</tr>",
        *(_row(clip, number < MAX_PICTURES) for number, clip in enumerate(report.clips)),
        "</table></div>",
    ]
    if len(report.clips) > MAX_PICTURES:
        parts.append(f"<p>Pictures of the first {MAX_PICTURES} clips only.</p>")
    return "\n".join([*parts, "</html>\n"])


def bars(counts: list[int], edges: list[float], unit: str) -> str:
    """A histogram as inline SVG: what a bar counts stands above it and in its tooltip, and both axes are labelled.

    edges   of the bins, one more than counts
    """
    left, top, width, height, highest = 44, 18, 430, 120, max(max(counts), 1)
    step, bottom = width / len(counts), top + height
    parts = [
        f'<text x="4" y="{top - 6}">clips</text>',
        f'<text x="{left - 6}" y="{top + 18}" text-anchor="end">{highest}</text>',
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end">0</text>',
        f'<path d="M{left} {top}V{bottom}H{left + width}" fill="none" stroke="#889"/>',
    ]
    for number, count in enumerate(counts):
        x, tall = left + number * step, (height - 14) * count / highest
        label = f"{count}: {edges[number]:.3g} to {edges[number + 1]:.3g} {html.escape(unit)}"
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{bottom - tall:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" fill="#4a6fd4">'
            f"<title>{label}</title></rect>"
        )
        # Four digits are as wide as a bar.
        if 0 < count < 10_000:
            parts.append(
                f'<text x="{x + step / 2:.1f}" y="{bottom - tall - 3:.1f}" text-anchor="middle" style="font-size:9px">'
                f"{count}</text>"
            )
    for tick in range(5):
        edge = edges[round(tick * len(counts) / 4)]
        anchor = ("start", "middle", "middle", "middle", "end")[tick]
        parts.append(
            f'<text x="{left + tick * width / 4:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{edge:.3g}</text>'
        )
    parts.append(f'<text x="{left + width / 2}" y="{bottom + 31}" text-anchor="middle">{html.escape(unit)}</text>')
    return f'<svg viewBox="0 0 {left + width + 6} {bottom + 38}" role="img">{"".join(parts)}</svg>'


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
    if clip.facts is None or clip.stats is None:
        return f"<tr class=skipped><td class=t>{name}<td colspan=9><td class=t>{training}</tr>"
    picture = ""
    if with_picture:
        data = base64.b64encode(thumbnail(clip.stats.spectrogram_SP)).decode()
        picture = f'<img alt="spectrogram" src="data:image/png;base64,{data}">'
    cells = "".join(f"<td class=n>{number}" for number in clip.cells())
    caption = _folded(clip.caption)
    return f"<tr class={clip.treatment}><td class=t>{name}<td>{picture}{cells}<td class=t>{caption}<td>{training}</tr>"


def _folded(text: str) -> str:
    if len(text) <= FOLDED_CHARACTERS:
        return html.escape(text)
    start = html.escape(text[:FOLDED_CHARACTERS])
    return f"<details><summary>{start} ...</summary>{html.escape(text)}</details>"
