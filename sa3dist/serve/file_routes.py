"""Routes of files: uploads by both clients, whole or in parts, and downloads."""

import asyncio
import datetime
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from sa3dist.serve.bodies import base_of, blocks, read_bounded
from sa3dist.serve.files import COPY_BYTES, MAX_PARTS, Sink, StoredFile, is_id
from sa3dist.serve.keys import Caller
from sa3dist.serve.service import Service, WireError, refuse_if_full, result_file, service_of
from sa3dist.serve.submission import lifetime, read_body

routes = APIRouter(tags=["files"])
UPLOAD_SECONDS = 24 * 3600
PART_BYTES = 256 << 20


async def _small_body(service: Service, request: Request) -> dict[str, Any]:
    return read_body(await read_bounded(service, request, 1 << 20) or b"{}")


def _note(service: Service, caller: Caller, name: str, request: Request, content_type: str | None = None) -> StoredFile:
    """The note of a new file. content_type: default: the request's."""
    kind = request.headers.get("content-type", "application/octet-stream") if content_type is None else content_type
    return service.files.new(caller.id, name, kind, lifetime(request.headers))


def _address(base: str, note: StoredFile) -> str:
    return f"{base}/files/{note.id}/{note.name}"


def _stored(request: Request, note: StoredFile) -> Response:
    address = _address(base_of(request), note)
    return JSONResponse({"access_url": address, "url": address})


async def _write(service: Service, request: Request, out: Sink, most: int) -> None:
    """Store a body of at most ``most`` bytes. Raises WireError if it is longer or disk space runs out."""
    length = request.headers.get("content-length", "")
    service.check_space(int(length) if length.isascii() and length.isdecimal() and int(length[:15]) <= most else 0)
    async for block in blocks(service, request, most):
        service.check_space()
        await asyncio.to_thread(out.write, block)


async def _receive(service: Service, request: Request, note: StoredFile) -> StoredFile:
    """Store a body as the file of ``note``."""
    refuse_if_full(service.uploads, "uploads")
    async with service.uploads:
        with service.files.writing(note.id) as out:
            await _write(service, request, out, service.options.max_upload_bytes)
        return await asyncio.to_thread(service.files.keep, note, out)


@routes.post("/rest/storage/auth/token")
async def upload_token(request: Request) -> Response:
    """A token with which the Python client uploads."""
    service = service_of(request)
    token, expires = service.signer.token(service.caller(request))
    ends = datetime.datetime.fromtimestamp(expires, datetime.timezone.utc).isoformat()
    return JSONResponse({"token": token, "token_type": "Bearer", "base_url": base_of(request), "expires_at": ends})


@routes.post("/rest/storage/upload/initiate")
@routes.post("/rest/storage/upload/initiate-multipart")
async def initiate(request: Request) -> Response:
    """A signed address to PUT a file, or its parts, without a key."""
    service, base = service_of(request), base_of(request)
    caller, words = service.caller(request), await _small_body(service, request)
    name, kind = str(words.get("file_name", "")), str(words.get("content_type", "application/octet-stream"))
    note = _note(service, caller, name, request, kind)
    await asyncio.to_thread(service.files.begin_parts, note)
    expires = int(time.time()) + UPLOAD_SECONDS
    signed = f"expires={expires}&signature={service.signer.sign('upload', [note.id], expires)}"
    in_parts = request.url.path.endswith("multipart")
    place = f"{_address(base, note)}/multipart/{note.id}" if in_parts else f"{base}/uploads/{note.id}"
    return JSONResponse({"upload_url": f"{place}?{signed}", "file_url": _address(base, note)})


def _allowed_upload(request: Request, upload_id: str, expires: str, signature: str) -> StoredFile:
    """The note of an upload; of its file, if it is complete. Raises WireError unless signed or the caller's own."""
    service = service_of(request)
    note = service.files.find_parts(upload_id) or service.files.find(upload_id)
    if signature:
        allowed = service.signer.fits("upload", [upload_id], expires, signature)
    else:
        caller = service.caller(request, is_upload=True)
        allowed = note is not None and caller.may_see(note.owner)
    if note is None or not allowed:
        raise WireError(404, "no such upload")
    return note


@routes.put("/uploads/{upload_id}")
async def put_signed(request: Request, upload_id: str, expires: str = "", signature: str = "") -> Response:
    """The bytes of a file that ``initiate`` gave an address for."""
    service, note = service_of(request), _allowed_upload(request, upload_id, expires, signature)
    # Do not overwrite a complete file, which may have been read already.
    if note.sha256 is None:
        note = await _receive(service, request, note)
        await asyncio.to_thread(service.files.end_parts, upload_id)
    return JSONResponse({"url": _address(base_of(request), note)}, headers={"ETag": f'"{note.id}"'})


