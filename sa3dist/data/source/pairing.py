"""Match the audio files of a container with their captions; list what is left out or refused."""

import dataclasses
import unicodedata
from pathlib import PurePosixPath

from sa3dist.data.remote.local_paths import is_text
from sa3dist.data.source.captions import NoCaptions, is_json, read_manifest
from sa3dist.data.source.containers import Container, Member
from sa3dist.data.source.kinds import UNREAD_AUDIO_EXTENSIONS, extension_of, is_audio, is_manifest, kind_of
from sa3dist.errors import DataError, listed, printable
from sa3dist.formats import LeftOut

_OF_UNREADABLE = "caption", "of audio that is left out"
_SYSTEM = "left by operating systems and file managers, or a name that begins with a dot"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One clip of a container: its audio file and its caption.

    key           posix path inside the source, without extension
    caption       a .txt or .json member, or the text itself if it comes from a table
    caption_name  location of the caption, for messages
    """

    key: str
    extension: str
    audio: Member
    caption: Member | str
    caption_name: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """The content of a container.

    pairs     sorted by key
    refusals  one line per fault of the container itself (hostile or unreadable members); never skipped
    problems  key -> one line: audio without caption, caption without audio, several audio files or captions
    unread    key -> one line: clips whose captions may be in a refused table; the table is what to fix
    left_out  every other file, by kind; system files are counted, not named
    """

    pairs: tuple[Pair, ...]
    refusals: tuple[str, ...]
    problems: dict[str, tuple[str, ...]]
    unread: dict[str, tuple[str, ...]]
    left_out: tuple[LeftOut, ...]


def pair_members(container: Container) -> Listing:
    """Match every audio file with its caption; names are compared without case.

    The caption is the .txt of the same path and stem, or a line of a table (captions.csv, captions.jsonl, metadata.csv,
    metadata.jsonl) in the same folder or above. If there is neither, it is the .json of that stem.
    """
    return _Pairing(container).listing()


@dataclasses.dataclass(frozen=True)
class _Line:
    """A table's line: name of the audio file, caption, and location of the line for messages."""

    name: str
    text: str
    where: str


