"""Statistics of clips (loudness, peak, spectrogram, ...) and the file that stores them between runs.

Suffixes: N clips, W spectrogram columns of all clips concatenated, S bands, P columns of one, K fingerprint values.
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
    """Measurements of one clip.

    lufs            integrated loudness (ITU-R BS.1770-4); -inf if all is gated; ungated below 400 ms
    peak_dbfs       largest sample, dB full scale
    silent_share    share of 100 ms pieces below -60 dBFS, the limit that training uses
    lead_seconds, tail_seconds   silence before and after the sound
    clipped_samples   samples at full scale between two others at full scale
    spectrogram_SP  float32 dB, 64 bands from 40 Hz to 16 kHz by pieces of 100 ms; a long clip has 47, evenly spread
    fingerprint     float32, level-independent spectrum over time; compare with ``fingerprint_distance_db``
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
# Increase it when clips are measured differently.
VERSION = "3"
_FACTS = ("digests_N32", "facts_N4")
SCALARS = tuple(field.name for field in dataclasses.fields(ClipStats)[:6])
_STATS = ("scalars_N6", "widths_N", "spectrograms_SW", "fingerprints_NK")

# SHA-256 of the audio bytes, and their number.
Key = tuple[str, int]
Measured = dict[Key, tuple[AudioFacts, ClipStats]]


def read_facts(work_dir: Path) -> dict[Key, AudioFacts]:
    """Audio facts of clips measured earlier; empty if the file is missing or damaged."""
    arrays = _read(Path(work_dir) / NAME, _FACTS)
    return {} if arrays is None else _facts(*arrays)


def read_stats(work_dir: Path) -> Measured:
    """Clips measured earlier; empty if the file is missing, damaged, or of another version."""
    arrays = _read(Path(work_dir) / NAME, _FACTS + _STATS)
    if arrays is None:
        return {}
    digests_N32, facts_N4, scalars_N6, widths_N, spectrograms_SW, fingerprints_NK = arrays
    spectrograms = np.split(spectrograms_SW, np.cumsum(widths_N)[:-1], axis=1)
    rows = zip(scalars_N6.tolist(), spectrograms, fingerprints_NK, strict=True)
    stats = [ClipStats(*scalars[:5], int(scalars[5]), *pictures) for scalars, *pictures in rows]
    facts_by_key = _facts(digests_N32, facts_N4)
    return {key: (facts, clip) for (key, facts), clip in zip(facts_by_key.items(), stats, strict=True)}


def write_stats(work_dir: Path, measured: Measured) -> None:
    """Replace the file's content by ``measured``. Only warns if the disk is full or read-only."""
    keys = sorted(measured)
    facts, stats = zip(*(measured[key] for key in keys), strict=True)
    arrays = {
        "digests_N32": np.array([list(bytes.fromhex(digest)) for digest, _ in keys], np.uint8),
        "facts_N4": np.array(
            [(size, *dataclasses.astuple(one)) for (_, size), one in zip(keys, facts, strict=True)], np.int64
        ),
        "scalars_N6": np.array([[getattr(clip, name) for name in SCALARS] for clip in stats], np.float64),
        "widths_N": np.array([clip.spectrogram_SP.shape[1] for clip in stats], np.int64),
        "spectrograms_SW": np.concatenate([clip.spectrogram_SP for clip in stats], axis=1),
        "fingerprints_NK": np.stack([clip.fingerprint for clip in stats]),
    }
    metadata = {name: _digest(array) for name, array in arrays.items()} | {"version": VERSION}
    try:
        write_whole(Path(work_dir) / NAME, save(arrays, metadata=metadata))
    except OSError as error:
        log.warning("%s: cannot store the statistics of the clips (%s)", work_dir, error.strerror or error)


def _facts(digests_N32: np.ndarray, facts_N4: np.ndarray) -> dict[Key, AudioFacts]:
    rows = zip(digests_N32, facts_N4.tolist(), strict=True)
    return {(digest.tobytes().hex(), size): AudioFacts(*facts) for digest, (size, *facts) in rows}


def _read(path: Path, names: tuple[str, ...]) -> list[np.ndarray] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        log.warning("%s: unreadable (%s), measuring again", path, error)
        return None
    digests_fit = all(metadata.get(name) == _digest(array) for name, array in zip(names, arrays, strict=True))
    if metadata.get("version") != VERSION or not digests_fit:
        log.warning("%s: damaged or of another version, measuring again", path)
        return None
    return arrays


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
