"""Folders of a job's attempts: what a new attempt takes over from an older one, and what a run says of itself in them.

JOB/logs.jsonl                 what the trainer has said, of all attempts, in the form of the endpoint's logs
JOB/attempt-2/request.json     the trainer's settings          JOB/attempt-2/log.txt   its stdout and stderr
JOB/attempt-2/run/             its output_dir                  JOB/attempt-2/lease     until when it may work
    JOB/cluster/                   the same of all attempts, where a cluster runs them
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sa3dist.errors import EXIT_USER
from sa3dist.formats import STATUS_NAME, write_json
from sa3dist.runtime.exit_status import HEARTBEAT_NAME
from sa3dist.serve.job import Job
from sa3dist.training.row_files import METRICS_NAME

RUN_NAME, LOG_NAME, REQUEST_NAME = "run", "log.txt", "request.json"
RESULT_NAME = "result.json"
# Whole once they have their name: a second name is as good as a copy.
LINKED = ("checkpoints", "previews")
# What a start looks at of an earlier one, beside those.
COPIED = (METRICS_NAME, STATUS_NAME)
# What is read of the end of a file of rows.
TAIL_BYTES = 1 << 16
# Of a folder of work: what depends on the base alone.
OF_THE_BASE = ("compiled", "digests", "kernels", "singular_bases")
# ``rank: 300 is not valid``; also ``rank is 40, but ...`` and ``include [...] and exclude [...] leave none``
_FIELD = re.compile(r"([a-z_]+)(?:: (.+)|[ =].*)")


def prepare(job: Job, values: dict[str, Any], folder: Path) -> Path:
    """Make an attempt's folder, with what the run continues from; the file with the trainer's settings."""
    run = folder / RUN_NAME
    # There is one where an earlier attempt's goes on, on a cluster.
    if not run.exists():
        # Under another name until it is whole: the attempt after this one may look for it.
        begun = folder / f".{RUN_NAME}"
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)
        if (before := newest_run(job.folder, folder)) is not None:
            take_over(before, begun)
        os.replace(begun, run)
    request = folder / REQUEST_NAME
    write_json(request, values | {"output_dir": str(run)})
    return request


def share_work_of_base(work: Path, shared: Path) -> None:
    """Let ``work``, a folder of one data set, find in ``shared`` what depends on the base alone."""
    if work == shared:
        return
    work.mkdir(parents=True, exist_ok=True)
    for name in OF_THE_BASE:
        (shared / name).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (work / name).symlink_to(os.path.relpath(shared / name, work))


def newest_run(job_folder: Path, own: Path) -> Path | None:
    """The run of an earlier attempt that got furthest: of equal ones the latest; None where none has saved."""
    found = []
    for run in job_folder.glob(f"attempt-*/{RUN_NAME}"):
        saved = [path.name for path in run.glob("checkpoints/step-" + "[0-9]" * 8)]
        if saved and run.parent != own:
            found.append((max(saved), int(run.parent.name.partition("-")[2]), run))
    return max(found)[2] if found else None


def take_over(before: Path, run: Path) -> None:
    """Give ``run`` the checkpoints and rows of an earlier run, which may still be dying, and even save once more.

    A checkpoint has its name when it is whole. One that is removed meanwhile is older than another that stays.
    """
    for name in LINKED:
        for saved in sorted((before / name).glob("[!.]*"), reverse=True):
            target = run / name / saved.name
            try:
                shutil.copytree(saved, target, copy_function=os.link)
            except (OSError, shutil.Error):
                # It was removed, or the disk has no links.
                shutil.rmtree(target, ignore_errors=True)
                with contextlib.suppress(OSError, shutil.Error):
                    shutil.copytree(saved, target)
                    continue
                shutil.rmtree(target, ignore_errors=True)
    for name in COPIED:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(before / name, run / name)


def remove_others(job: Job, own: Path) -> None:
    """Remove the folders of earlier attempts: the last one holds all that theirs did."""
    for folder in job.folder.glob("attempt-*"):
        if folder != own:
            shutil.rmtree(folder, ignore_errors=True)


def progress(run: Path) -> dict[str, Any]:
    """The run's ``stage`` and ``step``, as far as it says; the step is the last that is done."""
    found: dict[str, Any] = {}
    beat = read_json(run / HEARTBEAT_NAME)
    if isinstance(beat.get("stage"), str):
        found["stage"] = beat["stage"]
    done = max(int(beat.get("step", 0)) - 1, 0)
    for line in reversed(tail(run / METRICS_NAME).splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            done = max(done, int(json.loads(line)["step"]))
            break
    return found | {"step": done}


def tail(path: Path) -> str:
    """The end of a text file; nothing where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that others write; empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def result(job: Job, run: Path) -> dict[str, Any] | None:
    """The run's result.json, each file with its ``path`` below the job's folder; None where there is none."""
    found = read_json(run / RESULT_NAME)
    for file in found.values():
        if isinstance(file, dict) and "url" in file:
            path = Path(unquote(urlsplit(file["url"]).path))
            file["path"] = str(path.relative_to(job.folder.resolve()))
    return found or None


def message(run: Path, log: Path) -> str:
    """Why a run ended, in its own words: its status, else the last line it wrote."""
    said = read_json(run / STATUS_NAME).get("message")
    if isinstance(said, str) and said:
        return said
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    return lines[-1][:1000] if lines else "The trainer ended without a word"


def refusal(job: Job, text: str) -> dict[str, Any]:
    """The endpoint's answer to a request that the trainer refused: one entry per line of ``text``, by field."""
    detail = []
    for line in map(str.strip, text.splitlines()):
        found, name = _FIELD.fullmatch(line), _field_of(job, line)
        said = found[2] if found and found[2] and found[1] == name else line
        entry = {"loc": ["body", name] if name else ["body"], "msg": said, "type": "value_error"}
        detail.append(entry | ({"input": job.request[name]} if name in job.request else {}))
    return {"detail": detail}


def _field_of(job: Job, line: str) -> str | None:
    """The request's field that a line of the trainer is about: it begins with its name, or names what that says."""
    # Here: a shepherd, whose lease runs from before it starts, needs pydantic and fsspec for nothing else.
    from sa3dist.data.remote.fetch import redacted
    from sa3dist.request.fields import EndpointFields

    fields = EndpointFields.model_fields
    found = _FIELD.fullmatch(line)
    if found and found[1] in fields:
        return found[1]
    asked = {name: job.request.get(name) for name in ("lora_checkpoint_url", "audio_data_url")}
    places = {name: line.find(redacted(value)) for name, value in asked.items() if isinstance(value, str)}
    if named := [(place, name) for name, place in places.items() if place >= 0]:
        return min(named)[1]
    if line.startswith(f"{job.request.get('model', fields['model'].default)}"):
        return "model"
    # Shards and latents, by the name that stands for their folder.
    if re.search(r"\bwork(_dir)?/", line):
        return "audio_data_url"
    words = re.findall(r"[a-z]+(?:_[a-z]+)+", line)
    return next((name for word in words for name in fields if name.startswith(word)), None)


def failure(job: Job, exit_code: int, text: str) -> dict[str, Any]:
    """The endpoint's answer for an attempt that ended with ``exit_code`` and these words."""
    if exit_code == EXIT_USER:
        return refusal(job, text)
    lost = exit_code < 0 or exit_code > 128
    return {"detail": text, "error_type": "runner_disconnected" if lost else "runner_server_error"}
