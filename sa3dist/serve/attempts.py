"""Folders of a job's attempts: prepare one from the attempt before, and read progress and outcome of its run.

JOB/logs.jsonl                 the trainer's output in all attempts, in the format of the endpoint's logs
JOB/attempt-2/request.json     the trainer's settings
JOB/attempt-2/log.txt          its stdout and stderr
JOB/attempt-2/run/             its output_dir
JOB/attempt-2/lease            the time until which it may work
JOB/cluster/                   in place of attempt-N/, for all attempts, if a cluster runs them
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
from sa3dist.formats import RESULT_NAME, STATUS_NAME, write_json
from sa3dist.runtime.exit_status import HEARTBEAT_NAME
from sa3dist.serve.job import Job
from sa3dist.training.row_files import METRICS_NAME

RUN_NAME, LOG_NAME, REQUEST_NAME = "run", "log.txt", "request.json"
# Folders that a new attempt takes over by hard links: their files do not change once they have their final name.
LINKED = ("checkpoints", "previews")
# Files that a new attempt takes over by copying.
COPIED = (METRICS_NAME, STATUS_NAME)
# How much to read from the end of a file of rows.
TAIL_BYTES = 1 << 16
# Folders of a work directory whose content depends only on the base.
OF_THE_BASE = ("compiled", "digests", "kernels", "singular_bases")
# ``rank: 300 is not valid``; also ``rank is 40, but ...`` and ``include [...] and exclude [...] leave none``
_FIELD = re.compile(r"([a-z_]+)(?:: (.+)|[ =].*)")


def prepare(job: Job, values: dict[str, Any], folder: Path) -> Path:
    """Make an attempt's folder, including the state to continue from; returns the file with the trainer's settings."""
    run = folder / RUN_NAME
    # It exists if an earlier attempt's run continues on a cluster.
    if not run.exists():
        # Use a temporary name until it is complete: a later attempt may look for it.
        temporary = folder / f".{RUN_NAME}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if (before := newest_run(job.folder, folder)) is not None:
            take_over(before, temporary)
        os.replace(temporary, run)
    request = folder / REQUEST_NAME
    write_json(request, values | {"output_dir": str(run)})
    return request


def share_work_of_base(work: Path, shared: Path) -> None:
    """Link the folders that depend only on the base from ``shared`` into ``work``, the work directory of a data set."""
    if work == shared:
        return
    work.mkdir(parents=True, exist_ok=True)
    for name in OF_THE_BASE:
        (shared / name).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (work / name).symlink_to(os.path.relpath(shared / name, work))


def newest_run(job_folder: Path, own: Path) -> Path | None:
    """The earlier attempt's run with the newest checkpoint, the latest of equal ones; None if none has saved."""
    candidates = []
    for run in job_folder.glob(f"attempt-*/{RUN_NAME}"):
        saved = [path.name for path in run.glob("checkpoints/step-" + "[0-9]" * 8)]
        if saved and run.parent != own:
            candidates.append((max(saved), int(run.parent.name.partition("-")[2]), run))
    return max(candidates)[2] if candidates else None


def take_over(before: Path, run: Path) -> None:
    """Copy or link checkpoints, previews and rows of an earlier run, which may still be ending and even saving.

    A checkpoint has its final name only when it is complete. If one is removed meanwhile, a newer one exists.
    """
    for name in LINKED:
        for saved in sorted((before / name).glob("[!.]*"), reverse=True):
            target = run / name / saved.name
            try:
                shutil.copytree(saved, target, copy_function=os.link)
            except (OSError, shutil.Error):
                # It was removed, or the file system has no hard links.
                shutil.rmtree(target, ignore_errors=True)
                with contextlib.suppress(OSError, shutil.Error):
                    shutil.copytree(saved, target)
                    continue
                shutil.rmtree(target, ignore_errors=True)
    for name in COPIED:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(before / name, run / name)


def remove_others(job: Job, own: Path) -> None:
    """Remove the folders of other attempts: the last one has taken over their content."""
    for folder in job.folder.glob("attempt-*"):
        if folder != own:
            shutil.rmtree(folder, ignore_errors=True)


def progress(run: Path) -> dict[str, Any]:
    """The run's ``stage`` and ``step`` (the last finished one), as far as known."""
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
    """The end of a text file; empty if it does not exist."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of another process; empty if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def result(job: Job, run: Path) -> dict[str, Any] | None:
    """The run's result.json, each file with its ``path`` relative to the job's folder; None if there is none."""
    content = read_json(run / RESULT_NAME)
    for file in content.values():
        if isinstance(file, dict) and "url" in file:
            path = Path(unquote(urlsplit(file["url"]).path))
            file["path"] = str(path.relative_to(job.folder.resolve()))
    return content or None


def message(run: Path, log: Path) -> str:
    """Why a run ended: the message of its status, else the last line of its output."""
    text = read_json(run / STATUS_NAME).get("message")
    if isinstance(text, str) and text:
        return text
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    return lines[-1][:1000] if lines else "The trainer ended without a word"


def refusal(job: Job, text: str) -> dict[str, Any]:
    """The endpoint's error for a request that the trainer refused: one entry per line of ``text``, by field."""
    detail = []
    for line in map(str.strip, text.splitlines()):
        match, name = _FIELD.fullmatch(line), _field_of(job, line)
        message = match[2] if match and match[2] and match[1] == name else line
        entry = {"loc": ["body", name] if name else ["body"], "msg": message, "type": "value_error"}
        detail.append(entry | ({"input": job.request[name]} if name in job.request else {}))
    return {"detail": detail}


def _field_of(job: Job, line: str) -> str | None:
    """The request's field that a line of the trainer is about: the line contains its name or value."""
    # Imported here: a runner must start fast, and needs pydantic and fsspec for nothing else.
    from sa3dist.data.remote.fetch import redacted
    from sa3dist.request.fields import EndpointFields

    fields = EndpointFields.model_fields
    match = _FIELD.fullmatch(line)
    if match and match[1] in fields:
        return match[1]
    urls = {name: job.request.get(name) for name in ("lora_checkpoint_url", "audio_data_url")}
    positions = {name: line.find(redacted(url)) for name, url in urls.items() if isinstance(url, str)}
    if contained := [(position, name) for name, position in positions.items() if position >= 0]:
        return min(contained)[1]
    if line.startswith(f"{job.request.get('model', fields['model'].default)}"):
        return "model"
    # Shards and latents are in the work directory, which messages call work/.
    if re.search(r"\bwork(_dir)?/", line):
        return "audio_data_url"
    words = re.findall(r"[a-z]+(?:_[a-z]+)+", line)
    return next((name for word in words for name in fields if name.startswith(word)), None)


def failure(job: Job, exit_code: int, text: str) -> dict[str, Any]:
    """The endpoint's error for an attempt that ended with ``exit_code`` and the message ``text``."""
    if exit_code == EXIT_USER:
        return refusal(job, text)
    lost = exit_code < 0 or exit_code > 128
    return {"detail": text, "error_type": "runner_disconnected" if lost else "runner_server_error"}
