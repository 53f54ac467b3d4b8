"""Recognise results and work directories of runs inside a data set, which are never clips to train on."""

import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import PurePosixPath

from sa3dist.formats import BEST_ADAPTER_NAME, RESULT_NAME, RUN_CONFIG_NAME

# Lists a folder: (files, folders) directly in it, by name.
ListFolder = Callable[[str], tuple[Collection[str], Collection[str]]]

RUN_OUTPUT = "run's folder", "results and work directories of runs are never part of a data set"
# Files of an output_dir whose names no data set uses by chance.
RUN_FILES = {
    "run.yaml",
    "metrics.jsonl",
    "health.jsonl",
    "copies.jsonl",
    "status.json",
    "heartbeat.json",
    RESULT_NAME,
    "lora.safetensors",
    BEST_ADAPTER_NAME,
    "run.lock",
    "trackers.json",
    "report.html",
    "warnings.jsonl",
    "starts.jsonl",
}
_RUN_FOLDERS = ("checkpoints", "checkpoints-aside", "exported", "previews", "previews-aside")
# Folders of an output_dir and of a work directory, each with a pattern that all names inside match.
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


def is_output_dir(folder: str, list_folder: ListFolder) -> bool:
    """Whether ``folder`` is an output_dir: two of RUN_FILES and checkpoints/ are in it, or one and only run outputs."""
    files, folders = (set(names) for names in list_folder(folder))
    subfolders = _run_folders_in(folder, RUN_FOLDERS, list_folder)
    marks = len(RUN_FILES & files) + ("checkpoints" in subfolders)
    return marks > 1 or (marks == 1 and files <= RUN_FILES and folders <= subfolders)


def _run_folders_in(folder: str, kinds: dict[str, re.Pattern], list_folder: ListFolder) -> set[str]:
    """The folders in ``folder`` whose name is in ``kinds`` and whose content matches its pattern."""
    matching = set()
    for name in kinds.keys() & set(list_folder(folder)[1]):
        files, folders = list_folder(f"{folder}/{name}" if folder else name)
        inside = [child for child in (*files, *folders) if not child.startswith(".")]
        if inside and all(kinds[name].fullmatch(child) for child in inside):
            matching.add(name)
    return matching


def run_parts(folder: str, list_folder: ListFolder) -> set[str]:
    """The files and folders that a run wrote in ``folder``, an output_dir or work directory; others may be clips."""
    files = (RUN_FILES | {RUN_CONFIG_NAME, "README.md", "NOTICE", "curves.svg"}) & set(list_folder(folder)[0])
    return (
        files | _run_folders_in(folder, RUN_FOLDERS, list_folder) | _run_folders_in(folder, WORK_FOLDERS, list_folder)
    )


def is_run_folder(folder: str, list_folder: ListFolder) -> bool:
    return is_output_dir(folder, list_folder) or bool(_run_folders_in(folder, WORK_FOLDERS, list_folder))


def run_outputs_on_disk(folder: str, at_top: bool) -> set[str]:
    """The files and folders in a local folder that a run wrote. at_top: the folder is the data set itself."""
    parts = run_parts(folder, list_disk) if at_top and is_run_folder(folder, list_disk) else set()
    return parts | {child for child in list_disk(folder)[1] if is_run_folder(os.path.join(folder, child), list_disk)}


def run_outputs_in_archive(names: Iterable[str]) -> set[str]:
    """Members of an archive that a run wrote: the topmost such folders, and parts of the data set itself.

    An archive that holds a single folder is treated as that folder.
    """
    names = list(names)
    list_folder = list_archive(names)
    folders = {"/".join(parts[:depth]) for parts in (name.split("/") for name in names) for depth in range(len(parts))}
    files, children = list_folder("")
    top = next(iter(children)) if len(children) == 1 and not files else ""
    prefix = f"{top}/" if top else ""
    own = {prefix + part for part in run_parts(top, list_folder)} if is_run_folder(top, list_folder) else set()
    for folder in sorted(folders - {"", top}):
        if not is_below(folder, own) and is_run_folder(folder, list_folder):
            own.add(folder)
    return own


def is_below(name: str, folders: Collection[str]) -> bool:
    """Whether ``name`` is one of ``folders`` or inside one."""
    parts = name.split("/")
    return any("/".join(parts[:depth]) in folders for depth in range(1, len(parts) + 1))


def list_disk(folder: str) -> tuple[list[str], list[str]]:
    """List a folder of the local file system; an unreadable one counts as empty."""
    files, folders = [], []
    try:
        for entry in os.scandir(folder):
            (folders if entry.is_dir() else files).append(entry.name)
    except OSError:
        return [], []
    return files, folders


def list_archive(names: Iterable[str]) -> ListFolder:
    """A function that lists folders of an archive with these members; "" is its root."""
    content: dict[str, tuple[set[str], set[str]]] = {"": (set(), set())}
    for name in names:
        parts = PurePosixPath(name).parts
        for depth, part in enumerate(parts):
            files, folders = content.setdefault("/".join(parts[:depth]), (set(), set()))
            (files if depth == len(parts) - 1 else folders).add(part)
    return lambda folder: content.get(folder, ((), ()))
