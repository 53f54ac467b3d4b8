"""The web page at `/`, and the routes under `/api` that it reads. It submits and cancels through the queue's routes."""

import asyncio
import time
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from pydantic import BaseModel, Field

import sa3dist.report
from sa3dist import __version__
from sa3dist.model.released import RELEASED
from sa3dist.request.fields import EndpointFields
from sa3dist.serve import wire
from sa3dist.serve.attempts import RUN_NAME
from sa3dist.serve.bodies import base_of
from sa3dist.serve.job import Job
from sa3dist.serve.job_views import JobDetails, Jobs, Progress, problems, progress, report_file, summary
from sa3dist.serve.logs import public, public_names
from sa3dist.serve.options import shared_work_dir
from sa3dist.serve.service import Service, WireError, service_of
from sa3dist.serve.tables import SUCCEEDED

page = APIRouter(include_in_schema=False)
api = APIRouter(prefix="/api", tags=["page"])

PAGE = FilePath(__file__).parent / "page"
UPLOT = FilePath(sa3dist.report.__file__).parent / "assets" / "uplot"
FILES = {
    "page.js": (PAGE / "page.js", "text/javascript"),
    "page.css": (PAGE / "page.css", "text/css"),
    "uplot.js": (UPLOT / "uPlot.iife.min.js", "text/javascript"),
    "uplot.css": (UPLOT / "uPlot.min.css", "text/css"),
}
NOTHING_ELSE = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE_POLICY = f"{NOTHING_ELSE}; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"
# A run's report has inline scripts and styles. The sandbox keeps it from the page's keys.
REPORT_POLICY = (
    f"sandbox allow-scripts allow-downloads; {NOTHING_ELSE}; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data:; media-src 'self' data:"
)
HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
PAGE_HEADERS = {**HEADERS, "Content-Security-Policy": PAGE_POLICY}
REPORT_HEADERS = {**HEADERS, "Content-Security-Policy": REPORT_POLICY}
REPORT_SECONDS = 3600
# Databases refuse larger numbers.
Offset = Annotated[int, Query(ge=0, le=1 << 53)]


class About(BaseModel):
    """What the page needs first."""

    version: str
    needs_key: bool
    caller: str | None = Field(description="whose key it is; null without a valid one")
    is_admin: bool
    app: str
    models: list[str]
    fields: dict[str, Any] = Field(description="JSON schema of the fields of a request")


@page.get("/")
async def index() -> Response:
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS, media_type="text/html")


@page.get("/page/{name}")
async def asset(name: str) -> Response:
    if name not in FILES:
        raise WireError(404, "no such file")
    path, kind = FILES[name]
    return FileResponse(path, headers=PAGE_HEADERS, media_type=kind)


@api.get("/about")
async def about(request: Request) -> About:
    """Whether a key is needed, whose the given key is, and the fields of a request. Needs no key."""
    service = service_of(request)
    try:
        caller = service.caller(request)
    except WireError as refused:
        if refused.status != 401:
            raise
        caller = None
    return About(
        version=__version__,
        needs_key=not service.options.is_open,
        caller=caller and (service.keys.read().get(caller.id, {}).get("name") or caller.id),
        is_admin=caller is not None and caller.is_admin,
        app=service.options.apps[0],
        models=list({**service.options.models, **RELEASED}),
        fields=EndpointFields.model_json_schema()["properties"],
    )


@api.get("/jobs")
async def list_jobs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    before: Annotated[int | None, Query(ge=0, le=1 << 53)] = None,
) -> Jobs:
    """The caller's jobs; all jobs for an admin."""
    service = service_of(request)
    caller = service.caller(request)
    return await asyncio.to_thread(_listed, service, None if caller.is_admin else caller.id, limit, before)


def _listed(service: Service, key: str | None, limit: int, before: int | None) -> Jobs:
    jobs = service.store.list(key, limit + 1, before)
    more = jobs[limit - 1].number if len(jobs) > limit else None
    return Jobs(jobs=[summary(service, job) for job in jobs[:limit]], before=more)


@api.get("/jobs/{job_id}")
async def get_job(request: Request, job_id: str) -> JobDetails:
    """One job with its request and outcome."""
    service = service_of(request)
    job = await service.job(job_id, service.caller(request))
    return await asyncio.to_thread(_details, service, job, base_of(request))


def _details(service: Service, job: Job, base: str) -> JobDetails:
    report_url = None
    if report_file(job) is not None:
        expires = int(time.time()) + REPORT_SECONDS
        signature = service.signer.sign("report", [job.id], expires)
        report_url = f"{base}/api/jobs/{job.id}/report/{expires}-{signature}/report.html"
    return JobDetails(
        **summary(service, job),
        request=job.request,
        problems=problems(job),
        result=wire.output(service, job, base) if job.state == SUCCEEDED else None,
        report_url=report_url,
    )


@api.get("/jobs/{job_id}/progress")
async def get_progress(
    request: Request, job_id: str, logs_at: Offset = 0, attempt: Offset = 0, rows_at: Offset = 0
) -> Progress:
    """Log lines and losses since the last call; start with zeros."""
    service = service_of(request)
    job = await service.job(job_id, service.caller(request))
    return await asyncio.to_thread(progress, job, logs_at, attempt, rows_at)


@api.get("/jobs/{job_id}/report/{signed}/report.html")
async def get_report(request: Request, job_id: str, signed: str) -> HTMLResponse:
    """The run's report, at the signed address from the job's details."""
    service, job = await _signed_job(request, job_id, signed)
    report = report_file(job)
    if report is None:
        raise _missing()
    text = await asyncio.to_thread(report.read_text, encoding="utf-8", errors="replace")
    names = public_names(job, shared_work_dir(service.options.data_dir), service.options.models)
    return HTMLResponse(await asyncio.to_thread(public, text, names), headers=REPORT_HEADERS)


@api.get("/jobs/{job_id}/report/{signed}/previews/step-{step}/{number}.{kind}")
async def get_preview(
    request: Request,
    job_id: str,
    signed: str,
    step: Annotated[int, Path(ge=0, le=10**7)],
    number: Annotated[int, Path(ge=0, le=10**6)],
    kind: Literal["flac", "png"],
) -> FileResponse:
    """A preview that the run's report links to: its audio or its spectrogram."""
    _, job = await _signed_job(request, job_id, signed)
    # The path is made from numbers only, not from text sent by a client.
    path = job.attempt_folder / RUN_NAME / "previews" / f"step-{step:08d}" / f"{number}.{kind}"
    if not path.is_file():
        raise _missing()
    if kind == "png":
        return FileResponse(path, headers=REPORT_HEADERS, media_type="image/png")
    # As an attachment: browsers ignore the link's "download" attribute, because the sandboxed report has no origin.
    return FileResponse(path, headers=REPORT_HEADERS, media_type="audio/flac", filename=path.name)


async def _signed_job(request: Request, job_id: str, signed: str) -> tuple[Service, Job]:
    service = service_of(request)
    expires, _, signature = signed.partition("-")
    if not service.signer.fits("report", [job_id], expires, signature):
        raise _missing()
    job = service.snapshot.get(job_id) or await asyncio.to_thread(service.store.get, job_id)
    if job is None:
        raise _missing()
    return service, job


def _missing() -> WireError:
    return WireError(404, "no such report, or its address has expired: open it from the page again")
