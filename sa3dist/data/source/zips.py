"""Untrusted zip archives: refuse members that point outside, are zip bombs, or cannot be read."""

import os
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from sa3dist.data.source.containers import Container, Member, path_fault, read_exactly, short_reason
from sa3dist.data.source.kinds import extension_of, is_audio
from sa3dist.errors import DataError

# Deflate reaches 1032:1 on constant bytes. Real audio stays below 20:1; padding in a small file may exceed that.
MAX_RATIO = 200
RATIO_CHECKED_ABOVE_BYTES = 16 << 20
_COMPRESSIONS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_BAD_NAMES = (
    "names of clips {}; make it again with names in UTF-8, or unpack it with the right code page (unzip -O cp932 for "
    "Japanese, gbk for Chinese, cp866 for Russian, cp1252 for Western Europe) and give the folder"
)
# Exceptions of the standard library on damaged archives, found by mutating some (tests/data/source/test_archive.py).
_ZIP_FAULTS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
)


class ZipContainer(Container):
    def __init__(self, path: Path, label: str):
        super().__init__(label)
        try:
            self._zip = zipfile.ZipFile(path)
        except UnicodeDecodeError as error:
            raise DataError(f"{label}: {_BAD_NAMES.format('are said to be UTF-8 and are not')}") from error
        except _ZIP_FAULTS as error:
            raise DataError(f"{label}: no readable zip ({short_reason(error)}); make or download it again") from error
        try:
            infos = self._zip.infolist()
            if _ends_as_zip(self._zip.fp, min((info.header_offset for info in infos), default=0)):
                raise DataError(
                    f"{label}: holds another zip in front of the one that would be read, as where they were joined "
                    f"with cat; unpack each and give the folder"
                )
            undecodable = self._list(zip(infos, member_names(infos), strict=True))
            if undecodable:
                what = f"are in a code page it does not state, {undecodable[0][:80]} among others"
                raise DataError(f"{label}: {_BAD_NAMES.format(what)}")
            # Members may share compressed bytes: each can look harmless while together they are a zip bomb.
            if self._total > max(RATIO_CHECKED_ABOVE_BYTES, MAX_RATIO * os.path.getsize(path)):
                raise DataError(
                    f"{label}: unpacks to {self._total} bytes, over {MAX_RATIO} times its size; no audio does"
                )
        except BaseException:
            self._zip.close()
            raise

    def _list(self, named: Iterable[tuple[zipfile.ZipInfo, str | None]]) -> list[str]:
        """Admit the members; returns the escaped names of clips and captions whose encoding is unknown."""
        undecodable = []
        for info, name in sorted(named, key=lambda pair: pair[1] or pair[0].filename):
            shown = name if name is not None else info.orig_filename
            fault, unsafe = _zip_fault(info), _unsafe(info)
            if shown.replace("\\", "/").endswith("/") and not path_fault(shown.replace("\\", "/")):
                continue
            if name is None and unsafe is None:
                shown = _escaped(info.orig_filename)
                if is_audio(shown) or extension_of(shown) == "txt":
                    undecodable.append(shown)
                    continue
            self._admit(shown, info.file_size, info, fault, unsafe)
        return undecodable

    def read(self, member: Member) -> bytes:
        try:
            with self._zip.open(member.handle) as stream:
                return read_exactly(stream, member.size)
        except _ZIP_FAULTS as error:
            raise DataError(f"damaged inside the zip ({short_reason(error)}); make or download it again") from error

    def __exit__(self, *_: object) -> None:
        self._zip.close()


# The record at the end of a zip: signature, 8 bytes, size and offset of the directory, length of a comment.
_END_SIGNATURE = b"PK\5\6"
_END = struct.Struct("<12xIIH")
_MAX_COMMENT = 0xFFFF


def _ends_as_zip(file: BinaryIO, end: int) -> bool:
    """Whether the first ``end`` bytes end with a zip of at least one member, unlike a program that unpacks the rest."""
    start = max(0, end - _END.size - _MAX_COMMENT)
    file.seek(start)
    tail = file.read(max(0, end - start))
    place = len(tail) - _END.size + 1
    while (place := tail.rfind(_END_SIGNATURE, 0, place + 3)) >= 0:
        size, _, comment = _END.unpack_from(tail, place)
        if place + _END.size + comment == len(tail) and size > 0:
            file.seek(max(0, start + place - size))
            # A large zip has zip64 records before this one.
            if tail[place - 20 : place - 16] == b"PK\6\7" or file.read(4) == b"PK\1\2":
                return True
    return False


