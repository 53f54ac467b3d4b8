"""The scripts and manifests of launch/, and names that schedulers accept."""

import re
from pathlib import Path


def launch_file(name: str) -> Path:
    """A file of launch/: inside the installed package, or beside it in the source tree."""
    package = Path(__file__).parents[1]
    installed = package / "launch" / name
    return installed if installed.exists() else package.parent / "launch" / name


def label(name: str) -> str:
    """A run's name as a DNS label, short enough for the suffixes that JobSet appends."""
    kept = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return kept if kept[:1].isalpha() else f"run-{kept}".strip("-")
