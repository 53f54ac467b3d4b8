"""Zip archives from strangers: refuse what could write outside, unpack without end, or cannot be read."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from sa3dist.data.containers import Container, Member, name_fault, read_exactly, short_reason
from sa3dist.errors import DataError

# Deflate reaches 1032:1, on constant bytes only. Real audio stays below 20:1; padding in a small file may go higher.
MAX_RATIO = 200
RATIO_CHECKED_ABOVE_BYTES = 16 << 20
_COMPRESSIONS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
# What the standard library raises on damaged archives, found by mutating them (tests/test_data_archive.py).
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
        except _ZIP_FAULTS as error:
            raise DataError(f"{label}: no readable zip ({short_reason(error)}); make or download it again") from error
        try:
            for info in sorted(self._zip.infolist(), key=lambda info: info.filename):
                if not info.orig_filename.endswith("/") or name_fault(info.orig_filename):
                    self._admit(info.orig_filename, info.file_size, info, _zip_fault(info))
            # Members may share their compressed bytes, so each can look harmless while all together are a bomb.
            if self._total > max(RATIO_CHECKED_ABOVE_BYTES, MAX_RATIO * os.path.getsize(path)):
                raise DataError(
                    f"{label}: unpacks to {self._total} bytes, over {MAX_RATIO} times its size; no audio does"
                )
        except BaseException:
            self.close()
            raise

    def read(self, member: Member) -> bytes:
        try:
            with self._zip.open(member.handle) as stream:
                return read_exactly(stream, member.size)
        except _ZIP_FAULTS as error:
            raise DataError(f"damaged inside the zip ({short_reason(error)}); make or download it again") from error

    def close(self) -> None:
        self._zip.close()


def _zip_fault(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "is a symbolic link, expected a file; put the file itself into the archive"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a device or pipe, expected a file"
    if info.flag_bits & 0x41:
        return "is encrypted; make the zip again without a password"
    if info.compress_type not in _COMPRESSIONS:
        # bzip2 and lzma have no bounded read in zipfile: one block may unpack to gigabytes.
        method = zipfile.compressor_names.get(info.compress_type, info.compress_type)
        return f"is compressed with {method}, expected deflate or stored; make the zip again with zip -r"
    if info.file_size > RATIO_CHECKED_ABOVE_BYTES and info.file_size > MAX_RATIO * info.compress_size:
        return f"unpacks to {info.file_size} bytes, over {MAX_RATIO} times its packed size; no audio does, remove it"
    return None
