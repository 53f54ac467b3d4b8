"""Decode text files: UTF-8, or UTF-16 and UTF-32 where they can be recognised; and tell blank text."""

from __future__ import annotations

import codecs
import unicodedata

from sa3dist.errors import DataError

# The longer marks first: that of UTF-16 begins that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Letters and symbols that show nothing: Hangul fillers and the empty Braille pattern.
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Zs", "Zl", "Zp", "Mn", "Mc", "Me"))
_EMPTY_GLYPHS = "\u115f\u1160\u3164\uffa0\u2800"


def decoded(data: bytes, what: str) -> str:
    """The text in ``data``. Raises DataError, beginning with ``what``, when it is in another encoding."""
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
    """Whether ``text`` holds nothing that can be seen: white space, marks without a letter, zero-width characters."""
    # Control and format characters, separators, marks that need a letter.
    return all(unicodedata.category(c) in _INVISIBLE or c in _EMPTY_GLYPHS for c in text)


def _encoding_without_mark(data: bytes) -> str | None:
    """UTF-16 of either order, where most characters are Latin: every other byte is then 0, and none of the others."""
    units = len(data) // 2
    even, odd = data[::2].count(0), data[1::2].count(0)
    if len(data) % 2 or min(even, odd) or max(even, odd) * 2 < units:
        return None
    return "utf-16-le" if odd else "utf-16-be"