@routes.post("/files/upload")
async def upload(request: Request) -> Response:
    """A whole file; its name in X-Fal-File-Name."""
    service = service_of(request)
    caller = service.caller(request, is_upload=True)
    note = _note(service, caller, request.headers.get("x-fal-file-name", ""), request)
    note = await _receive(service, request, note)
    return _stored(request, note)


@routes.put("/files/{name}")
async def put_file(request: Request, name: str) -> Response:
    """A whole file, by name: curl --upload-file clips.zip."""
    service = service_of(request)
    note = await _receive(service, request, _note(service, service.caller(request), name, request))
    return JSONResponse({"url": _address(base_of(request), note), "file_size": note.size})


@routes.post("/files/upload/multipart")
async def begin(request: Request) -> Response:
    """Begin an upload in parts."""
    service = service_of(request)
    caller = service.caller(request, is_upload=True)
    note = _note(service, caller, request.headers.get("x-fal-file-name", ""), request)
    await asyncio.to_thread(service.files.begin_parts, note)
    return JSONResponse({"access_url": _address(base_of(request), note), "uploadId": note.id})


@routes.put("/files/{file_id}/{name}/multipart/{upload_id}/{number}")
async def put_part(
    request: Request, file_id: str, name: str, upload_id: str, number: int, expires: str = "", signature: str = ""
) -> Response:
    """One part, from 1 on, in any order."""
    service = service_of(request)
    if _allowed_upload(request, upload_id, expires, signature).sha256 is not None:
        raise WireError(409, "the upload is complete")
    if not 1 <= number <= MAX_PARTS:
        raise WireError(422, f"part {number}: expected 1..{MAX_PARTS}")
    left = service.options.max_upload_bytes - await asyncio.to_thread(service.files.parts_size, upload_id, number)
    refuse_if_full(service.uploads, "uploads")
    async with service.uploads:
        with service.files.writing_part(upload_id, number) as out:
            await _write(service, request, out, min(max(left, 0), PART_BYTES))
    etag = f'"{out.sha256}"'
    return JSONResponse({"partNumber": number, "etag": etag}, headers={"ETag": etag})


@routes.post("/files/{file_id}/{name}/multipart/{upload_id}/complete")
async def complete(
    request: Request, file_id: str, name: str, upload_id: str, expires: str = "", signature: str = ""
) -> Response:
    """Join the parts listed in the body."""
    service = service_of(request)
    note = _allowed_upload(request, upload_id, expires, signature)
    words = await _small_body(service, request)
    parts = words.get("parts")
    numbers = [part.get("partNumber") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    valid = all(isinstance(number, int) and 1 <= number <= MAX_PARTS for number in numbers)
    if not numbers or not valid or len(set(numbers)) != len(numbers):
        raise WireError(422, "parts: expected a list of objects with partNumber, each once")
    if note.sha256 is None:
        service.check_space(await asyncio.to_thread(service.files.parts_size, upload_id))
        try:
            note = await asyncio.to_thread(service.files.complete_parts, note, sorted(numbers))
        except FileNotFoundError as missing:
            # An equal request may have joined them meanwhile: clients repeat one that takes long.
            note = await asyncio.to_thread(service.files.find, upload_id)
            if note is None:
                raise WireError(422, "parts: one of them was not sent") from missing
    return _stored(request, note)


@routes.head("/files/{file_id}/{path:path}", include_in_schema=False)
@routes.get("/files/{file_id}/{path:path}")
async def download(request: Request, file_id: str, path: str, expires: str = "", signature: str = "") -> Response:
    """Download a result by its signed address, or any of the caller's own files with a key."""
    service, missing = service_of(request), WireError(404, "no such file, or its address has expired")
    if not is_id(file_id):
        raise missing
    note = await asyncio.to_thread(service.files.find, file_id)
    if note is not None:
        if not service.caller(request).may_see(note.owner):
            raise missing
        headers = {"Content-Length": str(note.size), **_as_attachment(note.name)}
        if request.method == "HEAD":
            return Response(None, 200, headers, "application/octet-stream")
        stream = await asyncio.to_thread(service.files.open, note.id)
        sent = iter(lambda: stream.read(COPY_BYTES), b"")
        done = BackgroundTask(stream.close)
        return StreamingResponse(sent, 200, headers, "application/octet-stream", background=done)
    if not service.signer.fits("result", [file_id, path], expires, signature):
        await service.job(file_id, service.caller(request))
    job = service.snapshot.get(file_id) or await asyncio.to_thread(service.store.get, file_id)
    file = None if job is None else result_file(job, path)
    if file is None or not file.is_file():
        raise missing
    kind = "application/json" if file.suffix == ".json" else "application/octet-stream"
    return FileResponse(file, headers=_as_attachment(file.name), media_type=kind)


def _as_attachment(name: str) -> dict[str, str]:
    # Never display an uploaded file as a page of this server.
    return {"Content-Disposition": f'attachment; filename="{name}"', "X-Content-Type-Options": "nosniff"}
