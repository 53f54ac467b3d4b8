"""Where a clip's caption is: a .txt or .json of its name, or a line of captions.csv or captions.jsonl."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from sa3dist.data.containers import Container, Member, printable
from sa3dist.errors import DataError

# T5Gemma reads 256 tokens, about 1 kB of text; 64 kB is another kind of document.
MAX_CAPTION_BYTES = 1 << 16
# Tools keep whole feature tables beside the caption.
MAX_JSON_BYTES = 1 << 24
# 100,000 captions of 2 kB.
MAX_MANIFEST_BYTES = 1 << 28
MANIFEST_NAMES = ("captions.csv", "captions.jsonl")
# What tools call the columns; the first that is there counts.
CAPTION_FIELDS = ("caption", "prompt", "text")
FILE_FIELDS = ("file", "file_name", "path", "audio")


def read_caption(container: Container, caption: Member | str) -> str:
    """The stripped text of a .txt or .json member, or of a manifest's line.

    Raises DataError, without the file's name, when it is empty, too long, not UTF-8 or no caption.
    """
    if not isinstance(caption, Member):
        return _checked(caption)
    as_json = is_json(caption.name)
    limit = MAX_JSON_BYTES if as_json else MAX_CAPTION_BYTES
    if caption.size > limit:
        raise DataError(f"caption of {caption.size} bytes, expected at most {limit}; shorten it")
    return caption_text(container.read(caption), as_json)


def caption_text(data: bytes, as_json: bool) -> str:
    """The stripped caption in the bytes of a .txt, or of a .json. Raises DataError when there is none."""
    text = _decoded(data, "caption")
    return _checked(_caption_field(_parsed(text)) if as_json else text)


def _checked(caption: str) -> str:
    caption = caption.strip()
    if not caption:
        raise DataError("caption is empty; describe the clip in it")
    if len(caption.encode()) > MAX_CAPTION_BYTES:
        raise DataError(f"caption of {len(caption)} characters, expected at most {MAX_CAPTION_BYTES} bytes; shorten it")
    return caption


def is_json(name: str) -> bool:
    return name.lower().endswith(".json")


def is_manifest(name: str) -> bool:
    return PurePosixPath(name).name.lower() in MANIFEST_NAMES


def read_manifest(container: Container, member: Member) -> Iterator[tuple[str, str, str]]:
    """(audio file's name in the container, caption, place for messages) of every line; names are relative to it.

    Raises DataError, naming the line, at the first one that cannot be understood.
    """
    label = printable(member.name)
    if member.size > MAX_MANIFEST_BYTES:
        raise DataError(f"{label}: {member.size} bytes, expected at most {MAX_MANIFEST_BYTES}; split the data set")
    try:
        text = _decoded(container.read(member), "manifest")
    except DataError as error:
        raise DataError(f"{label}: {error}") from error
    folder = PurePosixPath(member.name).parent
    rows = _csv_rows(text, label) if member.name.lower().endswith(".csv") else _json_rows(text, label)
    for number, row in rows:
        place = f"{label}, line {number}"
        name = next((row[field] for field in FILE_FIELDS if isinstance(row.get(field), str)), None)
        if not name:
            raise DataError(f"{place}: names no file, expected one under {' or '.join(FILE_FIELDS)}")
        try:
            yield (folder / name.strip()).as_posix(), _caption_field(row), place
        except DataError as error:
            raise DataError(f"{place}: {error}") from error


def _csv_rows(text: str, label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        fields = [(field or "").strip().lower() for field in reader.fieldnames or ()]
        if not set(fields) & set(FILE_FIELDS) or not set(fields) & set(CAPTION_FIELDS):
            found = printable(", ".join(fields))[:120] or "nothing"
            raise DataError(f"{label}: its first line says {found}, expected column names such as file,caption")
        reader.fieldnames = fields
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{label}, line {reader.line_num + 1}: no valid CSV ({error})") from error


def _json_rows(text: str, label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield number, _parsed(line)
        except DataError as error:
            raise DataError(f"{label}, line {number}: {error}") from error


def _decoded(data: bytes, what: str) -> str:
    try:
        # utf-8-sig: Windows editors put a byte order mark in front.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    # Brackets nested by the thousand end in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not valid JSON ({printable(str(error))[:120]})") from error
    if not isinstance(value, dict):
        raise DataError(f"holds a JSON {type(value).__name__}, expected an object with a caption")
    return value


def _caption_field(row: dict[str, Any]) -> str:
    found = next((row[field] for field in CAPTION_FIELDS if row.get(field) is not None), None)
    if not isinstance(found, str):
        raise DataError(f"holds no caption, expected text under {' or '.join(CAPTION_FIELDS)}")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise DataError("caption is not valid Unicode (a lone surrogate); write it again") from error
    return found
