"""Find clips of the same recording: equal bytes, or nearly equal spectra."""

import numpy as np

from sa3dist.inspection.clip import InspectedClip
from sa3dist.inspection.measure import fingerprint_distance_db

# Measured on 90 drum recordings and 96 synthesised clips: copies as mp3, ogg, at half the sample rate or another level
# differ by less than 3.2 dB (99 % less than 2.3); the two closest different recordings of similar length by 3.3 dB.
NEAR_DUPLICATE_DB = 2.5
# Seconds, and share of the length. Codecs add about 50 ms of padding; a larger difference is a different cut.
LENGTH_TOLERANCE = (0.05, 0.02)
# Clips compared at once with all others of similar length: 100,000 of one length take 100 MB.
PAIR_BLOCK = 256


def exact_duplicates(clips: list[InspectedClip]) -> list[list[str]]:
    """Groups of keys, two or more each, whose audio bytes are equal."""
    groups: dict[str, list[str]] = {}
    for clip in clips:
        groups.setdefault(clip.audio_sha256, []).append(clip.key)
    return [keys for keys in groups.values() if len(keys) > 1]


def near_duplicates(clips: list[InspectedClip]) -> list[tuple[str, str, float]]:
    """(key, key, distance in dB) of clips of similar length with similar fingerprints, nearest first.

    Finds the same recording at another level, sample rate, format or channel count, but not cut differently. Excludes
    equal bytes, which ``exact_duplicates`` finds.
    """
    if len(clips) < 2:
        return []
    ordered = sorted(clips, key=lambda clip: clip.seconds)
    seconds = np.array([clip.seconds for clip in ordered])
    prints = np.stack([clip.stats.fingerprint for clip in ordered])
    squares = (prints**2).sum(axis=1)
    ends = np.searchsorted(seconds, seconds + np.maximum(LENGTH_TOLERANCE[0], LENGTH_TOLERANCE[1] * seconds), "right")
    pairs = []
    for start in range(0, len(ordered), PAIR_BLOCK):
        rows = range(start, min(start + PAIR_BLOCK, len(ordered)))
        near = slice(start, ends[rows[-1]])
        squared = squares[rows, None] + squares[None, near] - 2 * prints[rows] @ prints[near].T
        for row, column in np.argwhere(squared < prints.shape[1] * NEAR_DUPLICATE_DB**2):
            one, other = ordered[start + row], ordered[start + column]
            if row < column < ends[start + row] - start and one.audio_sha256 != other.audio_sha256:
                distance = fingerprint_distance_db(one.stats.fingerprint, other.stats.fingerprint)
                pairs.append((*sorted((one.key, other.key)), distance))
    return sorted(pairs, key=lambda pair: pair[2])
