"""Encode clips as OGG Vorbis, small enough to embed in a page."""

import io
from pathlib import Path

import soundfile

from sa3dist.formats import ClipEntry, DatasetIndex

# On libsndfile's scale from 0 (largest file) to 1: about 90 kbit/s for stereo music.
COMPRESSION = 0.75
# libsndfile's Vorbis encoder uses stack in proportion to the block size.
BLOCK_SAMPLES = 1 << 16


def ogg(source: Path | io.BytesIO, begin_seconds: float = 0.0, seconds: float | None = None) -> bytes:
    """The clip, or ``seconds`` of it from ``begin_seconds`` on, as OGG Vorbis; at most the first two channels.

    Raises soundfile.SoundFileError if libsndfile cannot read it.
    """
    written = io.BytesIO()
    with soundfile.SoundFile(source) as clip:
        rate = clip.samplerate
        first = min(round(max(begin_seconds, 0.0) * rate), clip.frames)
        left = clip.frames - first if seconds is None else min(round(seconds * rate), clip.frames - first)
        clip.seek(first)
        channels = min(clip.channels, 2)
        with soundfile.SoundFile(
            written, "w", rate, channels, "VORBIS", format="OGG", compression_level=COMPRESSION
        ) as out:
            while left > 0:
                block_NC = clip.read(min(BLOCK_SAMPLES, left), dtype="float32", always_2d=True)
                if not len(block_NC):
                    break
                out.write(block_NC[:, :channels])
                left -= len(block_NC)
    return written.getvalue()


def training_clip(index: DatasetIndex, clip: ClipEntry) -> io.BytesIO:
    """The original audio file of a clip. Raises OSError if its shard is missing."""
    with (index.directory / clip.shard).open("rb") as shard:
        shard.seek(clip.audio_offset)
        return io.BytesIO(shard.read(clip.audio_bytes))
