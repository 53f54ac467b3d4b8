"""Read captions from a .txt or .json next to the clip, or from a table (captions.csv, metadata.jsonl, ...)."""

import codecs
import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from sa3dist.data.source.containers import Container, Member
from sa3dist.data.source.kinds import METADATA_TABLES
from sa3dist.errors import DataError, printable

# T5Gemma reads 256 tokens, about 1 kB of text; 64 kB is not a caption.
MAX_CAPTION_BYTES = 1 << 16
# Some tools store whole feature tables with the caption.
MAX_JSON_BYTES = 1 << 24
# 100,000 captions of 2 kB.
MAX_MANIFEST_BYTES = 1 << 28
# Names of the columns in various tools, in order of precedence.
CAPTION_FIELDS = ("caption", "prompt", "text")
FILE_FIELDS = ("file", "file_name", "path", "audio")
# Spreadsheets in countries with a decimal comma write semicolons; files with tabs are named .csv too.
DELIMITERS = (",", ";", "\t")


class NoCaptions(Exception):
    """A metadata table has no captions: its name is also used for other tables."""


def read_caption(container: Container, caption: Member | str) -> str:
    """The stripped text of a .txt or .json member, or of a table's line.

    Raises DataError, without the file's name, if it is empty, too long, not UTF-8 or not a caption.
    """
    if not isinstance(caption, Member):
        return _checked(caption)
    as_json = is_json(caption.name)
    limit = MAX_JSON_BYTES if as_json else MAX_CAPTION_BYTES
    if caption.size > limit:
        raise DataError(f"caption of {caption.size} bytes, expected at most {limit}; shorten it")
    return caption_text(container.read(caption), as_json)


def caption_text(data: bytes, as_json: bool) -> str:
    """The stripped caption in the bytes of a .txt or .json. Raises DataError if there is none."""
    text = decoded(data, "caption")
    return _checked(_caption_field(_parsed(text)) if as_json else text)


def _checked(caption: str) -> str:
    # Joining two files can leave a second byte order mark.
    caption = caption.strip().strip("\ufeff").strip()
    if is_blank(caption):
        raise DataError("caption is empty; describe the clip in it")
    if "\0" in caption:
        raise DataError("caption holds NUL characters; save it again as plain text")
    if len(caption.encode()) > MAX_CAPTION_BYTES:
        raise DataError(f"caption of {len(caption)} characters, expected at most {MAX_CAPTION_BYTES} bytes; shorten it")
    return caption


def is_json(name: str) -> bool:
    return name.lower().endswith(".json")


def read_manifest(container: Container, member: Member) -> Iterator[tuple[str, str, str]]:
    """(audio file's name in the container, caption, location for messages) of every line of a table.

    Raises DataError, naming the line, at the first invalid one; NoCaptions if a metadata table has no columns for files
    and captions.
    """
    label = printable(member.name)
    if member.size > MAX_MANIFEST_BYTES:
        raise DataError(f"{label}: {member.size} bytes, expected at most {MAX_MANIFEST_BYTES}; split the data set")
    try:
        text = decoded(container.read(member), "manifest")
    except DataError as error:
        raise DataError(f"{label}: {error}") from error
    folder = PurePosixPath(member.name).parent
    any_table = PurePosixPath(member.name).name.lower() in METADATA_TABLES
    rows = (_csv_rows if member.name.lower().endswith(".csv") else _json_rows)(text, label, any_table)
    for number, row in rows:
        where = f"{label}, line {number}"
        name = next((row[field] for field in FILE_FIELDS if isinstance(row.get(field), str)), None)
        if not name:
            raise DataError(f"{where}: names no file, expected one under {' or '.join(FILE_FIELDS)}")
        try:
            yield (folder / name.strip().replace("\\", "/")).as_posix(), _caption_field(row), where
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


