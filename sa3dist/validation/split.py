"""Choose the clips held out for validation: whole files, depending on the data set, the settings and the seed."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import yaml

from sa3dist.data.latents.source import LatentDataset
from sa3dist.data.remote.fetch import redacted
from sa3dist.data.source.build import MAX_MEASURED_CLIPS
from sa3dist.data.source.clip_stats import read_stats, write_stats
from sa3dist.data.source.prefetch import prefetch
from sa3dist.data.source.tar_writer import read_clip
from sa3dist.errors import ConfigError, counted, listed
from sa3dist.formats import ClipEntry, DatasetIndex, dataset_digest, digest_of
from sa3dist.inspection.clip import InspectedClip
from sa3dist.inspection.duplicates import near_duplicates
from sa3dist.inspection.measure import measure_clip
from sa3dist.progress import progress
from sa3dist.runtime.process_group import Group, main_process_first
from sa3dist.runtime.signals import StopRequest

if TYPE_CHECKING:
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)

# With fewer clips a share would remove too much training data: one file is held out.
SMALL_SET = 20
# Suffixes of programs that cut recordings into clips.
_CUT = re.compile(r"(.+?)[ _.-]+(?:part|chunk|segment|seg|slice|cut|split)[ _.-]*\d+", re.IGNORECASE)


def hold_out(
    settings: Settings,
    index: DatasetIndex,
    group: Group,
    stop: StopRequest,
    validation: DatasetIndex | None = None,
) -> tuple[DatasetIndex, tuple[ClipEntry, ...]]:
    """The data set without the held-out clips of ``settings.validation``, and those clips; equal on all ranks.

    validation   the data set named by the setting, if any; all its clips are held out
    Raises ConfigError for unknown names, if one side would be empty, or if the two data sets share clips.
    """
    if not settings.validation:
        return index, ()
    if validation is not None:
        main_process_first(group, "hold-out", lambda: _check_apart(settings, index, validation, group, stop), stop)
        return index, validation.clips
    keys = set(main_process_first(group, "hold-out", lambda: _choose(settings, index, group, stop), stop))
    trained = tuple(clip for clip in index.clips if clip.key not in keys)
    held_out = tuple(clip for clip in index.clips if clip.key in keys)
    return dataclasses.replace(index, clips=trained, digest=dataset_digest(trained)), held_out


def _choose(settings: Settings, index: DatasetIndex, group: Group, stop: StopRequest) -> list[str]:
    groups = grouped(index.clips, _near_duplicates(settings, index, group, stop))
    if isinstance(settings.validation, list):
        keys = chosen_by_name(index.clips, groups, settings.validation)
    else:
        keys = chosen_by_share(groups, settings.validation, settings.seed)
    clips = len(index.clips)
    if len(keys) == clips:
        raise ConfigError(
            f"validation: nothing would be left to train on: all {counted(clips, 'clip')} are named, or belong to "
            f"those by nearly equal sound or by name; hold out less"
        )
    log.info("validation: %d of %s held out: %s", len(keys), counted(clips, "clip"), listed(keys, len(keys), 5))
    if clips < SMALL_SET:
        log.warning("validation: with fewer than %d clips the validation loss is only a hint", SMALL_SET)
    return keys


def source_of(key: str) -> str:
    """The recording from which a clip was cut, by its name (``song_part2``, ``song-chunk003``), in lower case."""
    match = _CUT.fullmatch(key)
    return (match[1] if match else key).casefold()


def grouped(clips: Sequence[ClipEntry], pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Sorted groups of keys of clips that belong together: equal audio, same recording by name, or in ``pairs``."""
    leader = {clip.key: clip.key for clip in clips}

    def first_of(key: str) -> str:
        while leader[key] != key:
            key = leader[key]
        return key

    def join(one: str, other: str) -> None:
        low, high = sorted((first_of(one), first_of(other)))
        leader[high] = low

    seen: dict[tuple[str, str], str] = {}
    for clip in clips:
        for mark in (("audio", clip.audio_sha256), ("recording", source_of(clip.key))):
            join(clip.key, seen.setdefault(mark, clip.key))
    for one, other in pairs:
        join(one, other)
    groups: dict[str, list[str]] = {}
    for key in sorted(leader):
        groups.setdefault(first_of(key), []).append(key)
    return list(groups.values())


def chosen_by_share(groups: Sequence[list[str]], share: float, seed: int) -> list[str]:
    """Sorted keys of whole groups, chosen by ``seed``, as many as fit into the share; at least one of the smallest."""
    total = sum(map(len, groups))
    most = 1 if total < SMALL_SET else max(1, round(share * total))
    # Ordered by hash, so that adding a clip to the data set changes the side of few others.
    drawn = sorted(groups, key=lambda keys: digest_of("hold out", str(seed), keys[0]))
    chosen: list[str] = []
    for keys in drawn:
        if len(chosen) + len(keys) <= most:
            chosen += keys
    return sorted(chosen or min(drawn, key=len))


