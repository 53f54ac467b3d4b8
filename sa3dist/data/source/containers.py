"""One interface to zips (zips.py), folders (folders.py) and tars: a checked list of members, and bounded reads.

Faults of single members are collected in ``refused``, to report all at once. A fault of the whole container raises
DataError.
"""

import abc
import contextlib
import dataclasses
import io
import os
import re
import struct
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from sa3dist.data.remote.fetch import MAX_MEMBER_BYTES, MAX_TOTAL_BYTES
from sa3dist.data.source.kinds import extension_of, is_audio, is_hidden_audio, is_manifest, is_system, kind_of
from sa3dist.errors import DataError, printable

# 100,000 captioned clips are 200,000 members; each costs about 1 kB of memory here.
MAX_MEMBERS = 1_000_000
READ_BLOCK_BYTES = 1 << 20

HIDDEN_AUDIO = "hidden audio file", "names that begin with a dot are left out; rename it to use it"
_DRIVE = re.compile(r"^[A-Za-z]:")
TAR_FAULTS = (tarfile.TarError, struct.error, EOFError, OSError, ValueError, LookupError, OverflowError)


@dataclasses.dataclass(frozen=True)
class Member:
    """One regular file of a container: normalised posix name, size in bytes, and the container's handle to read it."""

    name: str
    size: int
    handle: Any


def name_fault(name: str) -> str | None:
    """Why ``name`` could point outside the container or cannot be a key, or None."""
    if "\\" in name:
        return "has a backslash in its name, expected '/' between folders; rename it"
    return path_fault(name) or spelling_fault(name)


def path_fault(name: str) -> str | None:
    """Why a name (with '/' between folders) could point outside the container, or None."""
    if not name:
        return "has no name; make the archive again with another tool"
    if name.startswith("/") or _DRIVE.match(name):
        return (
            "has an absolute path, expected one relative to the archive; make the archive again from inside its folder"
        )
    if ".." in name.split("/"):
        return "points outside the archive with '..'; make the archive again from inside its folder"
    return None


def spelling_fault(name: str) -> str | None:
    """Why ``name`` cannot be a key because of its characters, or None."""
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        return "has a control character in its name; rename it"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "has a name that is not UTF-8; rename it, or make the archive again with names in UTF-8"
    return None


class Container(contextlib.AbstractContextManager):
    """Base class of the three kinds. Used in a with block, which closes its files.

    label         its name in messages
    members       regular files sorted by name, without system files and left-out files; names are unique
    system        number of ignored system files
    left_out      (what, why), as from ``kind_of`` -> names of left-out files
    run_outputs   names of run outputs, which are left out
    refused       fault -> names of members with that fault
    """

    def __init__(self, label: str):
        self.label = label
        self.members: list[Member] = []
        self.system = 0
        self.left_out: dict[tuple[str, str], list[str]] = {}
        self.run_outputs: list[str] = []
        self.refused: dict[str, list[str]] = {}
        self._names: set[str] = set()
        self._total = 0

    @abc.abstractmethod
    def read(self, member: Member) -> bytes:
        """The whole member, never more than its declared size; several threads may read at once.

        Raises DataError, without the member's name, when it is damaged or gone.
        """

    def __exit__(self, *_: object) -> None:
        """Only a zip holds a file open."""

    def _admit(self, name: str, size: int, handle: Any, fault: str | None = None, unsafe: str | None = None) -> None:
        """Add a file to ``members``, or to ``refused``, ``left_out`` or ``system``.

        fault    why it cannot be read; ignored for files that would not be read anyway
        unsafe   why no archive may hold it, whatever its name
        """
        # Archives made on Windows, and files unpacked from them elsewhere, may have backslashes between folders.
        name = name.replace("\\", "/")
        if unsafe := path_fault(name) or unsafe:
            self.refused.setdefault(unsafe, []).append(name)
            return
        clean = PurePosixPath(name).as_posix()
        if is_system(clean):
            if is_hidden_audio(clean):
                self._leave_out(HIDDEN_AUDIO, clean)
            else:
                self.system += 1
            return
        if odd := spelling_fault(name):
            # No clip can have such a name, so no caption or table with it matters.
            fault, matters = odd, is_audio(clean)
        else:
            matters = is_audio(clean) or extension_of(clean) == "txt" or is_manifest(clean)
        if fault is None and size > MAX_MEMBER_BYTES:
            fault = f"is {size} bytes, expected at most {MAX_MEMBER_BYTES}; cut it into shorter clips"
        if fault is None and clean in self._names:
            fault = "is there twice under one name; make the archive again"
        if fault is not None:
            if matters:
                self.refused.setdefault(fault, []).append(clean)
            else:
                self._leave_out(kind_of(clean), clean)
            return
        self._names.add(clean)
        self._total += size
        self.members.append(Member(clean, size, handle))
        if len(self.members) > MAX_MEMBERS:
            raise DataError(f"{self.label}: more than {MAX_MEMBERS} files; split it into several data sets")
        if self._total > MAX_TOTAL_BYTES:
            raise DataError(
                f"{self.label}: unpacks to more than {MAX_TOTAL_BYTES} bytes; split it into several data sets"
            )

    def _leave_out(self, kind: tuple[str, str], name: str) -> None:
        self.left_out.setdefault(kind, []).append(name)


