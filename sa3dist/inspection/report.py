"""Inspect a source of captioned clips: what it contains, and what training would do with each clip."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from sa3dist.config import Settings
from sa3dist.data.source.archive import open_container
from sa3dist.data.source.audio import AudioFacts, check_whole
from sa3dist.data.source.check import count_problem, read_pair
from sa3dist.data.source.clip_stats import ClipStats, Measured, read_stats, write_stats
from sa3dist.data.source.containers import Container
from sa3dist.data.source.cut_captions import CutCaptions, cut_captions, text_source
from sa3dist.data.source.pairing import Pair, pair_members
from sa3dist.data.source.prefetch import prefetch
from sa3dist.data.source.resample import resampled_length
from sa3dist.errors import counted, span
from sa3dist.flow.crops import crop_frames
from sa3dist.formats import LeftOut
from sa3dist.inspection.clip import InspectedClip
from sa3dist.inspection.duplicates import exact_duplicates, near_duplicates
from sa3dist.inspection.excerpts import Excerpts
from sa3dist.inspection.measure import measure_clip

LENGTH_BINS = 20


@dataclasses.dataclass
class Report:
    """The results of an inspection.

    clips            all clips by key, including unusable ones
    refusals         faults of the archive itself, each of which stops any run
    exact, near      groups of keys with equal bytes; (key, key, distance in dB) of clips that sound alike
    crop_seconds     length to which training would crop
    verdict          what would stop training with these settings; empty if nothing would
    left_out         files that are not clips, by kind; all are named except system files
    excerpt_seconds  length of each clip's ``sound``; 0 without a page
    cut              captions longer than the text encoder's limit; None if there is no tokenizer
    """

    source: str
    clips: list[InspectedClip]
    refusals: list[str]
    exact: list[list[str]]
    near: list[tuple[str, str, float]]
    crop_seconds: float
    verdict: list[str]
    left_out: tuple[LeftOut, ...] = ()
    cut: CutCaptions | None = None
    excerpt_seconds: float = 0.0

    @property
    def usable(self) -> list[InspectedClip]:
        return [clip for clip in self.clips if clip.treatment != "skipped"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "summary": self.summary(),
            "verdict": self.verdict,
            "refusals": self.refusals,
            "left_out": [dataclasses.asdict(kind) for kind in self.left_out],
            "cut_captions": None if self.cut is None else dataclasses.asdict(self.cut),
            "exact_duplicates": self.exact,
            "near_duplicates": [{"clips": [a, b], "distance_db": round(d, 2)} for a, b, d in self.near],
            "clips": [clip.as_dict() for clip in self.clips],
        }

    def summary(self) -> dict[str, Any]:
        """Statistics of the usable clips, as JSON values."""
        usable = self.usable
        values: dict[str, Any] = {
            "clips": len(self.clips),
            "usable": len(usable),
            "hours": sum(clip.seconds for clip in usable) / 3600,
            "crop_seconds": self.crop_seconds,
            "treatment": dict(Counter(clip.treatment for clip in self.clips)),
            "left_out": sum(kind.count for kind in self.left_out),
        }
        if not usable:
            return values
        edges, counts = self.length_histogram()
        words = [len(clip.caption.split()) for clip in usable]
        captions = Counter(clip.caption for clip in usable)
        return values | {
            "seconds": _spread([clip.seconds for clip in usable]),
            "length_histogram": {"edges_seconds": [round(edge, 3) for edge in edges], "clips": counts},
            "formats": dict(Counter(clip.extension for clip in usable)),
            "sample_rates_hz": {str(k): n for k, n in Counter(clip.facts.sample_rate_hz for clip in usable).items()},
            "channels": {str(k): n for k, n in Counter(clip.facts.channels for clip in usable).items()},
            "lufs": _spread([clip.stats.lufs for clip in usable if clip.stats.lufs > -np.inf]),
            "peak_dbfs": _spread([clip.stats.peak_dbfs for clip in usable]),
            "clipped_clips": sum(clip.stats.clipped_samples > 0 for clip in usable),
            "mostly_silent_clips": sum(clip.stats.silent_share > 0.5 for clip in usable),
            "captions": {
                "words": _spread([float(count) for count in words]),
                "distinct": len(captions),
                "most_common": captions.most_common(5),
            },
        }

    def overview(self) -> list[tuple[str, str]]:
        """The summary as (name, text) lines."""
        summary = self.summary()
        rows = [("clips", f"{summary['clips']}, {summary['usable']} usable"), ("audio", span(3600 * summary["hours"]))]
        if summary["left_out"]:
            rows.append(("left out", f"{summary['left_out']} files that are no clips, see below"))
        if not summary["usable"]:
            return rows

        def spread(name: str, unit: str, form: str = ".1f") -> str:
            values = summary[name]
            if not values:
                return "none"
            return f"{values['min']:{form}} to {values['max']:{form}} {unit}, median {values['median']:{form}}"

        def counts(name: str) -> str:
            return ", ".join(f"{value} x {key}" for key, value in summary[name].items())

        captions = summary["captions"]
        words = captions["words"]
        return rows + [
            ("length", spread("seconds", "s", ".4g")),
            ("formats", counts("formats")),
            ("sample rates", counts("sample_rates_hz") + " Hz"),
            ("channels", counts("channels")),
            ("loudness", spread("lufs", "LUFS")),
            ("peak", spread("peak_dbfs", "dBFS")),
            ("clipping", counted(summary["clipped_clips"], "clip")),
            ("mostly silent", counted(summary["mostly_silent_clips"], "clip")),
            ("captions", f"{captions['distinct']} distinct, {words['min']:g} to {words['max']:g} words"),
            ("training", counts("treatment") + f"; crops of {summary['crop_seconds']:.1f} s"),
        ]

    def duplicates(self) -> list[str]:
        """One line per group of equal clips, and per pair of clips that sound alike."""
        alike = [f"sound alike ({distance:.1f} dB apart): {one}, {other}" for one, other, distance in self.near]
        return [f"equal bytes: {', '.join(keys)}" for keys in self.exact] + alike

    def length_histogram(self) -> tuple[list[float], list[int]]:
        """Bin edges in seconds, evenly spaced from 0, and the number of usable clips in each bin."""
        seconds = [clip.seconds for clip in self.usable]
        counts, edges = np.histogram(seconds, LENGTH_BINS, (0.0, max(seconds)))
        return edges.tolist(), counts.tolist()


def inspect_source(
    settings: Settings,
    framing: tuple[float, int, int],
    report: Callable[[int, int], None] = lambda done, total: None,
    page_bytes: float = 0,
) -> Report:
    """Decode and measure every clip of ``settings.audio_data_url``, except those measured earlier.

    Writes only downloads and, if ``work_dir`` exists or was given, the statistics, even when interrupted.

    framing      native length in seconds, sample rate in Hz and samples per latent frame of the model
    report       called as report(inspected, total) after every clip
    page_bytes   size of the page to play clips from; 0: clips get no sound
    Raises DataError if the source as a whole cannot be opened.
    """
    limits = {"max_download_bytes": settings.max_download_bytes, "outputs": (settings.work_dir, settings.output_dir)}
    with open_container(settings.audio_data_url, settings.work_dir, **limits) as container:
        listing = pair_members(container)
        known, excerpts = read_stats(settings.work_dir), Excerpts(page_bytes, len(listing.pairs))
        inspected = prefetch(
            lambda pair: _inspect(container, pair, known, excerpts), listing.pairs, lambda pair: pair.audio.size
        )
        clips = []
        try:
            for done, (_, clip) in enumerate(inspected, 1):
                clip.sound = excerpts.kept(clip.sound)
                clips.append(clip)
                report(done, len(listing.pairs))
        finally:
            measured = {(clip.audio_sha256, clip.bytes): (clip.facts, clip.stats) for clip in clips if clip.stats}
            may_write = "work_dir" in settings.model_fields_set or settings.work_dir.is_dir()
            if may_write and measured.keys() - known.keys():
                write_stats(settings.work_dir, known | measured)
        for key, problems in (listing.problems | listing.unread).items():
            clips.append(InspectedClip(key, "", 0, problems=problems))
        clips.sort(key=lambda clip: clip.key)
        inspection = Report(container.label, clips, list(listing.refusals), [], [], 0.0, [], listing.left_out)
    inspection.excerpt_seconds = excerpts.seconds if page_bytes else 0.0
    good = [clip for clip in clips if not clip.problems]
    inspection.exact, inspection.near = exact_duplicates(good), near_duplicates(good)
    if good:
        frames = crop_frames(settings.duration, max(clip.seconds for clip in good), *framing)
        inspection.crop_seconds = frames * framing[2] / framing[1]
        for clip in good:
            clip.treatment, clip.reason = _treatment(clip.facts, frames, *framing[1:])
    for clip in clips:
        clip.reason = clip.reason or "; ".join(clip.problems)
    inspection.cut = cut_captions(text_source(settings), ((clip.key, clip.caption) for clip in inspection.usable))
    inspection.verdict = _verdict(inspection, settings)
    return inspection


def _inspect(container: Container, pair: Pair, known: Measured, excerpts: Excerpts) -> InspectedClip:
    def examine(sha256: str, data: bytes) -> tuple[AudioFacts, ClipStats, bytes]:
        earlier = known.get((sha256, len(data)))
        if earlier:
            check_whole(data, earlier[0].samples)
        return *(earlier or measure_clip(data)), excerpts.of(data)

    caption, _, sha256, measured, problems = read_pair(container, pair, examine)
    facts, stats, sound = measured or (None, None, b"")
    audio = pair.extension, pair.audio.size, sha256
    return InspectedClip(pair.key, *audio, caption, facts, stats, problems, sound=sound)


def _treatment(facts: AudioFacts, limit: int, sample_rate_hz: int, samples_per_frame: int) -> tuple[str, str]:
    samples = resampled_length(facts.samples, facts.sample_rate_hz, sample_rate_hz)
    crop = f"{limit * samples_per_frame / sample_rate_hz:.1f} s"
    if samples // samples_per_frame > limit:
        return "cropped", f"another {crop} of it each time"
    if samples > limit * samples_per_frame:
        # Without `duration` this is the longest clip: its crop is floored to whole frames.
        return "whole", f"all of it but less than a frame, {samples_per_frame / sample_rate_hz:.2g} s"
    if samples > (limit - 1) * samples_per_frame:
        return "whole", "all of it"
    return "padded", f"all of it and a random stretch of silence, up to {crop}"


def _verdict(report: Report, settings: Settings) -> list[str]:
    lines = [f"{report.source}: {line}" for line in report.refusals]
    bad = [clip for clip in report.clips if clip.problems]
    if bad and settings.on_bad_clip == "raise":
        lines.append(f"{counted(len(bad), 'clip')} cannot be used; fix them, or set on_bad_clip: skip")
    usable = len(report.usable)
    if problem := count_problem(usable, settings.allow_any_dataset_size, usable):
        lines.append(problem)
    return lines


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
    }
