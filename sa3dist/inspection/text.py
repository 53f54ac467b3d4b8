"""`sa3dist inspect`: print the inspection as tables or JSON, or write it as an HTML file."""

import argparse
import json
import sys
from collections.abc import Iterator

import torch
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from sa3dist import config
from sa3dist.data.remote.local_paths import home_path
from sa3dist.errors import counted, printable
from sa3dist.formats import LeftOut
from sa3dist.inspection.html import write_html
from sa3dist.inspection.report import Report, inspect_source
from sa3dist.model.loading import known_config
from sa3dist.progress import progress
from sa3dist.report.document import MEGABYTES
from sa3dist.runtime.exit_status import MANY, command, number

# Most clips in the terminal; --json and --html have all.
MAX_ROWS = 200
# Minimum width of the column for names in a terminal. Longer names are wrapped.
NAME_COLUMNS = 16
FIGURES = ("s", "Hz", "ch", "LUFS", "peak", "silent", "clipped")


ARGUMENTS = {
    "dataset": {"help": "zip, folder or shards: local path, file://, http(s)://, s3://"},
    "words": {
        "nargs": "*",
        "metavar": "CONFIG.yaml|key=value",
        "help": "settings that matter: duration, model, on_bad_clip",
    },
    "--json": {"action": "store_true", "help": "print everything as JSON instead of tables"},
    "--html": {"type": home_path, "metavar": "FILE", "help": "also write one page with players, pictures and charts"},
    "--megabytes": {
        "type": number(float, 0.001, MANY),
        "default": MEGABYTES,
        "help": "largest page; clips that do not fit have no player (default %(default)g)",
    },
}


def inspect(options: argparse.Namespace) -> None:
    """Inspect a data set and show the results."""
    settings = config.build(config.read_arguments(options.words) | {"audio_data_url": options.dataset})
    base = known_config(settings.model)
    framing = base.native_seconds, base.sample_rate_hz, base.samples_per_frame
    # Clips are measured in parallel, one per core, so torch needs no further threads.
    torch.set_num_threads(1)
    with progress("inspect", 1, shown=True) as update:
        page_bytes = 1e6 * options.megabytes if options.html else 0
        report = inspect_source(settings, framing, lambda done, total: update(done, total=total), page_bytes)
    if options.html:
        write_html(report, options.html, options.megabytes)
        print(f"wrote {options.html}", file=sys.stderr)
    if options.json:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        show(report)


def show(report: Report) -> None:
    """Print the tables to stdout."""
    console = Console()
    console.print(escape(report.source), style="italic", soft_wrap=True)
    overview = Table("", Column(overflow="fold"), show_header=False)
    for name, value in report.overview():
        overview.add_row(name, escape(value))
    console.print(overview)
    clips = Table(
        Column("clip", overflow="fold", min_width=NAME_COLUMNS),
        *(Column(name, justify="right", no_wrap=True) for name in FIGURES),
        Column("training", no_wrap=True),
        title="clips",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    for clip in report.clips[:MAX_ROWS]:
        colour = {"skipped": "red", "cropped": "yellow"}.get(clip.treatment, "")
        clips.add_row(escape(printable(clip.key)), *clip.cells(), clip.treatment, style=colour)
    _print_whole(console, clips, max((cell_len(printable(clip.key)) for clip in report.clips), default=0))
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


def _print_whole(console: Console, table: Table, longest_name: int) -> None:
    """Print a table without cutting anything: a terminal wraps long names; a file or pipe gets one line per clip.

    longest_name   width in columns
    """
    usual = console.width
    whole = console.measure(table, options=console.options.update(max_width=1 << 20)).maximum
    # A terminal that is too narrow even for the figures wraps the lines itself.
    folded = whole - max(longest_name - NAME_COLUMNS, 0)
    console.width = max(usual, folded if console.is_terminal else whole)
    console.print(table)
    console.width = usual


def _skipped(report: Report) -> Iterator[str]:
    """One line per reason, since one reason, such as an unreadable table, may apply to many clips."""
    reasons: dict[str, list[str]] = {}
    for clip in report.clips:
        if clip.problems:
            reasons.setdefault(clip.reason, []).append(clip.key)
    for reason, keys in reasons.items():
        named = len(keys) == 1 and printable(keys[0]) in reason
        yield reason if named else LeftOut("clip", reason, len(keys), tuple(keys)).line()


# Exit code 0 whatever the clips are like; 2 if the source cannot be opened.
main = command(
    "sa3dist inspect",
    ARGUMENTS,
    inspect,
    description="Look at a data set: what is in it, and what training would do with it.",
)