class TarContainer(Container):
    """One or more uncompressed tars, as written by WebDataset. If names collide, all are prefixed with their tar's."""

    def __init__(self, paths: list[Path], label: str):
        super().__init__(label)
        entries = [(path, info) for path in paths for info in self._scan(path)]
        names = [info.name for _, info in entries]
        prefixed = len(paths) > 1 and len(set(names)) < len(names)
        for path, info in sorted(entries, key=lambda entry: (entry[1].name, entry[0].name)):
            name = f"{path.stem}/{info.name}" if prefixed and not path_fault(info.name) else info.name
            self._admit(name, info.size, (path, info.offset_data), unsafe=_tar_fault(info))
        self.members.sort(key=lambda member: member.name)

    def read(self, member: Member) -> bytes:
        path, offset = member.handle
        try:
            with open(path, "rb") as stream:
                stream.seek(offset)
                return read_exactly(stream, member.size, whole_file=False)
        except OSError as error:
            raise DataError(f"cannot be read from {path.name} ({error.strerror or error})") from error

    def _scan(self, path: Path) -> list[tarfile.TarInfo]:
        infos: list[tarfile.TarInfo] = []
        try:
            end = os.path.getsize(path)
            # "r:" is uncompressed only: offsets must point at bytes on disk.
            with tarfile.open(path, "r:") as tar:
                for info in tar:
                    if info.isfile() and info.offset_data + info.size > end:
                        raise EOFError(f"{info.name} ends behind the end of the file")
                    if not info.isdir():
                        infos.append(info)
                    if len(infos) > MAX_MEMBERS:
                        raise DataError(f"{self.label}: more than {MAX_MEMBERS} files; split it into several data sets")
                more = behind_end(tar.fileobj, tar.offset)
        except TAR_FAULTS as error:
            reason = f"{path.name} is no readable plain tar ({short_reason(error)})"
            raise DataError(f"{self.label}: {reason}; make or download it again") from error
        if more is not None:
            raise DataError(f"{self.label}: {path.name} {more}")
        return infos


def behind_end(tar: BinaryIO, end: int) -> str | None:
    """Why the bytes after the last member of a tar, from ``end`` on, cannot be ignored; None if they can.

    tarfile takes a damaged header for the end of the archive, and reads nothing after the end.
    """
    tar.seek(end)
    if any(tar.read(tarfile.BLOCKSIZE)):
        return f"is damaged at byte {end}; make or download it again"
    while block := tar.read(tarfile.BLOCKSIZE):
        if any(block):
            # Some programs fill the last record with whatever is in their memory.
            with contextlib.suppress(tarfile.HeaderError):
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                return (
                    f"goes on behind its end, at byte {tar.tell() - len(block)}, as where tars were joined with cat, "
                    f"and the rest would be lost; give them apart in a folder, or unpack them with tar -xif"
                )
            break
    return None


def _tar_fault(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return "is a link, expected a file; put the file itself into the archive"
    if not info.isreg() or info.issparse():
        return "is a device, pipe or sparse file, expected a plain file"
    return None


def read_exactly(stream: BinaryIO, size: int, whole_file: bool = True) -> bytes:
    """Read ``size`` bytes. Raises DataError if there are fewer, or (``whole_file``) more."""
    # In blocks: zipfile would hold a large member in memory twice.
    buffer = io.BytesIO()
    while buffer.tell() < size:
        block = stream.read(min(READ_BLOCK_BYTES, size - buffer.tell()))
        if not block:
            raise DataError(f"ends after {buffer.tell()} of {size} bytes; make or copy it again")
        buffer.write(block)
    if whole_file and stream.read(1):
        raise DataError(f"is longer than the {size} bytes it declares; make or copy it again")
    return buffer.getvalue()


def short_reason(error: BaseException) -> str:
    return printable(str(error) or type(error).__name__)[:120]
