"""DeepSpeed imported once, for all ranks that are then forked: each would take seconds for it."""

import pytest


def import_deepspeed():
    """For a fixture of module scope; skips where it is not installed. Returns the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        found = pytest.importorskip("deepspeed")
        # What its engines import late.
        for late in ("runtime.zero.muon.muon_optimizer", "runtime.superoffload.superoffload_stage3"):
            pytest.importorskip(f"deepspeed.{late}")
    found.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return found
