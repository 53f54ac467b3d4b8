"""Any source of captioned audio (zip, folder, shards; local or remote) as a sorted list of (audio, caption) pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from sa3dist.data.captions import is_json, is_manifest, read_manifest
from sa3dist.data.containers import MAX_TOTAL_BYTES, Container, FolderContainer, Member, TarContainer, printable
from sa3dist.data.fetch import Downloads, is_remote, shown, split_query
from sa3dist.data.own_folders import is_own, on_disk
from sa3dist.data.zips import ZipContainer
from sa3dist.errors import DataError
from sa3dist.home import local_name
from sa3dist.wording import counted

log = logging.getLogger(__name__)

AUDIO_EXTENSIONS = ("wav", "flac", "mp3", "ogg", "opus", "aif", "aiff")
# More shards than any listed data set needs, and a typo like {0..99999999} must not fill the memory.
MAX_SHARDS = 100_000


@dataclasses.dataclass(frozen=True)
class Pair:
    """key: posix path inside the source without extension; the members lie in the container that listed them.

    caption       a .txt or .json member, or the text itself where a manifest holds it
    caption_name  where the caption is, for messages
    """

    key: str
    extension: str
    audio: Member
    caption: Member | str
    caption_name: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """pairs     sorted by key
    refusals  one line per fault of the container itself (hostile or unreadable members): never skipped
    problems  key -> one line: audio without caption, caption without audio, two audio files or captions that compete
    ignored   files that are neither audio nor captions, among them dot files and __MACOSX
    """

    pairs: tuple[Pair, ...]
    refusals: tuple[str, ...]
    problems: dict[str, tuple[str, ...]]
    ignored: int


@contextlib.contextmanager
def open_source(
    source: str,
    work_dir: Path,
    should_stop: Callable[[], bool] = lambda: False,
    max_download_bytes: int = MAX_TOTAL_BYTES,
    outputs: Sequence[Path] = (),
) -> Iterator[Container]:
    """Open ``source``: a path, file:// or fsspec URL of a zip, a folder, or tars (one, or with {000..127}).

    Remote sources are downloaded into ``work_dir``/downloads first and stay there for the next run, unless a DataError
    refuses them. What runs have left in the source, results and work directories, is passed over and said.
    outputs   where the run at hand will write: refused where it holds clips of the source
    Raises DataError when the source is missing, of no known kind, or hostile as a whole.
    """
    downloads = Downloads(Path(work_dir) / "downloads", should_stop, max_download_bytes)
    try:
        paths = [downloads.fetch(part) if is_remote(part) else local_path(part) for part in expand_braces(source)]
        for directory in outputs:
            for path in paths:
                _refuse_clips_among_results(path, directory, shown(source))
        with _container(paths, shown(source)) as container:
            container.leave_out_own()
            if container.own:
                found = [_with_sounds(paths[0], name) for name in container.own]
                log.warning("%s: not part of the data set, as runs have left it: %s", shown(source), named(found))
            yield container
    except DataError:
        downloads.forget()
        raise


def pair_members(container: Container) -> Listing:
    """Match every audio file with its caption; upper and lower case of a name count as one.

    The caption is the .txt of the same path and stem, or a line of captions.csv or captions.jsonl in a folder above;
    where there is neither, the .json of that stem.
    """
    audio: dict[str, list[Member]] = {}
    captions: dict[str, list[Member | _Line]] = {}
    descriptions: dict[str, Member] = {}
    ignored = container.hidden
    refusals = [_refusal(*item) for item in sorted(container.refused.items())]
    for member in container.members:
        extension = PurePosixPath(member.name).suffix[1:].lower()
        if extension in AUDIO_EXTENSIONS:
            audio.setdefault(_stem(member.name), []).append(member)
        elif extension == "txt":
            captions.setdefault(_stem(member.name), []).append(member)
        elif is_manifest(member.name):
            try:
                for name, text, place in read_manifest(container, member):
                    captions.setdefault(_stem(name), []).append(_Line(name, text, place))
            except DataError as error:
                refusals.append(str(error))
        elif is_json(member.name):
            descriptions[_stem(member.name)] = member
        else:
            ignored += 1
    for stem, member in descriptions.items():
        # Beside a caption a .json holds something else, and alone it may be anything.
        if stem in audio and stem not in captions:
            captions[stem] = [member]
        else:
            ignored += 1
    # What was refused ends the run anyway: an absent or unreadable partner of it is no second problem.
    refused = {_stem(name) for names in container.refused.values() for name in names}
    problems: dict[str, tuple[str, ...]] = {}
    pairs = []
    for stem in sorted(audio.keys() | captions.keys()):
        sounds, texts = audio.get(stem, []), captions.get(stem, [])
        if stem in refused:
            continue
        if problem := _mismatch(sounds, texts):
            problems[_without_extension((sounds or texts)[0].name)] = (problem,)
        else:
            name, caption = sounds[0].name, texts[0]
            extension = PurePosixPath(name).suffix[1:].lower()
            text = caption.text if isinstance(caption, _Line) else caption
            pairs.append(Pair(_without_extension(name), extension, sounds[0], text, _place(caption)))
    pairs.sort(key=lambda pair: pair.key)
    return Listing(tuple(pairs), tuple(refusals), problems, ignored)


def expand_braces(source: str) -> list[str]:
    """``x-{000..127}.tar`` as its 128 names, each with the query behind it; anything else as itself.

    Raises DataError above MAX_SHARDS.
    """
    address, query = split_query(source)
    if address.endswith(".tar"):
        return [name + query for name in _numbered(address, shown(source))]
    # A server that takes the name of the file as its query.
    return _numbered(source, shown(source)) if source.endswith(".tar") else [source]


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
    """Raise DataError when a part of ``source`` should be on this machine and is not; nothing is opened."""
    for part in expand_braces(source):
        if not is_remote(part):
            local_path(part)


def local_path(source: str) -> Path:
    """The file or folder of a path or file:// address. Raises DataError when there is none."""
    path = Path(local_name(source))
    # os.path, which finds nothing where a name is too long; Path raises.
    if not os.path.exists(path):
        raise DataError(f"{source}: no such file or folder; check the path")
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{source}: neither a file nor a folder")
    return path


