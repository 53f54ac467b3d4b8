"""Open any source of captioned audio (zip, folder or shards, local or remote) as a container of files."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sa3dist.data.remote.fetch import MAX_TOTAL_BYTES, Downloads, is_remote, redacted, split_query
from sa3dist.data.remote.local_paths import local_name
from sa3dist.data.source.containers import Container, TarContainer
from sa3dist.data.source.folders import FolderContainer
from sa3dist.data.source.kinds import BESIDE_SHARDS, extension_of, is_audio, is_system
from sa3dist.data.source.run_outputs import RUN_OUTPUT, is_below, is_run_folder, list_disk, run_outputs_in_archive
from sa3dist.data.source.zips import ZipContainer
from sa3dist.errors import DataError, counted, printable

# More than any data set needs; a typo like {0..99999999} must not fill the memory.
MAX_SHARDS = 100_000


@contextlib.contextmanager
def open_container(
    source: str,
    work_dir: Path,
    should_stop: Callable[[], bool] = lambda: False,
    max_download_bytes: int = MAX_TOTAL_BYTES,
    outputs: Sequence[Path] = (),
) -> Iterator[Container]:
    """Open ``source``: a path, file:// or fsspec URL of a zip, a folder, a tar, or several tars ({000..127}).

    Remote sources are first downloaded to ``work_dir``/downloads and stay there for later runs, unless a DataError
    refuses them. Results and work directories of runs inside the source are left out and listed.
    outputs   folders this run will write to; an error if they contain clips of the source
    Raises DataError if the source is missing, of an unknown kind, or hostile as a whole.
    """
    with Downloads(Path(work_dir) / "downloads", should_stop, max_download_bytes) as downloads:
        paths = [downloads.fetch(part) if is_remote(part) else local_path(part) for part in expand_braces(source)]
        for directory in outputs:
            for path in paths:
                _refuse_clips_among_results(path, directory, redacted(source))
        with _container(paths, redacted(source)) as container:
            # Run outputs in archives, recognised by name. FolderContainer leaves them out itself.
            container.run_outputs += sorted(run_outputs_in_archive(member.name for member in container.members))
            container.members = [m for m in container.members if not is_below(m.name, container.run_outputs)]
            if container.run_outputs:
                container.left_out[RUN_OUTPUT] = [_with_sounds(paths[0], name) for name in container.run_outputs]
            yield container


def expand_braces(source: str) -> list[str]:
    """``x-{000..127}.tar?query`` as its 128 names, each with the query; any other source unchanged.

    Raises DataError above MAX_SHARDS.
    """
    address, query = split_query(source)
    if address.endswith(".tar"):
        return [name + query for name in _numbered(address, redacted(source))]
    # Some servers take the file's name in the query.
    return _numbered(source, redacted(source)) if source.endswith(".tar") else [source]


def _numbered(pattern: str, label: str) -> list[str]:
    before, opened, rest = pattern.partition("{")
    inside, closed, after = rest.partition("}")
    first, dots, last = inside.partition("..")
    if not (opened and closed and dots and first.isdecimal() and last.isdecimal()):
        return [pattern]
    tails = _numbered(after, label)
    if not 0 <= int(last) - int(first) < MAX_SHARDS / len(tails):
        raise DataError(f"{label}: expected a range of 1 to {MAX_SHARDS} shards in braces, lower number first")
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [before + number + tail for number in numbers for tail in tails]


def check_local(source: str) -> None:
    """Raise DataError if a local part of ``source`` is missing. Opens nothing."""
    for part in expand_braces(source):
        if not is_remote(part):
            local_path(part)


def local_path(source: str) -> Path:
    """The file or folder of a path or file:// address. Raises DataError if there is none."""
    path = Path(local_name(source))
    # os.path.exists returns False for a name that is too long; Path.exists raises.
    if not os.path.exists(path):
        raise DataError(f"{source}: no such file or folder; check the path")
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{source}: neither a file nor a folder")
    return path


