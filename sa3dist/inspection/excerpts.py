"""Excerpts of clips as OGG, encoded during inspection, for a page of limited size."""

import contextlib
import io

import soundfile

from sa3dist.data.source.riff import with_sizes_repaired
from sa3dist.report.sound import ogg

# Base64.
BYTES_PER_CHARACTER = 3 / 4
# Size of a row of the page without its sound: picture, names and figures.
ROW_BYTES = 7000
# Approximate result of ogg() for stereo music.
BYTES_PER_SECOND = 11_000
# A shorter excerpt is not representative; a longer one leaves no room for others.
LEAST_SECONDS, MOST_SECONDS = 5.0, 20.0


class Excerpts:
    """Excerpts of ``seconds`` each, of the first clips, as many as fit a page."""

    def __init__(self, page_bytes: float, clips: int) -> None:
        self._left = max(BYTES_PER_CHARACTER * (page_bytes - ROW_BYTES * clips), 0)
        self.seconds = min(max(self._left / BYTES_PER_SECOND / max(clips, 1), LEAST_SECONDS), MOST_SECONDS)

    def of(self, data: bytes) -> bytes:
        """The beginning of an audio file as OGG; empty if libsndfile fails, or once there is no room left."""
        if self._left > 0:
            with contextlib.suppress(soundfile.SoundFileError):
                return ogg(io.BytesIO(with_sizes_repaired(data)), seconds=self.seconds)
        return b""

    def kept(self, sound: bytes) -> bytes:
        """``sound`` if it fits, else empty. Call in the order of clips; after the first that does not fit none does."""
        self._left -= len(sound)
        if self._left < 0:
            self._left = 0
            return b""
        return sound
