"""One clip as `sa3dist inspect` reports it: its content, and what training would do with it."""

import dataclasses
from typing import Any

import numpy as np

from sa3dist.data.source.audio import AudioFacts
from sa3dist.data.source.clip_stats import SCALARS, ClipStats


@dataclasses.dataclass
class InspectedClip:
    """One pair of audio and caption. ``facts`` and ``stats`` are None if the audio cannot be used.

    bytes      length of the audio file
    sound      its beginning as OGG, for an HTML page
    treatment  "whole", "cropped", "padded" or "skipped"; ``reason`` explains it
    """

    key: str
    extension: str
    bytes: int
    audio_sha256: str = ""
    caption: str = ""
    facts: AudioFacts | None = None
    stats: ClipStats | None = None
    problems: tuple[str, ...] = ()
    treatment: str = "skipped"
    reason: str = ""
    sound: bytes = dataclasses.field(default=b"", repr=False)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; infinities as None."""
        values = {name: getattr(self, name) for name in ("key", "extension", "bytes", "audio_sha256", "caption")}
        if self.facts and self.stats:
            values |= dataclasses.asdict(self.facts) | {"seconds": self.seconds}
            measured = {name: getattr(self.stats, name) for name in SCALARS}
            values |= {name: None if value == -np.inf else round(value, 3) for name, value in measured.items()}
        return values | {"treatment": self.treatment, "reason": self.reason}

    def cells(self) -> list[str]:
        """Its values in a table: seconds, Hz, channels, LUFS, peak dBFS, silent share, clipped samples."""
        if self.facts is None or self.stats is None:
            return [""] * 7
        return [
            f"{self.seconds:.2f}",
            f"{self.facts.sample_rate_hz}",
            f"{self.facts.channels}",
            f"{self.stats.lufs:.1f}",
            f"{self.stats.peak_dbfs:.1f}",
            f"{100 * self.stats.silent_share:.0f} %",
            f"{self.stats.clipped_samples}",
        ]

    @property
    def seconds(self) -> float:
        return self.facts.samples / self.facts.sample_rate_hz if self.facts else 0.0
