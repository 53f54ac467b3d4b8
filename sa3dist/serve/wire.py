"""Response bodies in the hosted endpoint's format: submit, status, result and error."""

import json
from typing import Any

from fastapi.responses import JSONResponse, Response

from sa3dist.serve.job import Job
from sa3dist.serve.service import ERROR_STATUS, Service, WireError, message_of
from sa3dist.serve.tables import CANCELLED, QUEUED, RUNNING, SUCCEEDED

REQUEST_ID = "x-fal-request-id"


def addresses(job: Job, base: str) -> dict[str, str]:
    """A job's addresses for its client. base: the server's URL as this client reaches it."""
    response = f"{base}/{job.app}/requests/{job.id}"
    return {
        "request_id": job.id,
        "response_url": response,
        "status_url": f"{response}/status",
        "cancel_url": f"{response}/cancel",
    }


def submitted(job: Job, base: str, position: int) -> dict[str, Any]:
    """The answer to a submit."""
    return {
        "status": "IN_QUEUE",
        **addresses(job, base),
        "gateway_request_id": job.id,
        "queue_position": position,
    }


def status_answer(job: Job, base: str, position: int, logs: list[dict[str, Any]]) -> Response:
    """The answer to a status request. logs: empty if not requested."""
    return JSONResponse(status(job, base, position, logs), 200 if job.is_finished else 202, {REQUEST_ID: job.id})


def status(job: Job, base: str, position: int, logs: list[dict[str, Any]]) -> dict[str, Any]:
    """The body of ``status_answer``, and an event of the status stream."""
    links = addresses(job, base)
    if job.state == QUEUED:
        return {"status": "IN_QUEUE", **links, "queue_position": position}
    if job.state == RUNNING:
        progress = {"stage": job.stage, "step": job.step, "steps": job.steps}
        return {"status": "IN_PROGRESS", **links, "logs": logs, "progress": progress}
    began = job.started or job.finished
    answer = {"status": "COMPLETED", **links, "logs": logs, "metrics": {"inference_time": job.finished - began}}
    if job.state != SUCCEEDED:
        _, body = failure(job)
        answer |= {"error": body["message"], "error_type": body.get("error_type", "model_error")}
    return answer


def failure(job: Job) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for a job that did not succeed."""
    if job.state == CANCELLED:
        text = "Request was cancelled by the client"
        return 499, {"detail": text, "error_type": "client_cancelled", "message": text}
    error = job.error or {"detail": "the run ended for an unknown reason", "error_type": "internal_error"}
    code = ERROR_STATUS.get(error.get("error_type"), 422 if isinstance(error["detail"], list) else 500)
    return code, {**error, "message": message_of(error["detail"])}


def output(service: Service, job: Job, base: str) -> dict[str, Any]:
    """The result of a successful job. Its addresses need no key until they expire."""
    return {name: _with_link(service, job, base, value) for name, value in job.result.items()}


def _with_link(service: Service, job: Job, base: str, value: Any) -> Any:
    if not isinstance(value, dict) or "path" not in value:
        return value
    shown = {key: item for key, item in value.items() if key != "path"}
    return shown | {"url": service.link_of_result(job, base, value["path"])}


def answer_of(service: Service, job: Job, base: str) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for a result request. Raises WireError while the job is unfinished."""
    if not job.is_finished:
        raise WireError(400, "Request is still in progress", "bad_request", {REQUEST_ID: job.id})
    return (200, output(service, job, base)) if job.state == SUCCEEDED else failure(job)


def webhook_body(service: Service, job: Job) -> bytes:
    """The body of a job's webhook."""
    code, payload = answer_of(service, job, service.options.public_url)
    body = {"request_id": job.id, "gateway_request_id": job.id, "status": "OK", "payload": payload}
    if code != 200:
        body |= {"status": "ERROR", "error": f"Invalid status code: {code}"}
    return json.dumps(body).encode()
