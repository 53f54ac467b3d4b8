"""The beginnings of clips as OGG, made during the inspection, for the players of a page of limited size."""

import contextlib
import io

import soundfile

from sa3dist.data.source.riff import with_sizes_repaired
from sa3dist.report.sound import ogg

# A page encodes bytes in base64: four characters for three.
BYTES_PER_CHARACTER = 3 / 4
# Bytes of a row of the page without its sound: picture, names and numbers.
ROW_BYTES = 7000
# About what ogg() needs for stereo music.
BYTES_PER_SECOND = 11_000
# A shorter excerpt says too little of a clip; a longer one leaves other clips without.
LEAST_SECONDS, MOST_SECONDS = 5.0, 20.0


class Excerpts:
    """Excerpts of equal length of the first clips, as many as fit a page. ``seconds`` is that length."""

    def __init__(self, page_bytes: float, clips: int) -> None:
        self._left = max(BYTES_PER_CHARACTER * (page_bytes - ROW_BYTES * clips), 0)
        self.seconds = min(max(self._left / BYTES_PER_SECOND / max(clips, 1), LEAST_SECONDS), MOST_SECONDS)

    def of(self, data: bytes) -> bytes:
        """The beginning of an audio file; empty if libsndfile cannot write it, or no room is left."""
        if self._left > 0:
            with contextlib.suppress(soundfile.SoundFileError):
                return ogg(io.BytesIO(with_sizes_repaired(data)), seconds=self.seconds)
        return b""

    def kept(self, sound: bytes) -> bytes:
        """``sound`` if it fits, else empty. Call it clip by clip, in order; after the first misfit none fits."""
        self._left -= len(sound)
        if self._left < 0:
            self._left = 0
            return b""
        return sound
