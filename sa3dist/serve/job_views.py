"""What people are shown of a job: its summary and details, and what its run has written since they last looked."""

import statistics
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, Field

from sa3dist.serve.attempts import RUN_NAME, tail
from sa3dist.serve.job import Job
from sa3dist.serve.logs import LogReader
from sa3dist.serve.service import Service
from sa3dist.serve.tables import QUEUED, RUNNING
from sa3dist.serve.wire import failure
from sa3dist.training.row_files import METRICS_NAME, objects

# One answer reads so much of a run's rows; the next one goes on behind it.
MOST_BYTES = 1 << 20
# How many of the newest rows say how long a step takes.
RATE_ROWS = 20
REPORT_NAME = "report.html"


class JobSummary(BaseModel):
    """A job as a list shows it. Times are seconds since 1970."""

    id: str
    app: str
    name: str = Field(description="what its data is called")
    model: str
    key: str = Field(description="whose job it is: the name or id of the key")
    state: Literal["QUEUED", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED"]
    stopping: bool = Field(description="runs, and was asked to end")
    stage: str | None = Field(description="what the trainer is at: encode, train, ...")
    step: int
    steps: int
    queue_position: int | None = Field(description="how many jobs go first; null where it does not wait")
    eta_seconds: float | None = Field(description="until the last step; null where that cannot be said")
    attempts: int
    created: float
    started: float | None
    finished: float | None
    updated: float
    error: str | None


class JobDetails(JobSummary):
    """A job with what was asked for and what came of it."""

    request: dict[str, Any] = Field(description="as it was sent, with stored files in the place of data: URIs")
    problems: list[dict[str, Any]] = Field(description="what was refused, by field: loc and msg")
    result: dict[str, Any] | None = Field(description="as the endpoint gives it: files with addresses that expire")
    report_url: str | None = Field(description="the run's page, at an address that expires; null before the first save")


class Jobs(BaseModel):
    """The newest jobs first."""

    jobs: list[JobSummary]
    before: int | None = Field(description="ask with this for the jobs before these; null where there are none")


class LogLine(BaseModel):
    message: str
    timestamp: str


class Progress(BaseModel):
    """What has come since the places that were asked for; ask for the next with those told here."""

    logs: list[LogLine]
    logs_at: int
    attempt: int
    begins: bool = Field(description="these rows are the run's first: forget earlier ones")
    rows_at: int
    rows: list[tuple[int, float | None, float | None]] = Field(description="step, training loss, validation loss")


def summary(service: Service, job: Job) -> dict[str, Any]:
    """The fields of JobSummary."""
    owner = service.keys.read().get(job.key, {}).get("name") or job.key
    named = {name: getattr(job, name) for name in JobSummary.model_fields if hasattr(job, name)}
    return named | {
        "name": data_name(job),
        "model": str(job.request.get("model") or "medium-base")[:100],
        "key": owner,
        "stopping": job.state == RUNNING and job.cancel,
        "queue_position": service.snapshot.position(job) if job.state == QUEUED else None,
        "eta_seconds": eta_seconds(job),
        "error": failure(job)[1]["message"] if job.state in ("FAILED", "CANCELLED") else None,
    }


def data_name(job: Job) -> str:
    """The last part of the data's address, or its host."""
    parts = urlsplit(str(job.request.get("audio_data_url", "")))
    return (unquote(parts.path.rstrip("/").rpartition("/")[2]) or parts.hostname or "clips")[:100]


def eta_seconds(job: Job) -> float | None:
    """Until the last step, by the median pace of the newest rows."""
    if job.state != RUNNING or job.stage != "train":
        return None
    newest = objects(tail(job.attempt_folder / RUN_NAME / METRICS_NAME).splitlines()[-RATE_ROWS:])
    paces = [row["step_seconds"] for row in newest if _number(row.get("step_seconds")) is not None]
    return statistics.median(paces) * max(job.steps - job.step, 0) if paces else None


def problems(job: Job) -> list[dict[str, Any]]:
    """The fields that were refused."""
    detail = (job.error or {}).get("detail")
    return [{"loc": item["loc"], "msg": item["msg"]} for item in detail] if isinstance(detail, list) else []


def report_file(job: Job) -> Path | None:
    """The page of the job's run, once there is one."""
    page = job.attempt_folder / RUN_NAME / REPORT_NAME
    return page if page.is_file() else None


def progress(job: Job, logs_at: int, attempt: int, rows_at: int) -> Progress:
    """The log lines and rows behind these places of an attempt's; another attempt's rows come from the first."""
    reader = LogReader(logs_at)
    lines = reader.read(job)
    path = job.attempt_folder / RUN_NAME / METRICS_NAME
    size = path.stat().st_size if path.is_file() else 0
    # A run that continues from a checkpoint may have taken back what it wrote behind that.
    begins = attempt != job.fence or not 0 < rows_at <= size
    rows, end = read_rows(path, 0 if begins else rows_at)
    return Progress(
        logs=[LogLine(message=line["message"], timestamp=line["timestamp"]) for line in lines],
        logs_at=reader.at,
        attempt=job.fence,
        begins=begins,
        rows_at=end,
        rows=[
            (row["step"], _number(row.get("loss")), _number(row.get("val/loss")))
            for row in rows
            if type(row.get("step")) is int
        ],
    )


def read_rows(path: Path, at: int) -> tuple[list[dict[str, Any]], int]:
    """The whole rows of a file from byte ``at`` on, ``MOST_BYTES`` of them at most, and where they end."""
    try:
        with path.open("rb") as file:
            file.seek(at)
            data = file.read(MOST_BYTES)
    except FileNotFoundError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    return list(objects(whole.decode(errors="replace").splitlines())), at + len(whole)


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < float("inf") else None
