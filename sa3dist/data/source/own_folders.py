"""Recognise results and work directories of runs inside a source: they are never clips to train on."""

import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import PurePosixPath

from sa3dist.formats import BEST_ADAPTER_NAME, RUN_CONFIG_NAME

# (files, folders) directly in a folder, by name.
Listed = Callable[[str], tuple[Collection[str], Collection[str]]]

OWN = "run's folder", "results and work directories of runs are never part of a data set"
# What a run leaves in its output_dir, as far as no data set has it by chance.
RUN_FILES = {
    "run.yaml",
    "metrics.jsonl",
    "health.jsonl",
    "copies.jsonl",
    "status.json",
    "heartbeat.json",
    "result.json",
    "lora.safetensors",
    BEST_ADAPTER_NAME,
    "run.lock",
    "trackers.json",
    "report.html",
    "warnings.jsonl",
    "starts.jsonl",
}
_RUN_FOLDERS = ("checkpoints", "checkpoints-aside", "exported", "previews", "previews-aside")
# Folders in an output_dir, and in a work directory, with the names of everything that lies in them.
RUN_FOLDERS = {name: re.compile(r"step-\d{8}(\..+)?") for name in _RUN_FOLDERS}
RUN_FOLDERS["tensorboard"] = re.compile(r"events\.out\.tfevents\..+")
WORK_FOLDERS = {
    name: re.compile(pattern)
    for name, pattern in {
        "shards": r"[0-9a-f]{16}(-[0-9a-f]{8})?",
        "latent_shards": r"[0-9a-f]{16}",
        "latents": r"[0-9a-f]{2}",
        "prompts": r"[0-9a-f]{2}",
        "remote": r"[0-9a-f]{16}",
        "streaming": r"[0-9a-f]{16}",
        "clip-cache": r"[0-9a-f]{2}",
        "downloads": r"[0-9a-f]{64}-.+|[0-9a-f]{16}-folder(\..+)?",
        "singular_bases": r"[0-9a-f]{64}\.safetensors",
    }.items()
}


def is_run(folder: str, listed: Listed) -> bool:
    """Whether ``folder`` is an output_dir: it holds two of a run's marks, or nothing else than what a run leaves."""
    files, folders = (set(names) for names in listed(folder))
    parts = _parts(folder, RUN_FOLDERS, listed)
    marks = len(RUN_FILES & files) + ("checkpoints" in parts)
    return marks > 1 or (marks == 1 and files <= RUN_FILES and folders <= parts)


def _parts(folder: str, kinds: dict[str, re.Pattern], listed: Listed) -> set[str]:
    """Which of the folders in ``folder`` are of these kinds, by what lies in them."""
    found = set()
    for name in kinds.keys() & set(listed(folder)[1]):
        files, folders = listed(f"{folder}/{name}" if folder else name)
        inside = [child for child in (*files, *folders) if not child.startswith(".")]
        if inside and all(kinds[name].fullmatch(child) for child in inside):
            found.add(name)
    return found


def own_parts(folder: str, listed: Listed) -> set[str]:
    """Which files and folders of ``folder``, an output_dir or work directory, are the run's; others may be clips."""
    files = (RUN_FILES | {RUN_CONFIG_NAME, "README.md", "NOTICE", "curves.svg"}) & set(listed(folder)[0])
    return files | _parts(folder, RUN_FOLDERS, listed) | _parts(folder, WORK_FOLDERS, listed)


def is_own(folder: str, listed: Listed) -> bool:
    return is_run(folder, listed) or bool(_parts(folder, WORK_FOLDERS, listed))


def own_on_disk(folder: str, at_top: bool) -> set[str]:
    """What of a local folder's files and folders is a run's own. at_top: it is the source itself."""
    parts = own_parts(folder, on_disk) if at_top and is_own(folder, on_disk) else set()
    return parts | {child for child in on_disk(folder)[1] if is_own(os.path.join(folder, child), on_disk)}


def own_names(names: Iterable[str]) -> set[str]:
    """What is a run's own among the members of an archive: the topmost such folders, and parts of the data set itself.

    An archive of one folder is that folder.
    """
    names = list(names)
    listed = in_names(names)
    folders = {"/".join(parts[:depth]) for parts in (name.split("/") for name in names) for depth in range(len(parts))}
    files, children = listed("")
    top = next(iter(children)) if len(children) == 1 and not files else ""
    prefix = f"{top}/" if top else ""
    own = {prefix + part for part in own_parts(top, listed)} if is_own(top, listed) else set()
    for folder in sorted(folders - {"", top}):
        if not is_below(folder, own) and is_own(folder, listed):
            own.add(folder)
    return own


def is_below(name: str, folders: Collection[str]) -> bool:
    """Whether ``name`` is one of ``folders`` or lies in one."""
    parts = name.split("/")
    return any("/".join(parts[:depth]) in folders for depth in range(1, len(parts) + 1))


def on_disk(folder: str) -> tuple[list[str], list[str]]:
    """``Listed`` of the local file system; an unreadable folder counts as empty."""
    files, folders = [], []
    try:
        for entry in os.scandir(folder):
            (folders if entry.is_dir() else files).append(entry.name)
    except OSError:
        return [], []
    return files, folders


def in_names(names: Iterable[str]) -> Listed:
    """``Listed`` of an archive with these members; "" is its root."""
    held: dict[str, tuple[set[str], set[str]]] = {"": (set(), set())}
    for name in names:
        parts = PurePosixPath(name).parts
        for depth, part in enumerate(parts):
            files, folders = held.setdefault("/".join(parts[:depth]), (set(), set()))
            (files if depth == len(parts) - 1 else folders).add(part)
    return lambda folder: held.get(folder, ((), ()))
