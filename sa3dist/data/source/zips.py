"""Untrusted zip archives: refuse members that point outside, unpack without end, or cannot be read."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from sa3dist.data.source.containers import Container, Member, path_fault, read_exactly, short_reason
from sa3dist.data.source.kinds import extension_of, is_audio
from sa3dist.data.source.zip_names import member_names
from sa3dist.errors import DataError

# Deflate reaches 1032:1, on constant bytes only. Real audio stays below 20:1; padding in a small file may go higher.
MAX_RATIO = 200
RATIO_CHECKED_ABOVE_BYTES = 16 << 20
_COMPRESSIONS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_BAD_NAMES = (
    "names of clips {}; make it again with names in UTF-8, or unpack it with the right code page (unzip -O cp932 for "
    "Japanese, gbk for Chinese, cp866 for Russian, cp1252 for Western Europe) and give the folder"
)
# What the standard library raises on damaged archives, found by mutating them (tests/data/source/test_archive.py).
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
            unread = self._list(zip(infos, member_names(infos), strict=True))
            if unread:
                what = f"are in a code page it does not state, {unread[0][:80]} among others"
                raise DataError(f"{label}: {_BAD_NAMES.format(what)}")
            # Members may share their compressed bytes, so each can look harmless while all together are a bomb.
            if self._total > max(RATIO_CHECKED_ABOVE_BYTES, MAX_RATIO * os.path.getsize(path)):
                raise DataError(
                    f"{label}: unpacks to {self._total} bytes, over {MAX_RATIO} times its size; no audio does"
                )
        except BaseException:
            self.close()
            raise

    def _list(self, named: Iterable[tuple[zipfile.ZipInfo, str | None]]) -> list[str]:
        """Admit the members; returns the names of clips and captions that cannot be told, escaped."""
        unread = []
        for info, name in sorted(named, key=lambda pair: pair[1] or pair[0].filename):
            shown = name if name is not None else info.orig_filename
            fault, unsafe = _zip_fault(info), _unsafe(info)
            if shown.replace("\\", "/").endswith("/") and not path_fault(shown.replace("\\", "/")):
                continue
            if name is None and unsafe is None:
                shown = _escaped(info.orig_filename)
                if is_audio(shown) or extension_of(shown) == "txt":
                    unread.append(shown)
                    continue
            self._admit(shown, info.file_size, info, fault, unsafe)
        return unread

    def read(self, member: Member) -> bytes:
        try:
            with self._zip.open(member.handle) as stream:
                return read_exactly(stream, member.size)
        except _ZIP_FAULTS as error:
            raise DataError(f"damaged inside the zip ({short_reason(error)}); make or download it again") from error

    def close(self) -> None:
        self._zip.close()


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
        # bzip2 and lzma have no bounded read in zipfile: one block may unpack to gigabytes.
        method = zipfile.compressor_names.get(info.compress_type, info.compress_type)
        return f"is compressed with {method}, expected deflate or stored; make the zip again with zip -r"
    if info.file_size > RATIO_CHECKED_ABOVE_BYTES and info.file_size > MAX_RATIO * info.compress_size:
        return f"unpacks to {info.file_size} bytes, over {MAX_RATIO} times its packed size; no audio does, remove it"
    return None