class _Pairing:
    """Builds a ``Listing``: collects audio and captions by stem, and left-out files by kind."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._audio: dict[str, list[Member]] = {}
        self._captions: dict[str, list[Member | _Line]] = {}
        self._left_out = {kind: list(names) for kind, names in container.left_out.items()}
        self._refusals = [f"{listed(names, len(names))}: {why}" for why, names in sorted(container.refused.items())]
        refused = [name for names in container.refused.values() for name in names]
        # Refused tables, and stems of refused files: a missing partner of these is not reported as a second problem.
        self._tables = [name for name in refused if is_manifest(name)]
        self._other_tables: dict[str, str] = {}
        self._refused = {_stem(name) for name in refused}

    def listing(self) -> Listing:
        self._sort()
        unreadable = {
            _stem(name)
            for names in self._left_out.values()
            for name in names
            if extension_of(name) in UNREAD_AUDIO_EXTENSIONS
        }
        pairs: list[Pair] = []
        problems: dict[str, tuple[str, ...]] = {}
        unread: dict[str, tuple[str, ...]] = {}
        for stem in sorted((self._audio.keys() | self._captions.keys()) - self._refused):
            sounds, texts = self._audio.get(stem, []), self._captions.get(stem, [])
            if not sounds and stem in unreadable:
                self._leave_out(_OF_UNREADABLE, *map(_where, texts))
            elif len(sounds) == len(texts) == 1:
                (sound,), (caption,) = sounds, texts
                name, text = _without_extension(sound.name), caption.text if isinstance(caption, _Line) else caption
                pairs.append(Pair(name, extension_of(sound.name), sound, text, _where(caption)))
            elif len(sounds) == 1 and not texts and (table := self._table_above(sounds[0].name)):
                reason = f"its caption may be in {printable(table)}, which is refused"
                unread[_without_extension(sounds[0].name)] = (reason,)
            else:
                problems[_without_extension((sounds or texts)[0].name)] = (_mismatch(sounds, texts),)
        self._blame_unread_tables(pairs, problems, unread)
        pairs.sort(key=lambda pair: pair.key)
        return Listing(tuple(pairs), tuple(self._refusals), problems, unread, self._lines())

    def _sort(self) -> None:
        """Assign every member to audio, captions, tables or left-out files."""
        json_files: list[Member] = []
        for member in self._container.members:
            if is_audio(member.name):
                self._audio.setdefault(_stem(member.name), []).append(member)
            elif extension_of(member.name) == "txt":
                self._captions.setdefault(_stem(member.name), []).append(member)
            elif is_manifest(member.name):
                self._read_table(member)
            elif is_json(member.name):
                json_files.append(member)
            else:
                self._leave_out(kind_of(member.name), member.name)
        for member in json_files:
            # A .json counts as a caption only next to audio that has no other caption.
            stem = _stem(member.name)
            if stem in self._audio and stem not in self._captions:
                self._captions[stem] = [member]
            else:
                self._leave_out(kind_of(member.name), member.name)

    def _read_table(self, member: Member) -> None:
        try:
            empty = True
            for name, text, where in read_manifest(self._container, member):
                self._captions.setdefault(_stem(name), []).append(_Line(name, text, where))
                empty = False
            if empty:
                self._leave_out(("table", "it has no lines"), member.name)
        except NoCaptions as reason:
            self._leave_out(("table", str(reason)), member.name)
            self._other_tables[member.name] = str(reason)
        except DataError as error:
            self._refusals.append(str(error))
            self._tables.append(member.name)

    def _table_above(self, name: str) -> str | None:
        return next((table for table in self._tables if _lies_below(name, table)), None)

    def _blame_unread_tables(
        self, pairs: list[Pair], problems: dict[str, tuple[str, ...]], unread: dict[str, tuple[str, ...]]
    ) -> None:
        """If no clip below a metadata table has a caption, report the table once instead of each clip."""
        for table, reason in self._other_tables.items():
            without = [key for key in problems if _lies_below(key, table) and not self._captions.get(_stem(f"{key}.x"))]
            if without and not any(_lies_below(pair.key, table) for pair in pairs):
                self._refusals.append(f"{printable(table)}: {reason}; expected names such as file_name and text")
                for key in without:
                    del problems[key]
                    unread[key] = (f"its caption may be in {printable(table)}, which is refused",)

    def _leave_out(self, kind: tuple[str, str], *names: str) -> None:
        self._left_out.setdefault(kind, []).extend(names)

    def _lines(self) -> tuple[LeftOut, ...]:
        lines = [
            LeftOut(what, why, len(names), tuple(sorted(name if is_text(name) else printable(name) for name in names)))
            for (what, why), names in sorted(self._left_out.items())
        ]
        if self._container.system:
            lines.append(LeftOut("system file", _SYSTEM, self._container.system))
        return tuple(lines)


def _lies_below(name: str, table: str) -> bool:
    return PurePosixPath(name).is_relative_to(PurePosixPath(table).parent)


def _stem(name: str) -> str:
    # macOS stores names decomposed; Windows and macOS ignore case.
    return unicodedata.normalize("NFC", _without_extension(name)).casefold()


def _without_extension(name: str) -> str:
    return name[: len(name) - len(PurePosixPath(name).suffix)]


def _where(caption: Member | _Line) -> str:
    return caption.where if isinstance(caption, _Line) else printable(caption.name)


def _mismatch(sounds: list[Member], texts: list[Member | _Line]) -> str:
    names = " and ".join([*(printable(member.name) for member in sounds), *(_where(text) for text in texts)])
    if len(sounds) > 1:
        return f"{names}: {len(sounds)} audio files claim one caption; rename or remove all but one"
    if len(texts) > 1:
        return f"{names}: {len(texts)} captions for one clip; remove all but one"
    if not texts:
        return f"{names}: audio without a caption; add {printable(PurePosixPath(sounds[0].name).stem)}.txt beside it"
    if not sounds and isinstance(texts[0], _Line):
        return f"{names}: caption of {printable(texts[0].name)}, which is not there; add the clip or remove the line"
    return f"{names}: caption without audio; add the clip beside it or remove the caption"