def _csv_rows(text: str, label: str, any_table: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its first line, cells by lower-case column name) of every row."""
    lines = io.StringIO(text, newline="").readlines()
    begins, is_header = 1, True
    try:
        delimiter, fields = _header(text, label, any_table)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        for cells in reader:
            if cells and not is_header:
                raw = "".join(lines[begins - 1 : reader.line_num])
                yield begins, _row(fields, cells, raw, delimiter, f"{label}, line {begins}")
            is_header = is_header and not cells
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{label}, line {begins}: no valid CSV ({error})") from error


def _header(text: str, label: str, any_table: bool) -> tuple[str, list[str]]:
    """Delimiter and names of the columns."""
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    for delimiter in DELIMITERS:
        if _are_columns(fields := _fields(first, delimiter)):
            return delimiter, fields
    names = printable(", ".join(_fields(first, ",")))[:120] or "nothing"
    if any_table:
        raise NoCaptions(f"its first line says {names}, no columns of files and captions")
    raise DataError(f"{label}: its first line says {names}, expected column names such as file,caption")


def _fields(line: str, delimiter: str) -> list[str]:
    return [cell.strip().lower() for cell in next(csv.reader([line], delimiter=delimiter), [])]


def _are_columns(fields: list[str]) -> bool:
    return bool(set(fields) & set(FILE_FIELDS)) and bool(set(fields) & set(CAPTION_FIELDS))


def _row(fields: list[str], cells: list[str], raw: str, delimiter: str, where: str) -> dict[str, Any]:
    """The cells by column. If there are too many and the last column is the caption, it is the rest of the line."""
    if len(cells) > len(fields):
        # Some tools write a space between the comma and the quotes.
        spaced = next(csv.reader([raw], delimiter=delimiter, skipinitialspace=True))
        if len(spaced) == len(fields):
            return dict(zip(fields, spaced, strict=True))
        rest = delimiter.join(cells[len(fields) - 1 :])
        # If it contains quotes, it is not clear which commas separate cells.
        if fields[-1] not in CAPTION_FIELDS or not raw.rstrip("\r\n").endswith(delimiter + rest):
            raise DataError(
                f"{where}: {len(cells)} cells, its header has {len(fields)}; put a caption with commas in quotes"
            )
        cells = [*cells[: len(fields) - 1], rest]
    return dict(zip(fields, cells, strict=False))


def _json_rows(text: str, label: str, any_table: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: captions may contain U+2028 and other characters that it counts as line ends.
    rows = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for number, line in rows:
        try:
            row = _parsed(line)
        except DataError as error:
            raise DataError(f"{label}, line {number}: {error}") from error
        if any_table and not _are_columns(list(row)):
            raise NoCaptions(f"its line {number} has no fields of a file and a caption")
        any_table = False
        yield number, row


def _parsed(text: str) -> dict[str, Any]:
    try:
        # Not strict: some tools write raw control characters in strings.
        value = json.loads(text, strict=False)
    # Thousands of nested brackets raise RecursionError.
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not valid JSON ({printable(str(error))[:120]})") from error
    if not isinstance(value, dict):
        raise DataError(f"holds a JSON {type(value).__name__}, expected an object with a caption")
    return value


def _caption_field(row: dict[str, Any]) -> str:
    caption = next((row[field] for field in CAPTION_FIELDS if row.get(field) is not None), None)
    if not isinstance(caption, str):
        raise DataError(f"holds no caption, expected text under {' or '.join(CAPTION_FIELDS)}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise DataError("caption is not valid Unicode (a lone surrogate); write it again") from error
    return caption


# Byte order marks, longer ones first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Unicode categories of control and format characters, separators, and marks that need a letter.
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Zs", "Zl", "Zp", "Mn", "Mc", "Me"))
# Letters and symbols without a visible glyph: Hangul fillers and the empty Braille pattern.
_EMPTY_GLYPHS = "\u115f\u1160\u3164\uffa0\u2800"


def decoded(data: bytes, what: str) -> str:
    """The text in ``data``: UTF-8, or UTF-16 or UTF-32 if recognised. Raises DataError, starting with ``what``."""
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    data = data[len(mark) :]
    if not mark and b"\0" in data:
        encoding = _encoding_without_mark(data)
        if encoding is None:
            raise DataError(f"{what} holds NUL bytes; save it as UTF-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        reason = f"is not {encoding[:6].upper()} (byte {error.start + len(mark)})"
        raise DataError(f"{what} {reason}; save it as UTF-8") from error


def is_blank(text: str) -> bool:
    """Whether ``text`` has no visible character: only white space, marks without a letter, zero-width characters."""
    return all(unicodedata.category(c) in _INVISIBLE or c in _EMPTY_GLYPHS for c in text)


def _encoding_without_mark(data: bytes) -> str | None:
    """The byte order of UTF-16 text that is mostly Latin: only every other byte is 0. None if it is not."""
    units = len(data) // 2
    even, odd = data[::2].count(0), data[1::2].count(0)
    if len(data) % 2 or min(even, odd) or max(even, odd) * 2 < units:
        return None
    return "utf-16-le" if odd else "utf-16-be"