def chosen_by_name(clips: Sequence[ClipEntry], groups: Sequence[list[str]], names: Sequence[str]) -> list[str]:
    """Sorted keys of the clips given by key, file or folder, and of clips in the same groups."""
    named: set[str] = set()
    # macOS stores names decomposed; keyboards enter them composed.
    composed = [(unicodedata.normalize("NFC", clip.key), clip) for clip in clips]
    for name in names:
        wanted = unicodedata.normalize("NFC", name)
        folder = f"{wanted.rstrip('/')}/"
        matching = {
            clip.key for key, clip in composed if wanted in (key, f"{key}.{clip.extension}") or key.startswith(folder)
        }
        if not matching:
            near = difflib.get_close_matches(name, [clip.key for clip in clips], n=1)
            hint = f", did you mean {near[0]!r}?" if near else "; sa3dist inspect lists them"
            raise ConfigError(f"validation: {name!r} is no clip, file or folder of the data set{hint}")
        named |= matching
    keys = sorted(key for keys in groups if named.intersection(keys) for key in keys)
    if others := [key for key in keys if key not in named]:
        log.info(
            "validation: also held out, because they belong to the named clips: %s", listed(others, len(others), 5)
        )
    return keys


def _check_apart(
    settings: Settings, index: DatasetIndex, validation: DatasetIndex, group: Group, stop: StopRequest
) -> None:
    trained = {clip.audio_sha256: clip.key for clip in index.clips}
    shared = {clip.key: trained[clip.audio_sha256] for clip in validation.clips if clip.audio_sha256 in trained}
    ours = _inspected(settings, index, group, stop)
    theirs = _inspected(settings, validation, group, stop) if ours else []
    # Both may use the same key: mark theirs with a character that keys cannot have, and that sorts first in a pair.
    marked = [dataclasses.replace(clip, key=f"\n{clip.key}") for clip in theirs]
    for one, other, _ in near_duplicates(ours + marked) if theirs else ():
        if one.startswith("\n") and not other.startswith("\n"):
            shared.setdefault(one[1:], other)
    if shared:
        label, pairs = redacted(settings.validation_source), [f"{one} (as {other})" for one, other in shared.items()]
        raise ConfigError(
            f"validation: {counted(len(shared), 'clip')} of {label} {'is' if len(shared) == 1 else 'are'} trained on, "
            f"or nearly equal to what is: {listed(pairs, len(pairs), 3)}; take them out of one of the two"
        )


def _near_duplicates(settings: Settings, index: DatasetIndex, group: Group, stop: StopRequest) -> list[tuple[str, str]]:
    """Pairs of keys with nearly equal audio, by the fingerprints that ``sa3dist inspect`` compares."""
    return [(one, other) for one, other, _ in near_duplicates(_inspected(settings, index, group, stop))]


def _inspected(settings: Settings, index: DatasetIndex, group: Group, stop: StopRequest) -> list[InspectedClip]:
    """The clips with their fingerprints; empty, with a log line, if there are no fingerprints."""
    if isinstance(index, LatentDataset) or index.reader is not None or len(index.clips) > MAX_MEASURED_CLIPS:
        log.info(
            "validation: only equal audio and recordings by name are kept on one side; near-duplicates are looked for "
            "in up to %s of audio on this machine",
            counted(MAX_MEASURED_CLIPS, "clip"),
        )
        return []
    stats = read_stats(settings.work_dir)
    lacking = {(clip.audio_sha256, clip.audio_bytes): clip for clip in index.clips}
    lacking = {key: clip for key, clip in lacking.items() if key not in stats}
    if lacking:
        measured = prefetch(
            lambda item: measure_clip(read_clip(index.directory / item[1].shard, item[1])),
            lacking.items(),
            lambda item: item[1].audio_bytes,
        )
        with progress("measure clips", len(lacking), shown=True) as update:
            for done, ((key, _), found) in enumerate(measured, 1):
                group.liveness.progress()
                stop.raise_if_requested("measuring clips")
                stats[key] = found
                update(done)
        write_stats(settings.work_dir, stats)
    return [
        InspectedClip(clip.key, clip.extension, size, sha256, clip.caption, *stats[sha256, size])
        for clip in index.clips
        for sha256, size in [(clip.audio_sha256, clip.audio_bytes)]
    ]


def settings_file(settings: Settings, held_out: Sequence[ClipEntry]) -> str:
    """The text of run.yaml: the settings, followed by the keys of held-out clips as comments."""
    text = yaml.safe_dump(settings.as_dict(), sort_keys=False)
    if held_out:
        listing = yaml.safe_dump({"held_out": [clip.key for clip in held_out]}, allow_unicode=True)
        text += "".join(f"# {line}\n" for line in listing.splitlines())
    return text
