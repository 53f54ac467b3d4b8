"""What ends a run ends it under DeepSpeed too: a signal to one rank, a killed rank, a loss that is not finite.

    python tests/survival/zero_failures.py DIRECTORY [--stage 2 3] [--case sigterm ...] [--products WORD] [--launcher]

Two ranks on the CPU, forked from this process, which acts as torchrun does, or with --launcher started by
launch/local.sh; DeepSpeed is asked for in their environment. Prints one JSON line per
case: exit code, seconds from the event to the end, what the user is told; a run stopped by a signal is started again
and must finish. Exits with 1 when a code differs, a run takes over 60 s to end, or anything is left running.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

from trial import (
    ROOT,
    ForkedTrial,
    Trial,
    local,
    newest_intact,
    own_lines,
    prepare,
    rows,
    send,
    status,
    wait_for,
    zero_environment,
)

STEPS, EVENT_AT_STEP = 60, 5
EXPECTED = {"sigterm": 75, "sigkill": 70, "not finite": 70}


def start(directory: Path, words: dict, stage: int, name: str, launcher: bool) -> Trial | ForkedTrial:
    output_dir = directory / f"{name}-{stage}".replace(" ", "-")
    file, log = ROOT / "configs" / "deepspeed" / f"zero{stage}.json", output_dir.with_suffix(".log")
    words = words | {"output_dir": output_dir}
    if launcher:
        return Trial(local(words, 2), output_dir, log, zero_environment(file))
    return ForkedTrial(words, 2, output_dir, log, as_agent=True, zero=file)


def happen(trial: Trial | ForkedTrial, case: str) -> float:
    """Bring the event about; returns when."""
    if case == "not finite":
        wait_for("a row or the end", lambda: bool(rows(trial.output_dir)) or trial.ended(), 300)
    else:
        wait_for("the step", lambda: len(rows(trial.output_dir)) >= EVENT_AT_STEP, 300)
        send(trial.ranks()[1], signal.SIGTERM if case == "sigterm" else signal.SIGKILL)
    return time.monotonic()


def run(directory: Path, words: dict, stage: int, case: str, launcher: bool) -> dict:
    changes = {"learning_rate": 1e30} if case == "not finite" else {}
    trial = start(directory, words | changes, stage, case, launcher)
    begin = happen(trial, case)
    code = trial.wait()
    row = {"stage": stage, "case": case, "exit_code": code, "seconds": round(time.monotonic() - begin, 1)}
    row |= {"told": own_lines(trial.log)[-1:], "status": status(trial.output_dir), "left_running": trial.leftovers()}
    ok = code == row["status"].get("exit_code") == EXPECTED[case] and row["seconds"] < 60 and not row["left_running"]
    if case == "sigterm":
        row["resumed_from"] = newest_intact(trial.output_dir)
        again = start(directory, words, stage, case, launcher)
        ok = ok and again.wait(600) == 0 and row["resumed_from"] > 0
        steps = [each["step"] for each in rows(trial.output_dir)]
        ok = ok and steps == list(range(1, STEPS + 1))
    return row | {"ok": ok}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--stage", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--case", choices=EXPECTED, action="append", help="default: all")
    parser.add_argument("--products", default="auto", help="adapter_products of the runs")
    parser.add_argument("--launcher", action="store_true")
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    words = prepare(directory) | {"number_of_steps": STEPS, "save_every": 1000, "adapter_products": arguments.products}
    # What is formed per use is recomputed.
    words["gradient_checkpointing"] = "auto"
    failed = False
    for stage in arguments.stage:
        for case in arguments.case or EXPECTED:
            shutil.rmtree(directory / f"{case}-{stage}".replace(" ", "-"), ignore_errors=True)
            row = run(directory, words, stage, case, arguments.launcher)
            failed = failed or not row["ok"]
            print(json.dumps(row), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
