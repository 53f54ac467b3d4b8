"""The summary of an inspection as lines of name and text."""

from typing import Any

from sa3dist.errors import counted, span


def overview_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as (name, text) lines."""
    rows = [("clips", f"{summary['clips']}, {summary['usable']} usable"), ("audio", span(3600 * summary["hours"]))]
    if summary["left_out"]:
        rows.append(("left out", f"{summary['left_out']} files that are no clips, see below"))
    if not summary["usable"]:
        return rows

    def spread(name: str, unit: str) -> str:
        values = summary[name]
        return f"{values['min']:.4g} to {values['max']:.4g} {unit}, median {values['median']:.4g}" if values else "none"

    def counts(name: str) -> str:
        return ", ".join(f"{value} x {key}" for key, value in summary[name].items())

    captions = summary["captions"]
    words = captions["words"]
    return rows + [
        ("length", spread("seconds", "s")),
        ("formats", counts("formats")),
        ("sample rates", counts("sample_rates_hz") + " Hz"),
        ("channels", counts("channels")),
        ("loudness", spread("lufs", "LUFS")),
        ("peak", spread("peak_dbfs", "dBFS")),
        ("clipping", counted(summary["clipped_clips"], "clip")),
        ("mostly silent", counted(summary["mostly_silent_clips"], "clip")),
        ("captions", f"{captions['distinct']} distinct, {words['min']:g} to {words['max']:g} words"),
        ("training", counts("treatment") + f"; crops of {summary['crop_seconds']:.1f} s"),
    ]
