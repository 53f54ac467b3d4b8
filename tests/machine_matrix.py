"""Run the suite as other machines would: other numbers of threads, other instructions, a processor that is busy.

    .venv/bin/python tests/machine_matrix.py                       every setting that this processor has, whole suite
    .venv/bin/python tests/machine_matrix.py --list                what would be run, and what not, and why
    .venv/bin/python tests/machine_matrix.py --only threads=8 aten=default -- tests/model/test_dit.py

One setting at a time, the whole suite each, some ten minutes each on two idle cores: no part of `make test` or CI. What
comes after `--` goes to pytest in place of the Makefile's options. Ends with 1 when any test failed under any setting.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUITE = ["--numprocesses", "2", "--dist", "loadfile"]
INTEL = "GenuineIntel"
# Threads that wait by spinning, more of them than cores, take each other's time.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Setting:
    """environment: what is set    needs: flags of /proc/cpuinfo    vendor, other_than: whose processors heed it"""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    vendor: str = ""
    other_than: str = ""
    busy: bool = False


SETTINGS = (
    Setting("threads=1"),
    Setting("threads=2", {"SA3DIST_TEST_THREADS": "2", **PASSIVE}),
    Setting("threads=8", {"SA3DIST_TEST_THREADS": "8", **PASSIVE}),
    Setting("aten=default", {"ATEN_CPU_CAPABILITY": "default"}),
    Setting("aten=avx2", {"ATEN_CPU_CAPABILITY": "avx2"}, ("avx2", "fma")),
    Setting("aten=avx512", {"ATEN_CPU_CAPABILITY": "avx512"}, ("avx512f", "avx512bw", "avx512dq", "avx512vl")),
    Setting("mkl=sse4_2", {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, ("sse4_2",), vendor=INTEL),
    Setting("mkl=avx2", {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, ("avx2",), vendor=INTEL),
    # On others MKL passes that variable over, but not this one.
    Setting("mkl=compatible", {"MKL_CBWR": "COMPATIBLE"}, ("sse2",), other_than=INTEL),
    Setting("onednn=avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, ("avx2",)),
    Setting("onednn=avx512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, ("avx512f", "avx512bw", "avx512dq", "avx512vl")),
    Setting("busy", busy=True),
)


def processor() -> tuple[str, set[str]]:
    """Vendor and flags of this processor; nothing where the system does not tell."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "", set()
    found = {name: re.search(rf"^{name}\s*: (.*)$", told, re.MULTILINE) for name in ("vendor_id", "flags")}
    vendor, flags = (match.group(1) if match else "" for match in found.values())
    return vendor, set(flags.split())


def missing(setting: Setting, vendor: str, flags: set[str]) -> str:
    """Why a setting would try nothing on this processor; empty where it would."""
    if lacking := [flag for flag in setting.needs if flag not in flags]:
        return f"this processor has no {', '.join(lacking)}"
    if (setting.vendor and vendor != setting.vendor) or (setting.other_than and vendor == setting.other_than):
        return f"has no effect on a processor of {vendor or 'an unknown vendor'}"
    return ""


def spin() -> None:
    while True:
        pass


def run(setting: Setting, words: list[str]) -> tuple[int, str, float]:
    """Exit code of pytest, its closing lines, and seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    spinning = multiprocessing.Process(target=spin, daemon=True) if setting.busy else None
    if spinning:
        spinning.start()
        command = ["nice", "-n", "10", *command]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | setting.environment, capture_output=True, text=True)
    finally:
        if spinning:
            spinning.kill()
    lines = (done.stdout + done.stderr).strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, "\n".join([*failed, *lines[-1:]]), time.monotonic() - began


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--list", action="store_true", help="run nothing")
    asked.add_argument("--only", nargs="+", metavar="NAME", choices=[setting.name for setting in SETTINGS])
    words = sys.argv[1:]
    position = words.index("--") if "--" in words else len(words)
    options, suite = asked.parse_args(words[:position]), words[position + 1 :] or SUITE
    vendor, flags = processor()
    failed = []
    for setting in SETTINGS:
        if options.only and setting.name not in options.only:
            continue
        variables = " ".join(f"{name}={value}" for name, value in setting.environment.items())
        if reason := missing(setting, vendor, flags):
            print(f"{setting.name:16} not run ({variables}): {reason}")
            continue
        if options.list:
            print(f"{setting.name:16} {variables or ('nice, beside a busy core' if setting.busy else 'as it is')}")
            continue
        code, said, seconds = run(setting, suite)
        print(f"{setting.name:16} {'passed' if code == 0 else 'FAILED'} in {seconds:.0f} s\n{said}", flush=True)
        if code:
            failed.append(setting.name)
    if failed:
        print(f"failed under: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
