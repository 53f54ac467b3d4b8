"""Where the source tree and its recorded tensors are, and how many threads tests compute with."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
TINY_MODELS = ("tiny-sa3", "tiny-sa3-small")
# Tiny tensors: a second thread only waits for the first, for milliseconds per operation on a busy machine.
THREADS = int(os.environ.get("SA3DIST_TEST_THREADS", "1"))


def golden(name: str) -> Path:
    """Path of one recorded artefact."""
    return GOLDEN / name
