"""The beginnings of clips as OGG, made while clips are inspected, for a page of limited size to play."""

import contextlib
import io

import soundfile

from sa3dist.data.source.riff import with_sizes_repaired
from sa3dist.report.sound import ogg

# As the page writes bytes: four characters for three.
BYTES_PER_CHARACTER = 3 / 4
# What a row of the page takes beside its sound: picture, names and figures.
ROW_BYTES = 7000
# About what ogg() makes of stereo music.
BYTES_PER_SECOND = 11_000
# Less of a clip says too little of it; more of one leaves others without.
LEAST_SECONDS, MOST_SECONDS = 5.0, 20.0


class Excerpts:
    """Excerpts of equal length of the first clips, as many as fit a page. ``seconds`` is that length."""

    def __init__(self, page_bytes: float, clips: int) -> None:
        self._left = max(BYTES_PER_CHARACTER * (page_bytes - ROW_BYTES * clips), 0)
        self.seconds = min(max(self._left / BYTES_PER_SECOND / max(clips, 1), LEAST_SECONDS), MOST_SECONDS)

    def of(self, data: bytes) -> bytes:
        """The beginning of an audio file; nothing where libsndfile cannot write it, or once there is no room left."""
        if self._left > 0:
            with contextlib.suppress(soundfile.SoundFileError):
                return ogg(io.BytesIO(with_sizes_repaired(data)), seconds=self.seconds)
        return b""

    def kept(self, sound: bytes) -> bytes:
        """``sound`` where it fits, called clip by clip in their order; after the first that does not fit none does."""
        self._left -= len(sound)
        if self._left < 0:
            self._left = 0
            return b""
        return sound
