"""Check a submitted request: the endpoint's fields as the trainer checks them, and the data it may read."""

import asyncio
import base64
import contextlib
import dataclasses
import difflib
import hashlib
import json
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from pydantic import ValidationError

from sa3dist.config import each_once, explain
from sa3dist.data.remote.public_addresses import inward_address
from sa3dist.model.released import RELEASED
from sa3dist.request.fields import EndpointFields
from sa3dist.serve.keys import Caller
from sa3dist.serve.service import Service, WireError, refusal
from sa3dist.settings import Settings

DATA_FIELDS = ("audio_data_url", "lora_checkpoint_url")
ADDRESSES = "an http(s) address, a data: URI, or a file uploaded here"
RESOLVE_SECONDS = 5.0
MAX_FIELDS_BYTES = 256 << 10
MOST_VALUES = 100_000
# Most unknown fields that are reported, each with a suggestion.
MOST_UNKNOWN = 20
# Replaces an address that is refused already, while the other fields are checked.
_ACCEPTABLE = "https://example.com/clips.zip"


def lifetime(headers: Mapping[str, str]) -> float | None:
    """How long a client wants a file or a job's results kept, in seconds, from either client's header; None: unset."""
    header, seconds = headers.get("x-fal-object-lifecycle-preference") or headers.get("x-fal-object-lifecycle"), None
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        seconds = json.loads(header or "{}").get("expiration_duration_seconds")
    return seconds if isinstance(seconds, int | float) and 0 < seconds < 1e10 else None


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises WireError for anything else, and for JSON that cannot be stored."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        # A value of two bytes takes sixty in memory.
        raise WireError(422, [refusal(["body"], f"more than {MOST_VALUES} values", "too_long")])
    try:
        value = json.loads(body, object_pairs_hook=each_once)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise WireError(422, [refusal(["body"], f"no valid JSON: {error}"[:200], "json_invalid")]) from error
    if not isinstance(value, dict):
        raise WireError(422, [refusal(["body"], "expected an object with the endpoint's fields", "dict_type")])
    if "\\u0000" in text:
        raise WireError(422, [refusal(["body"], "holds a NUL character")])
    return value


def refused_fields(request: dict[str, Any], models: dict[str, str]) -> list[dict[str, Any]]:
    """Problems of a request's fields, one entry each, with the trainer's own messages."""
    known = {name: value for name, value in request.items() if name in EndpointFields.model_fields}
    unknown = [name for name in request if name not in known]
    problems = [_unknown(name) for name in unknown[:MOST_UNKNOWN]]
    if "model" in known and known["model"] not in (names := [*models, *(n for n in RELEASED if n not in models)]):
        problems.append(refusal(["body", "model"], f"expected one of {', '.join(names)}", "literal_error"))
        known.pop("model")
    try:
        Settings(**known)
    except ValidationError as error:
        problems += [_refused(problem) for problem in error.errors(include_url=True)]
    return problems


