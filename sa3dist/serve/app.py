"""The web application of the endpoint: routes, errors in the endpoint's format, and background tasks."""

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from sa3dist import __version__
from sa3dist.serve import file_routes, monitoring, page_routes, queue_routes, webhooks
from sa3dist.serve.addresses import HostedAddresses
from sa3dist.serve.fast_status import FastStatus
from sa3dist.serve.files import FileStore
from sa3dist.serve.job_store import JobStore
from sa3dist.serve.keys import Keys, Signer
from sa3dist.serve.monitoring import RequestLog
from sa3dist.serve.server_options import WebOptions
from sa3dist.serve.service import Service, UnknownRequest, WireError, message_of, refusal
from sa3dist.serve.snapshot import Snapshot
from sa3dist.serve.tables import DatabaseAway

log = logging.getLogger(__name__)
# Python's default is 6 on two cores, which six webhooks with slow name lookups would block.
THREADS = 64
REMOVE_EXPIRED_SECONDS, RESTART_SECONDS = 3600.0, 60.0


def create_app(options: WebOptions, store: JobStore) -> FastAPI:
    """The application for a job store. It runs no jobs; a scheduler does, in this process or elsewhere."""
    files = FileStore(options.storage or str(options.data_dir / "files"))
    service = Service(options, store, Keys(options.data_dir), Signer(options.data_dir), files, Snapshot(store))

    @contextlib.asynccontextmanager
    async def background_tasks(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "server"))
        await service.snapshot.refresh()
        works = [service.snapshot.keep_fresh, webhooks.Webhooks(service).deliver_all, lambda: _remove_expired(service)]
        tasks = [asyncio.create_task(_forever(work)) for work in works]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    app = FastAPI(title="sa3dist", version=__version__, lifespan=background_tasks, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(monitoring.routes)
    app.include_router(webhooks.routes)
    # Before the queue's routes, which match any first word.
    app.include_router(page_routes.page)
    app.include_router(page_routes.api)
    app.include_router(file_routes.routes)
    app.include_router(queue_routes.run_routes)
    app.include_router(queue_routes.routes)
    app.add_exception_handler(WireError, _wire_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(DatabaseAway, _database_away)
    app.add_exception_handler(OSError, _not_stored)
    app.add_middleware(FastStatus, service=service)
    app.add_middleware(HostedAddresses)
    app.add_middleware(
        CORSMiddleware,
        # Without keys, pages of other sites must not reach a server on their visitor's machine.
        allow_origins=[] if options.is_open else ["*"],
        allow_origin_regex=r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?" if options.is_open else None,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-fal-request-id", "x-fal-error-type", "x-request-id"],
    )
    app.add_middleware(RequestLog)
    return app


async def _forever(work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work`` for ever; restart it after an unexpected exception."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("unexpected; trying again in %g s", RESTART_SECONDS)
            await asyncio.sleep(RESTART_SECONDS)


async def _remove_expired(service: Service) -> None:
    while True:
        await asyncio.to_thread(service.remove_expired_files)
        await asyncio.sleep(REMOVE_EXPIRED_SECONDS)


def _error(
    status: int, detail: Any, error_type: str | None, headers: dict[str, str], status_word: str = ""
) -> Response:
    body = {"detail": detail, "message": message_of(detail)} | ({"status": status_word} if status_word else {})
    if error_type is not None:
        body["error_type"] = error_type
        headers = {"X-Fal-Error-Type": error_type, **headers}
    return JSONResponse(body, status, headers)


async def _wire_error(request: Request, error: WireError) -> Response:
    # As in the hosted endpoint's answers about requests.
    status_word = "NOT_FOUND" if isinstance(error, UnknownRequest) else ""
    return _error(error.status, error.detail, error.error_type, error.headers, status_word)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, str(error.detail), None, dict(error.headers or {}))


async def _validation_error(request: Request, error: RequestValidationError) -> Response:
    detail = [refusal(list(problem["loc"]), problem["msg"], problem["type"]) for problem in error.errors()]
    return _error(422, detail, None, {})


async def _database_away(request: Request, error: DatabaseAway) -> Response:
    return _error(503, f"{error}; try again", "runner_connection_refused", {"Retry-After": "2"})


async def _not_stored(request: Request, error: OSError) -> Response:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise error
    return _error(507, f"the server cannot store files now: {error.strerror}", None, {})
