"""`sa3dist report`: write the report of a run, or of several side by side."""

import argparse
from pathlib import Path

from sa3dist.data.remote.local_paths import home_path
from sa3dist.errors import ConfigError
from sa3dist.report.document import MEGABYTES
from sa3dist.report.page import PAGE_NAME, write_report
from sa3dist.runtime.exit_status import MANY, command, number

# Default name for several runs.
COMPARISON_NAME = "comparison.html"
ARGUMENTS = {
    "runs": {"nargs": "+", "type": home_path, "metavar": "RUN", "help": "a run's output_dir; several are compared"},
    "--output": {
        "type": home_path,
        "metavar": "FILE",
        "help": f"the page; left out: RUN/{PAGE_NAME}, of several runs {COMPARISON_NAME} in the working directory",
    },
    "--audio": {
        "choices": ("inside", "beside"),
        "default": "inside",
        "help": "previews inside the page, or played from the runs' folders",
    },
    "--megabytes": {
        "type": number(float, 0.001, MANY),
        "default": MEGABYTES,
        "help": "largest page; previews that do not fit are played from the runs' folders (default %(default)g)",
    },
}


def report(options: argparse.Namespace) -> None:
    """Write the report and print its path."""
    page = options.output or (options.runs[0] / PAGE_NAME if len(options.runs) == 1 else Path(COMPARISON_NAME))
    if page.is_dir():
        raise ConfigError(f"--output: {page} is a folder; name a file")
    write_report(options.runs, page, options.megabytes, inside=options.audio == "inside")
    print(f"wrote {page}")


# Exit code 0 when written; 2, with one line, if a folder is not a run's.
main = command(
    "sa3dist report",
    ARGUMENTS,
    report,
    description="Write one self-contained HTML page about a run: curves, previews, settings, warnings.",
)