def _refuse_clips_among_results(source: Path, directory: Path, label: str) -> None:
    """What a run writes is no part of its source: clips that lie there already cannot be meant to be left out."""
    source, directory = Path(source).resolve(), Path(directory).resolve()
    if directory == source or not directory.is_relative_to(source) or is_own(str(directory), on_disk):
        return
    for sound in _sounds(directory):
        raise DataError(
            f"{label}: {printable(str(sound.relative_to(source)))} lies in {directory.relative_to(source)}, where this "
            f"run would write; choose another output_dir or work_dir"
        )


def _sounds(folder: Path) -> list[Path]:
    """The audio files anywhere below a local folder."""
    found = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if path.suffix[1:].lower() in AUDIO_EXTENSIONS)


def _with_sounds(source: Path, name: str) -> str:
    """``name``, with the number of audio files in it: somebody may have meant them."""
    count = len(_sounds(source / name))
    return f"{name} ({counted(count, 'audio file')} in it)" if count else name


def named(names: Sequence[str], most: int = 5) -> str:
    """The first few of ``names`` for a message."""
    return ", ".join(printable(name) for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def _container(paths: list[Path], label: str) -> Container:
    path = paths[0]
    if len(paths) > 1 or path.suffix.lower() == ".tar":
        return TarContainer(paths, label)
    if path.is_file():
        return ZipContainer(path, label)
    suffixes = {child.suffix[1:].lower() for child in path.iterdir()}
    if "tar" in suffixes and not suffixes & set(AUDIO_EXTENSIONS):
        return TarContainer(sorted(path.glob("*.tar")), label)
    return FolderContainer(path, label)


def _stem(name: str) -> str:
    # macOS stores names decomposed, Windows and macOS do not tell upper from lower case.
    return unicodedata.normalize("NFC", _without_extension(name)).casefold()


def _without_extension(name: str) -> str:
    return name[: len(name) - len(PurePosixPath(name).suffix)]


@dataclasses.dataclass(frozen=True)
class _Line:
    """A manifest's line: the audio file it names, the caption, and where it stands."""

    name: str
    text: str
    place: str


def _place(caption: Member | _Line) -> str:
    return caption.place if isinstance(caption, _Line) else printable(caption.name)


def _mismatch(sounds: list[Member], texts: list[Member | _Line]) -> str | None:
    names = " and ".join([*(printable(member.name) for member in sounds), *(_place(text) for text in texts)])
    if len(sounds) > 1:
        return f"{names}: {len(sounds)} audio files claim one caption; rename or remove all but one"
    if len(texts) > 1:
        return f"{names}: {len(texts)} captions for one clip; remove all but one"
    if not texts:
        return f"{names}: audio without a caption; add {printable(PurePosixPath(sounds[0].name).stem)}.txt beside it"
    if not sounds and isinstance(texts[0], _Line):
        return f"{names}: caption of {printable(texts[0].name)}, which is not there; add the clip or remove the line"
    if not sounds:
        return f"{names}: caption without audio; add the clip beside it or remove the caption"
    return None


def _refusal(fault: str, names: list[str]) -> str:
    listed = ", ".join(printable(name) for name in names[:3])
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return f"{listed}{more}: {fault}"
