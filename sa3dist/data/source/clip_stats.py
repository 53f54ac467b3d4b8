"""Statistics of clips (loudness, peak, spectrogram, ...) and the file that keeps them between runs.

Suffixes: N clips, W pieces of all their spectrograms in turn, S bands, K values of a fingerprint.
"""

import dataclasses
import hashlib
import logging
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sa3dist.data.source.audio import AudioFacts
from sa3dist.formats import write_whole

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ClipStats:
    """What is measured in one clip.

    lufs            integrated loudness (ITU-R BS.1770-4), -inf when all of it is gated away; ungated below 400 ms
    peak_dbfs       largest sample, dB full scale
    silent_share    share of 100 ms pieces that stay below -60 dBFS, training's own limit
    lead_seconds, tail_seconds   silence before and after the sound
    clipped_samples   samples at full scale between two others at full scale
    spectrogram_SP  float32 dB, 64 bands from 40 Hz to 16 kHz by pieces of 100 ms, 47 of them spread over a longer clip
    fingerprint     float32: level-free picture of the spectrum over time, compare with ``fingerprint_distance_db``
    """

    lufs: float
    peak_dbfs: float
    silent_share: float
    lead_seconds: float
    tail_seconds: float
    clipped_samples: int
    spectrogram_SP: np.ndarray
    fingerprint: np.ndarray


NAME = "figures.safetensors"
# Increase it when the way clips are measured changes.
VERSION = "3"
_FACTS = ("digests_N32", "facts_N4")
SCALARS = tuple(field.name for field in dataclasses.fields(ClipStats)[:6])
_STATS = ("scalars_N6", "widths_N", "spectrograms_SW", "fingerprints_NK")

# SHA-256 of the audio bytes, and their number.
Key = tuple[str, int]
Measured = dict[Key, tuple[AudioFacts, ClipStats]]


def read_facts(work_dir: Path) -> dict[Key, AudioFacts]:
    """Decode results of clips measured earlier; empty if the file is missing or damaged."""
    arrays = _read(Path(work_dir) / NAME, _FACTS)
    return {} if arrays is None else _facts(*arrays)


def read_stats(work_dir: Path) -> Measured:
    """Stats of clips measured earlier; empty if the file is missing, damaged, or of another version."""
    arrays = _read(Path(work_dir) / NAME, _FACTS + _STATS)
    if arrays is None:
        return {}
    digests_N32, facts_N4, scalars_N6, widths_N, spectrograms_SW, fingerprints_NK = arrays
    pictures = np.split(spectrograms_SW, np.cumsum(widths_N)[:-1], axis=1)
    kept = zip(scalars_N6.tolist(), pictures, fingerprints_NK, strict=True)
    stats = [ClipStats(*values[:5], int(values[5]), picture, print_) for values, picture, print_ in kept]
    return {key: (facts, one) for (key, facts), one in zip(_facts(digests_N32, facts_N4).items(), stats, strict=True)}


def write_stats(work_dir: Path, measured: Measured) -> None:
    """Replace the file by ``measured``. A full or read-only disk gives only a warning."""
    keys = sorted(measured)
    facts, stats = zip(*(measured[key] for key in keys), strict=True)
    arrays = {
        "digests_N32": np.array([list(bytes.fromhex(digest)) for digest, _ in keys], np.uint8),
        "facts_N4": np.array(
            [(size, *dataclasses.astuple(one)) for (_, size), one in zip(keys, facts, strict=True)], np.int64
        ),
        "scalars_N6": np.array([[getattr(one, name) for name in SCALARS] for one in stats], np.float64),
        "widths_N": np.array([one.spectrogram_SP.shape[1] for one in stats], np.int64),
        "spectrograms_SW": np.concatenate([one.spectrogram_SP for one in stats], axis=1),
        "fingerprints_NK": np.stack([one.fingerprint for one in stats]),
    }
    metadata = {name: _digest(array) for name, array in arrays.items()} | {"version": VERSION}
    try:
        write_whole(Path(work_dir) / NAME, save(arrays, metadata=metadata))
    except OSError as error:
        log.warning("%s: the statistics of the clips are not kept (%s)", work_dir, error.strerror or error)


def _facts(digests_N32: np.ndarray, facts_N4: np.ndarray) -> dict[Key, AudioFacts]:
    rows = zip(digests_N32, facts_N4.tolist(), strict=True)
    return {(digest.tobytes().hex(), size): AudioFacts(*facts) for digest, (size, *facts) in rows}


def _read(path: Path, names: tuple[str, ...]) -> list[np.ndarray] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            said = file.metadata() or {}
            arrays = [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        log.warning("%s: unreadable (%s), measuring again", path, error)
        return None
    if said.get("version") != VERSION or any(said.get(n) != _digest(a) for n, a in zip(names, arrays, strict=True)):
        log.warning("%s: damaged or of another version, measuring again", path)
        return None
    return arrays


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
