"""A local folder as a container: all files below it, links followed."""

import errno
import os
import stat
from pathlib import Path

from sa3dist.data.source.containers import Container, Member, read_exactly
from sa3dist.data.source.kinds import is_system
from sa3dist.data.source.run_outputs import run_outputs_on_disk
from sa3dist.errors import DataError

LOOP = "looping link", "it leads to a folder that holds it"
READ_ALREADY = "linked folder", "it is read already, under another name"


class FolderContainer(Container):
    """A local folder, trusted: links are followed wherever they lead. Each folder is read once."""

    def __init__(self, path: Path, label: str):
        super().__init__(label)
        self._root = Path(path).resolve()
        self._seen: set[tuple[int, int]] = set()
        self._links: list[tuple[str, Path]] = []
        self._walk(self._root, ".")
        # Links last, so that a folder that is reached twice keeps its real name.
        while self._links:
            name, link = self._links.pop(0)
            target = link.resolve()
            if self._root.is_relative_to(target) or link.is_relative_to(target):
                self._leave_out(LOOP, name)
            elif _identity(target) in self._seen:
                self._leave_out(READ_ALREADY, name)
            else:
                self._walk(target, name)
        self.members.sort(key=lambda member: member.name)

    def _walk(self, top: Path, name: str) -> None:
        """Add everything below ``top`` under ``name``; collect links to folders in ``_links``."""
        for folder, folders, files in os.walk(top, onerror=self._raise_unreadable):
            inside = os.path.normpath(os.path.join(name, os.path.relpath(folder, top)))
            self._seen.add(_identity(folder))
            outputs = {child for child in run_outputs_on_disk(folder, at_top=inside == ".") if not is_system(child)}
            self.run_outputs += [os.path.normpath(os.path.join(inside, child)) for child in sorted(outputs)]
            folders[:] = [child for child in folders if child not in outputs]
            for child in sorted(folders):
                path, relative = Path(folder, child), os.path.normpath(os.path.join(inside, child))
                if is_system(child):
                    self._count_system(path, relative)
                elif path.is_symlink():
                    self._links.append((relative, path))
                elif _identity(path) in self._seen:
                    self._leave_out(READ_ALREADY, relative)
                else:
                    continue
                folders.remove(child)
            for child in sorted(set(files) - outputs):
                self._add(Path(folder, child), os.path.normpath(os.path.join(inside, child)))

    def _count_system(self, top: Path, name: str) -> None:
        # os.walk ignores folders that may not be listed, as some of these are.
        if top.is_symlink():
            self.system += 1
        else:
            for folder, _, files in os.walk(top):
                for child in sorted(files):
                    self._admit(os.path.normpath(os.path.join(name, os.path.relpath(folder, top), child)), 0, None)

    def read(self, member: Member) -> bytes:
        try:
            with open(member.handle, "rb") as stream:
                return read_exactly(stream, member.size)
        except OSError as error:
            raise DataError(
                f"cannot be read ({error.strerror or error}); check the file and its permissions"
            ) from error

    def _add(self, path: Path, name: str) -> None:
        try:
            status = path.stat()
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP:
                fault = "is a link to nothing; remove it or copy the file there"
            else:
                fault = f"cannot be accessed ({error.strerror}); check its permissions"
            self._admit(name, 0, None, fault)
        else:
            fault = None if stat.S_ISREG(status.st_mode) else "is a device or pipe, expected a file"
            self._admit(name, status.st_size, path, fault)

    def _raise_unreadable(self, error: OSError) -> None:
        raise DataError(
            f"{self.label}: folder {error.filename} cannot be listed ({error.strerror}); check its permissions"
        )


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
