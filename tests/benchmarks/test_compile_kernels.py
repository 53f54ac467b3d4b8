"""Kernels compile for GPUs that are not there, and the check finds those that spill or do not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"

# The launch of the raw sums that needs most, for an RTX 40: as planned, with few registers, and as planned for an H100.
CASES = """
import json
import compile_kernels as ck

def widest(shared):
    variants = ck.sums_variants("bf16", 32, shared)
    return next(each for each in variants if each.label == "raw_sums_kernel: 387 tokens, 1536 to 12288, bora")

ours, larger = widest(ck.SHARED_BYTES[89]), widest(ck.SHARED_BYTES[90])
cases = ours, ours._replace(constants=ours.constants | {"maxnreg": 64}), larger
used = [ck.compiled(variant, "bf16", "bf16", 89) for variant in cases]
print(json.dumps([(*each, ck.is_fault(each, 89)) for each in used]))
"""


def run(*arguments):
    # The other tests of this process run the kernels in Triton's interpreter, which cannot compile them.
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(BENCHMARKS)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def test_spilled_registers_and_too_much_shared_memory_are_faults():
    done = run("-c", CASES)
    assert done.returncode == 0, done.stderr
    (_, spilled, shared, fault), (registers, *_, spills), (*_, larger, does_not_fit) = json.loads(done.stdout)
    assert (spilled, fault) == (0, False)
    assert registers == 64
    assert spills
    assert shared <= 99 << 10 < larger
    assert does_not_fit


def test_kernels_that_no_rank_enters_compile_for_every_card():
    done = run(BENCHMARKS / "compile_kernels.py", "--format", "bf16", "--rank")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:3] for line in done.stdout.splitlines()] == ["8.9", "9.0", "12."]
    assert all(line.endswith("0 faults") for line in done.stdout.splitlines())
