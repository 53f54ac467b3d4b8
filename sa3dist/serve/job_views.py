"""Views of a job for the web page: summary, details, and new log lines and metrics."""

import statistics
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, Field

from sa3dist.serve.attempts import RUN_NAME, tail
from sa3dist.serve.job import Job
from sa3dist.serve.logs import read_logs, read_rows
from sa3dist.serve.service import Service
from sa3dist.serve.tables import QUEUED, RUNNING
from sa3dist.serve.wire import failure
from sa3dist.training.row_files import METRICS_NAME, objects

# Most bytes of a run's rows in one answer; the next answer continues there.
MOST_BYTES = 1 << 20
# Number of newest rows used to estimate the time of a step.
RATE_ROWS = 20
REPORT_NAME = "report.html"


class JobSummary(BaseModel):
    """A job as a list shows it. Times are seconds since 1970."""

    id: str
    app: str
    name: str = Field(description="name of its data")
    model: str
    key: str = Field(description="name or id of the key that submitted it")
    state: Literal["QUEUED", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED"]
    stopping: bool = Field(description="running, and cancellation was requested")
    stage: str | None = Field(description="stage of the trainer: encode, train, ...")
    step: int
    steps: int
    queue_position: int | None = Field(description="number of jobs before it; null if it is not waiting")
    eta_seconds: float | None = Field(description="time until the last step; null if unknown")
    attempts: int
    created: float
    started: float | None
    finished: float | None
    updated: float
    error: str | None


class JobDetails(JobSummary):
    """A job with its request and outcome."""

    request: dict[str, Any] = Field(description="as sent, with addresses of stored files instead of data: URIs")
    problems: list[dict[str, Any]] = Field(description="refused fields: loc and msg")
    result: dict[str, Any] | None = Field(description="as in the endpoint's result: files with addresses that expire")
    report_url: str | None = Field(description="address of the run's report, which expires; null before the first save")


class Jobs(BaseModel):
    """A page of the list of jobs, newest first."""

    jobs: list[JobSummary]
    before: int | None = Field(description="pass it to get older jobs; null if there are none")


class LogLine(BaseModel):
    message: str
    timestamp: str


class Progress(BaseModel):
    """New log lines and rows since the given offsets; pass the offsets here to get the next ones."""

    logs: list[LogLine]
    logs_at: int
    attempt: int
    begins: bool = Field(description="the rows start at the run's first: discard earlier ones")
    rows_at: int
    rows: list[tuple[int, float | None, float | None]] = Field(description="step, training loss, validation loss")


def summary(service: Service, job: Job) -> dict[str, Any]:
    """The fields of JobSummary."""
    owner = service.keys.read().get(job.key, {}).get("name") or job.key
    values = {name: getattr(job, name) for name in JobSummary.model_fields if hasattr(job, name)}
    return values | {
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
    """Time until the last step, from the median step time of the newest rows."""
    if job.state != RUNNING or job.stage != "train":
        return None
    newest = objects(tail(job.attempt_folder / RUN_NAME / METRICS_NAME).splitlines()[-RATE_ROWS:])
    step_seconds = [row["step_seconds"] for row in newest if _number(row.get("step_seconds")) is not None]
    return statistics.median(step_seconds) * max(job.steps - job.step, 0) if step_seconds else None


def problems(job: Job) -> list[dict[str, Any]]:
    """The refused fields of a job's error."""
    detail = (job.error or {}).get("detail")
    return [{"loc": item["loc"], "msg": item["msg"]} for item in detail] if isinstance(detail, list) else []


def report_file(job: Job) -> Path | None:
    """The report of the job's run, if it exists yet."""
    page = job.attempt_folder / RUN_NAME / REPORT_NAME
    return page if page.is_file() else None


def progress(job: Job, logs_at: int, attempt: int, rows_at: int) -> Progress:
    """Log lines and rows from these offsets on. If ``attempt`` is not the current one, rows start at the first."""
    lines, logs_at = read_logs(job, logs_at)
    path = job.attempt_folder / RUN_NAME / METRICS_NAME
    size = path.stat().st_size if path.is_file() else 0
    # The file may be shorter than rows_at: a run that resumes removes the rows after its checkpoint.
    begins = attempt != job.fence or not 0 < rows_at <= size
    rows, end = read_rows(path, 0 if begins else rows_at, MOST_BYTES)
    return Progress(
        logs=[LogLine(message=line["message"], timestamp=line["timestamp"]) for line in lines],
        logs_at=logs_at,
        attempt=job.fence,
        begins=begins,
        rows_at=end,
        rows=[
            (row["step"], _number(row.get("loss")), _number(row.get("val/loss")))
            for row in rows
            if type(row.get("step")) is int
        ],
    )


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < float("inf") else None