def _refuse_clips_among_results(source: Path, directory: Path, label: str) -> None:
    """Refuse to write results into a folder with clips of the source: the next run would leave those clips out."""
    source, directory = Path(source).resolve(), Path(directory).resolve()
    if directory == source or not directory.is_relative_to(source) or is_run_folder(str(directory), list_disk):
        return
    for sound in _sounds(directory):
        raise DataError(
            f"{label}: {printable(str(sound.relative_to(source)))} is in {directory.relative_to(source)}, where this "
            f"run would write; choose another output_dir or work_dir"
        )


def _sounds(folder: Path) -> list[Path]:
    """The audio files anywhere below a local folder."""
    return sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names if is_audio(name))


def _with_sounds(source: Path, name: str) -> str:
    """``name`` with its number of audio files, in case they were meant to be used."""
    count = len(_sounds(source / name))
    return f"{name} ({counted(count, 'audio file')} in it)" if count else name


def _container(paths: list[Path], label: str) -> Container:
    path = paths[0]
    if len(paths) > 1:
        return _tars(paths, label)
    if path.is_file():
        return _archive(path, label)
    folder = FolderContainer(path, label)
    tars = shards_on_top(folder, path)
    if not tars:
        return folder
    shards = _tars(tars, label)
    shards.system += folder.system
    names = {tar.name for tar in tars}
    others = [*(m.name for m in folder.members), *(name for names in folder.left_out.values() for name in names)]
    if others := sorted(set(others) - names):
        shards.left_out.setdefault(BESIDE_SHARDS, []).extend(others)
    return shards


def tars_on_top(path: Path) -> list[Path]:
    """The .tar files directly in a folder, sorted by name."""
    tars = [child for child in path.iterdir() if extension_of(child.name) == "tar" and not is_system(child.name)]
    return sorted(child for child in tars if child.is_file())


def shards_on_top(folder: FolderContainer, path: Path) -> list[Path]:
    """``tars_on_top`` of a folder of shards. Raises DataError if it or a subfolder also contains clips."""
    tars = tars_on_top(path)
    refused = [name for names in folder.refused.values() for name in names]
    for name in filter(is_audio, [*(member.name for member in folder.members), *refused] if tars else ()):
        raise DataError(shards_and_clips(folder.label, tars[0].name, name))
    return tars


def shards_and_clips(label: str, tar: str, clip: str) -> str:
    """The message for a folder that holds both shards and clips."""
    return (
        f"{label}: holds shards ({printable(tar)}) and clips ({printable(clip)}), and only one can be meant; "
        f"move the .tar away, or give its path to read it alone"
    )


# First bytes of files that are not a data set, what they are, and how to unpack them.
_OTHER_FILES = (
    (b"\x1f\x8b", "compressed with gzip", "tar -xzf"),
    (b"BZh", "compressed with bzip2", "tar -xjf"),
    (b"\xfd7zXZ\0", "compressed with xz", "tar -xJf"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstandard", "tar --zstd -xf"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "lz4 -d"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "7z x"),
    (b"Rar!\x1a\x07", "a RAR archive", "unrar x"),
)
_AUDIO_STARTS = (b"fLaC", b"OggS", b"ID3", b"RF64", b"caff")


def _archive(path: Path, label: str) -> Container:
    """A zip or a tar, by content rather than by name."""
    start = _start_of(path, label)
    _refuse_packed(path, start, label)
    if start.startswith(_AUDIO_STARTS) or start[8:12] in (b"WAVE", b"AIFF", b"AIFC"):
        raise DataError(f"{label}: is one recording, expected a zip, a .tar or a folder; give the folder it is in")
    is_tar = start[257:262] == b"ustar" or extension_of(path.name) == "tar"
    return TarContainer([path], label) if is_tar and not start.startswith(b"PK") else ZipContainer(path, label)


def _tars(paths: list[Path], label: str) -> TarContainer:
    for path in paths:
        _refuse_packed(path, _start_of(path, label), f"{label}: {path.name}")
    return TarContainer(paths, label)


def _start_of(path: Path, label: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise DataError(f"{label}: {path.name} cannot be read ({error.strerror or error}); check the path") from error


def _refuse_packed(path: Path, start: bytes, label: str) -> None:
    for magic, what, command in _OTHER_FILES:
        if start.startswith(magic):
            raise DataError(
                f"{label}: is {what}, expected a zip, a plain .tar or a folder; unpack it ({command} {path.name}) and "
                f"give the folder"
            )