def _escaped(name: str) -> str:
    return "".join(c if " " <= c <= "~" else f"%{c.encode('cp437').hex()}" for c in name)


def _unsafe(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "is a symbolic link, expected a file; put the file itself into the archive"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a device or pipe, expected a file"
    return None


def _zip_fault(info: zipfile.ZipInfo) -> str | None:
    if info.flag_bits & 0x41:
        return "is encrypted; make the zip again without a password"
    if info.compress_type not in _COMPRESSIONS:
        # zipfile has no bounded read for bzip2 and lzma: one block may unpack to gigabytes.
        method = zipfile.compressor_names.get(info.compress_type, info.compress_type)
        return f"is compressed with {method}, expected deflate or stored; make the zip again with zip -r"
    if info.file_size > RATIO_CHECKED_ABOVE_BYTES and info.file_size > MAX_RATIO * info.compress_size:
        return f"unpacks to {info.file_size} bytes, over {MAX_RATIO} times its packed size; no audio does, remove it"
    return None


# General purpose flag: the name is UTF-8.
_UTF8 = 0x800
# Info-ZIP's Unicode Path Extra Field: version, CRC-32 of the name it replaces, the name in UTF-8.
_UNICODE_PATH = 0x7075
# Encodings in which a name may consist of byte pairs that look like accented letters in code page 437.
_DOUBLE_BYTE = ("cp932", "gbk", "big5", "cp949")


def member_names(infos: list[zipfile.ZipInfo]) -> list[str | None]:
    """The names of the members in order; None for a name in an unknown code page.

    A name without the UTF-8 flag is taken from its extra field if it has one; else as UTF-8 if it is ASCII, or if all
    such names of the archive are valid UTF-8; else as code page 437, as specified, if that gives European words.
    Source: APPNOTE.TXT 4.4.4 and 4.6.9, appendix D.
    """
    raw = [None if info.flag_bits & _UTF8 else info.orig_filename.encode("cp437") for info in infos]
    stated = [None if data is None else _unicode_path(info.extra, data) for info, data in zip(infos, raw, strict=True)]
    unstated = [data for data, name in zip(raw, stated, strict=True) if data is not None and name is None]
    try:
        for data in unstated:
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

    return [name_of(*item) for item in zip(infos, raw, stated, strict=True)]


def _unicode_path(extra: bytes, raw: bytes) -> str | None:
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        # The CRC does not match if a tool that does not know this field has renamed the member.
        if kind == _UNICODE_PATH and field[:1] == b"\x01" and field[1:5] == struct.pack("<I", zlib.crc32(raw)):
            try:
                return field[5:].decode("utf-8")
            except UnicodeDecodeError:
                return None
    return None


def _is_european(raw: bytes) -> bool:
    """Whether ``raw``, in code page 437, consists of words in Latin letters, some of them accented."""
    for word in _words(raw.decode("cp437")):
        accented = [c for c in word if not c.isascii()]
        if accented and (len(accented) == len(word) or len(accented) > len(word) // 2 + 1):
            return False
        if not all(unicodedata.name(c, "").startswith("LATIN ") for c in accented):
            return False
        # Lower case before an accented capital: a quotation mark or dash in another code page.
        if any(
            one.islower() and other.isupper() and not other.isascii()
            for one, other in zip(word, word[1:], strict=False)
        ):
            return False
    return not any(_is_east_asian(raw, encoding) for encoding in _DOUBLE_BYTE)


def _words(text: str) -> list[str]:
    """Runs of letters. Every non-ASCII character counts as a letter."""
    return "".join(c if c.isalpha() or not c.isascii() else " " for c in text).split()


def _is_east_asian(raw: bytes, encoding: str) -> bool:
    """Whether a word of ``raw`` has only double-byte characters. With Latin letters it would be a misread accent."""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return any(not any(c.isascii() for c in word) for word in _words(text) if not word.isascii())
