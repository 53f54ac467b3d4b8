"""Write generated audio: FLAC and WAV, and MP3 and OGG where libsndfile can.

Legend: C channels, N samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sa3dist.errors import ConfigError, EnvironmentFailure
from sa3dist.formats import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

# libsndfile's container and encoding by suffix. 24 bits, because rounding to 16 would be audible in quiet endings.
FORMATS = {
    "flac": ("FLAC", "PCM_24"),
    "wav": ("WAV", "PCM_24"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
}
# libsndfile's Vorbis encoder uses stack in proportion to the size of a write.
BLOCK_SAMPLES = 1 << 16


def check_format(suffix: str) -> None:
    """Raises ConfigError if the installed libsndfile cannot write files of this suffix."""
    import soundfile

    container, subtype = FORMATS[suffix]
    if container not in soundfile.available_formats() or subtype not in soundfile.available_subtypes(container):
        version = soundfile.__libsndfile_version__
        raise ConfigError(f"format: libsndfile {version} does not write {suffix}; choose flac or wav")


def write_audio(path: Path, audio_CN: Tensor, rate: int) -> None:
    """Write float audio within -1 .. 1 in the format of the suffix, atomically.

    Raises EnvironmentFailure if it is not finite, which libsndfile cannot write.
    """
    import soundfile

    if not audio_CN.isfinite().all():
        raise EnvironmentFailure(
            f"{path}: the audio is not finite; a lower strength or guidance scale, or a wider precision may help"
        )

    container, subtype = FORMATS[path.suffix[1:]]
    audio_NC = audio_CN.t().contiguous().numpy()
    with (
        atomic_path(path) as temporary,
        soundfile.SoundFile(temporary, "w", rate, audio_NC.shape[1], subtype, format=container) as file,
    ):
        for begin in range(0, len(audio_NC), BLOCK_SAMPLES):
            file.write(audio_NC[begin : begin + BLOCK_SAMPLES])