def _unknown(name: str) -> dict[str, Any]:
    near = difflib.get_close_matches(name, EndpointFields.model_fields, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the endpoint takes {', '.join(EndpointFields.model_fields)}"
    return refusal(["body", name[:200]], f"unknown field; {hint}", "extra_forbidden")


def _refused(problem: dict[str, Any]) -> dict[str, Any]:
    field, _, message = explain(problem).partition(": ")
    place = [field, *problem["loc"][1:]]
    return refusal(["body", *place], message, problem["type"])


@dataclasses.dataclass(frozen=True)
class Submission:
    """An accepted request.

    request    as stored: data: URIs are replaced by addresses of stored files
    settings   of the trainer; they override fields of ``request``
    digest     of the request as sent
    files      ids of the files stored from data: URIs
    """

    request: dict[str, Any]
    settings: dict[str, Any]
    digest: str
    files: list[str]


async def accept(
    service: Service, caller: Caller, body: bytes, base: str, keep_seconds: float | None = None
) -> Submission:
    """Check a request's body and store the data it contains. Raises WireError with all problems.

    keep_seconds   for how long at least the data it contains is kept; None: until its job is deleted
    """
    request = await asyncio.to_thread(read_body, body)
    digest = await asyncio.to_thread(_digest, request)
    stored, settings, problems = dict(request), {}, []
    inline: dict[str, tuple[str, bytes]] = {}
    for field in DATA_FIELDS:
        value = request.get(field)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            # The trainer would take a number for a file name.
            problems.append(refusal(["body", field], f"expected {ADDRESSES}", "string_type"))
            stored[field] = _ACCEPTABLE
            continue
        try:
            if value[:5].lower() == "data:":
                inline[field] = await asyncio.to_thread(_decoded, value)
                stored[field] = _ACCEPTABLE
            elif (path := await _path_of(service, caller, value, base)) is not None:
                settings[field] = path
        except ValueError as error:
            problems.append(refusal(["body", field], str(error)))
            stored[field] = _ACCEPTABLE
    if len(json.dumps(stored)) > MAX_FIELDS_BYTES:
        # Every server keeps it in memory until the job has ended.
        raise WireError(422, [refusal(["body"], f"more than {MAX_FIELDS_BYTES} bytes beside data: URIs", "too_long")])
    problems = refused_fields(stored, service.options.models) + problems
    if problems:
        raise WireError(422, problems)
    files = []
    for field, (kind, content) in inline.items():
        note = service.files.new(caller.id, f"{field}.{kind.rpartition('/')[2] or 'bin'}", kind, keep_seconds)
        await asyncio.to_thread(service.files.store, note, content)
        files.append(note.id)
        stored[field] = f"{base}/files/{note.id}/{note.name}"
        settings[field] = service.files.address(note.id)
    settings["work_dir"] = str(service.store.work_folder(caller.id, _data_id(service, stored, settings)))
    if not service.options.allow_private_data:
        settings["public_addresses_only"] = True
    return Submission(stored, settings, digest, files)


def _digest(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _data_id(service: Service, request: dict[str, Any], settings: dict[str, Any]) -> str:
    """Identifies the data of a request: the digest of an upload, else the address."""
    address = settings.get("audio_data_url", request["audio_data_url"])
    note = service.files.find(service.files.id_of(address) or "")
    return (note and note.sha256) or address


async def _path_of(service: Service, caller: Caller, address: str, base: str) -> str | None:
    """The path or URL of a file stored by this server; None for an address that the trainer fetches.

    Raises ValueError if the address is invalid, internal, or a file of this server that the caller may not use.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"no valid address ({error})") from error
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise ValueError(f"expected {ADDRESSES}")
    if (path := await asyncio.to_thread(service.trainer_path, caller, parts.path, parts.query)) is not None:
        return path
    if f"{parts.scheme}://{parts.netloc}" in (base, service.options.public_url):
        raise ValueError("no such file here, or not yours")
    if not service.options.allow_private_data:
        await refuse_inward(service, host, port or 443)
    return None


async def refuse_inward(service: Service, host: str, port: int) -> None:
    """Raises ValueError for a host with an internal address. Connections check the address again."""
    try:
        looked_up = asyncio.get_running_loop().run_in_executor(service.resolvers, inward_address, host, port)
        inward = await asyncio.wait_for(looked_up, RESOLVE_SECONDS)
    except (TimeoutError, asyncio.TimeoutError, UnicodeError, socket.gaierror):
        # The name cannot be resolved, at least now. Whatever fetches it later will report that.
        return
    if inward is not None:
        raise ValueError(f"{inward}: points to this machine or its network; give an address of the open internet")


def _decoded(uri: str) -> tuple[str, bytes]:
    """The type and content of a data: URI. Raises ValueError."""
    head, comma, data = uri[5:].partition(",")
    kind, *words = head.split(";")
    try:
        if not comma:
            raise ValueError("no comma")
        raw = unquote_to_bytes(data)
        return kind, base64.b64decode(raw, validate=True) if "base64" in words else raw
    except ValueError as error:
        raise ValueError(f"no valid data: URI ({error})") from error
