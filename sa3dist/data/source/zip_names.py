"""Names of zip members in whatever encoding: most archives state UTF-8, older ones state nothing."""

from __future__ import annotations

import struct
import unicodedata
import zipfile
import zlib

# Set where a name is UTF-8, in the general purpose flags.
_UTF8 = 0x800
# Info-ZIP's Unicode Path Extra Field: version, CRC-32 of the name it replaces, the name in UTF-8.
_UNICODE_PATH = 0x7075
# In these a name may consist of pairs of bytes that code page 437 shows as accented letters.
_DOUBLE_BYTE = ("cp932", "gbk", "big5", "cp949")


def member_names(infos: list[zipfile.ZipInfo]) -> list[str | None]:
    """The names of the members in order; None for one in a code page that nobody can tell.

    Names without the UTF-8 flag are ASCII, what an extra field says, UTF-8 after all where every such name of the
    archive is, or code page 437, as the specification says, where they are European words in it.
    Source: APPNOTE.TXT 4.4.4 and 4.6.9, appendix D.
    """
    raw = [None if info.flag_bits & _UTF8 else info.orig_filename.encode("cp437") for info in infos]
    said = [None if data is None else _unicode_path(info.extra, data) for info, data in zip(infos, raw, strict=True)]
    unsaid = [data for data, name in zip(raw, said, strict=True) if data is not None and name is None]
    try:
        for data in unsaid:
            data.decode("utf-8")
        all_utf8 = True
    except UnicodeDecodeError:
        all_utf8 = False

    def name_of(info: zipfile.ZipInfo, data: bytes | None, name: str | None) -> str | None:
        if data is None or name is not None:
            return name or info.orig_filename
        if all_utf8 or data.isascii():
            return data.decode("utf-8")
        return info.orig_filename if _is_european(data) else None

    return [name_of(*item) for item in zip(infos, raw, said, strict=True)]


def _unicode_path(extra: bytes, raw: bytes) -> str | None:
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        # A tool that renames members without knowing the field leaves one of another CRC.
        if kind == _UNICODE_PATH and field[:1] == b"\x01" and field[1:5] == struct.pack("<I", zlib.crc32(raw)):
            try:
                return field[5:].decode("utf-8")
            except UnicodeDecodeError:
                return None
    return None


def _is_european(raw: bytes) -> bool:
    """Whether ``raw``, in code page 437, is words of Latin letters with some accents among them, and nothing else."""
    for word in _words(raw.decode("cp437")):
        accented = [c for c in word if not c.isascii()]
        if accented and (len(accented) == len(word) or len(accented) > len(word) // 2 + 1):
            return False
        if not all(unicodedata.name(c, "").startswith("LATIN ") for c in accented):
            return False
        # A quotation mark or dash of another code page in the middle of a word.
        if any(
            one.islower() and other.isupper() and not other.isascii()
            for one, other in zip(word, word[1:], strict=False)
        ):
            return False
    return not any(_is_east_asian(raw, encoding) for encoding in _DOUBLE_BYTE)


def _words(text: str) -> list[str]:
    """Runs of letters, where everything beyond ASCII counts as one."""
    return "".join(c if c.isalpha() or not c.isascii() else " " for c in text).split()


def _is_east_asian(raw: bytes, encoding: str) -> bool:
    """Whether some word of ``raw`` is made of double bytes alone: with Latin letters in it, it is an accent misread."""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return any(not any(c.isascii() for c in word) for word in _words(text) if not word.isascii())
