"""The generator of every random draw, from (seed, purpose, sample slot) alone: the same on any rank or worker."""

import hashlib

import torch


def generator_for(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """CPU generator of one draw.

    seed      the run's seed
    purpose   what is drawn, e.g. "noise"; two purposes never share a stream
    indices   the global sample slot, and an attempt where a draw can be repeated

    A hash, not a sum, joins the parts: neighbouring seeds and slots get unrelated states.
    """
    name = "/".join([str(seed), purpose, *map(str, indices)])
    state = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(state)
