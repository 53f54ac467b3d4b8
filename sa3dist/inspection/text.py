"""`sa3dist inspect` on the command line: the report as tables in the terminal, as JSON or as an HTML file."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sa3dist import config
from sa3dist.data.remote.local_paths import home_path
from sa3dist.errors import counted, printable, span
from sa3dist.formats import LeftOut
from sa3dist.inspection.html import write_html
from sa3dist.inspection.report import Report, framing_of, inspect_source
from sa3dist.progress import progress
from sa3dist.runtime.exit_status import run_command

# A terminal is for a look; --json and --html hold every clip.
MAX_ROWS = 200


ARGUMENTS = {
    "dataset": {"help": "zip, folder or shards: local path, file://, http(s)://, s3://"},
    "words": {
        "nargs": "*",
        "metavar": "CONFIG.yaml|key=value",
        "help": "settings that matter: duration, model, on_bad_clip",
    },
    "--json": {"action": "store_true", "help": "print everything as JSON instead of tables"},
    "--html": {"type": home_path, "metavar": "FILE", "help": "also write a report with pictures"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 whatever the clips are like; 2 when the source cannot be opened."""
    about = "Look at a data set: what is in it, and what training would do with it."
    return run_command("sa3dist inspect", ARGUMENTS, inspect, argv, description=about)


def inspect(options: argparse.Namespace) -> None:
    """Inspect the data set of ``options`` and show what was found."""
    settings = config.build(config.read_arguments(options.words) | {"audio_data_url": options.dataset})
    framing = framing_of(settings.model)
    # As many clips as there are cores are measured at a time: one clip needs no threads of its own.
    torch.set_num_threads(1)
    with progress("inspect", 1, shown=True) as update:
        report = inspect_source(settings, framing, lambda done, total: update(done, total=total))
    if options.html:
        write_html(report, options.html)
        print(f"wrote {options.html}", file=sys.stderr)
    if options.json:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        show(report)


def show(report: Report) -> None:
    """Print the tables to stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    overview = Table(title=escape(report.source), show_header=False)
    for name, value in overview_rows(report.summary()):
        overview.add_row(name, escape(value))
    console.print(overview)
    clips = Table("clip", "s", "Hz", "ch", "LUFS", "peak", "silent", "clipped", "training", title="clips")
    for clip in report.clips[:MAX_ROWS]:
        colour = {"skipped": "red", "cropped": "yellow"}.get(clip.treatment, "")
        clips.add_row(escape(clip.key), *clip.cells(), clip.treatment, style=colour)
    console.print(clips)
    if len(report.clips) > MAX_ROWS:
        console.print(f"and {counted(len(report.clips) - MAX_ROWS, 'more clip')}; --json or --html shows all")
    notes = [
        *(("red", f"skipped: {line}") for line in _skipped(report)),
        *((None, line) for line in report.duplicates()),
        *(("yellow", f"left out: {kind.line(most=MAX_ROWS)}") for kind in report.left_out),
        *(("yellow", f"captions: {cut.line(most=MAX_ROWS)}") for cut in [report.cut] if cut and cut.tokens),
        *(("red", f"training would stop: {line}") for line in report.verdict),
    ]
    for style, line in notes:
        console.print(escape(line), style=style, soft_wrap=True)


def _skipped(report: Report) -> Iterator[str]:
    """One line for every reason: a table that cannot be read is the reason of many."""
    reasons: dict[str, list[str]] = {}
    for clip in report.clips:
        if clip.problems:
            reasons.setdefault(clip.reason, []).append(clip.key)
    for reason, keys in reasons.items():
        named = len(keys) == 1 and printable(keys[0]) in reason
        yield reason if named else LeftOut("clip", reason, len(keys), tuple(keys)).line()


def overview_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as (name, text) lines."""
    rows = [("clips", f"{summary['clips']}, {summary['usable']} usable"), ("audio", span(3600 * summary["hours"]))]
    if summary["left_out"]:
        rows.append(("left out", f"{summary['left_out']} files that are no clips, see below"))
    if not summary["usable"]:
        return rows

    def spread(name: str, unit: str) -> str:
        values = summary[name]
        return f"{values['min']:g} to {values['max']:g} {unit}, median {values['median']:g}" if values else "none"

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
