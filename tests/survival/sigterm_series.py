"""SIGTERM at random moments to one rank, to the launcher, and to PID 1 of a container: exit 75, soon, resumable.

    python tests/survival/sigterm_series.py DIRECTORY [--target rank|launcher|pid1 ...] [--phase PHASE ...]
                                            [--runs 25] [--steps 40] [--clips 24]

`rank` forks two ranks from this process, which has imported the program and acts as torchrun does: when one ends it
TERMs the other. `launcher` starts launch/local.sh with two processes. `pid1` starts launch/local.sh, the image's entry
point, as the first process of a process namespace, as Docker and Kubernetes do (needs root); odd runs with one process,
even ones with two. The moments are spread over preparation, encoding (with empty caches), steps, saves, and steps that
encode what they need, with loader processes. Checked: the launcher's code and status.json say 75, the checkpoint of the
step they name is intact, nothing is left running; every third run is started again and must finish with the file of an
undisturbed run.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from trial import (
    ForkedTrial,
    Trial,
    local,
    newest_intact,
    own_lines,
    parent_of,
    percentile,
    prepare,
    rows,
    send,
    status,
    unfinished,
    wait_for,
)

TARGETS = ("rank", "launcher", "pid1")
PHASES = ("preparation", "encode", "step", "save", "first use")
# Enough that checking and encoding take seconds.
CLIPS, STEPS, SAVE_EVERY = 24, 40, 4
# No signal within as many steps of the last: the run must not be over before it can answer.
LAST_STEPS = 16
RESUME_EVERY = 3
CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


class Series:
    def __init__(self, directory: Path, seed: int, clips: int, steps: int) -> None:
        self.directory, self.steps = directory, steps
        self.words = prepare(directory, clips) | {"number_of_steps": steps, "save_every": SAVE_EVERY}
        self.draw = random.Random(seed)
        self._undisturbed: dict[int, str] = {}

    def start(self, output_dir: Path, name: str, processes: int, target: str, **changes) -> Trial | ForkedTrial:
        words, log = self.words | {"output_dir": output_dir} | changes, self.directory / f"{name}.log"
        if target == "rank":
            return ForkedTrial(words, processes, output_dir, log, as_agent=True)
        return Trial((CONTAINER if target == "pid1" else []) + local(words, processes), output_dir, log)

    def undisturbed(self, processes: int) -> str:
        if processes not in self._undisturbed:
            output_dir = self.directory / f"undisturbed-{processes}"
            shutil.rmtree(output_dir, ignore_errors=True)
            trial = self.start(output_dir, output_dir.name, processes, "rank")
            assert trial.wait() == 0, trial.log.read_text()
            self._undisturbed[processes] = digest(output_dir)
        return self._undisturbed[processes]

    def reach(self, trial: Trial | ForkedTrial, phase: str) -> None:
        """Wait for a random moment of the phase."""
        text = {"preparation": "check clips", "encode": "encode ", "first use": f"training {self.steps} steps"}.get(
            phase
        )
        if text:
            wait_for(phase, lambda: text in trial.said() or trial.ended())
            time.sleep(self.draw.uniform(0, 1.0))
            return
        aim = self.draw.randint(1, self.steps - LAST_STEPS)
        wait_for(f"step {aim}", lambda: len(rows(trial.output_dir)) >= aim or trial.ended())
        if phase == "save":
            wait_for("a save", lambda: unfinished(trial.output_dir) or trial.ended(), poll=0.0005)
            time.sleep(self.draw.uniform(0, 0.008))
        else:
            time.sleep(self.draw.uniform(0, 0.2))

    def signal_target(self, trial: Trial | ForkedTrial, target: str) -> None:
        if target == "rank":
            pid = self.draw.choice(sorted(trial.ranks().values()))
        elif target == "launcher":
            pid = trial.process.pid
        else:
            pid = next(pid for pid in trial.processes() if parent_of(pid) == trial.process.pid)
        assert send(pid, signal.SIGTERM), f"{trial.log}: ended before the signal"

    def run(self, target: str, number: int, phase: str) -> dict:
        processes = 1 if target == "pid1" and number % 2 else 2
        name = f"{target}-{number:02d}"
        output_dir, work_dir = self.directory / name, self.directory / f"{name}-work"
        for path in (output_dir, work_dir):
            shutil.rmtree(path, ignore_errors=True)
        # Encoded clips are found again: only these phases need all stages.
        work = {} if phase in ("step", "save") else {"work_dir": work_dir}
        if phase == "first use":
            work |= {"pre_encode": "false", "num_workers": 2}
        trial = self.start(output_dir, name, processes, target, **work)
        self.reach(trial, phase)
        self.signal_target(trial, target)
        asked = time.monotonic()
        code = trial.wait(90)
        seconds = time.monotonic() - asked
        said = status(output_dir)
        outcome = {"target": target, "phase": phase, "exit": code, "status": said, "seconds": round(seconds, 2)}
        outcome |= {"left_running": len(trial.leftovers()), "lines": own_lines(trial.log)}
        outcome["state_intact"] = newest_intact(output_dir) == said.get("step")
        if number % RESUME_EVERY == 0:
            expected = self.undisturbed(processes)
            again = self.start(output_dir, f"{name}-again", processes, target, **work)
            outcome["resumed_identical"] = again.wait() == 0 and digest(output_dir) == expected
        shutil.rmtree(work_dir, ignore_errors=True)
        return outcome


def digest(output_dir: Path) -> str:
    return hashlib.sha256((output_dir / "lora.safetensors").read_bytes()).hexdigest()


def as_promised(outcome: dict) -> bool:
    said = outcome["status"]
    return (
        (outcome["exit"], said.get("exit_code"), said.get("state")) == (75, 75, "interrupted")
        and outcome["state_intact"]
        and not outcome["left_running"]
        and outcome.get("resumed_identical", True)
    )


def summary(outcomes: list[dict]) -> dict:
    seconds = [outcome["seconds"] for outcome in outcomes]
    messages = Counter(
        outcome["status"].get("message", "").split(";")[0].rstrip("0123456789, ") for outcome in outcomes
    )
    return {
        "as_promised": sum(map(as_promised, outcomes)),
        "runs": len(outcomes),
        "resumed_identical": sum(outcome.get("resumed_identical", False) for outcome in outcomes),
        "seconds_median": percentile(seconds, 0.5),
        "seconds_worst": max(seconds),
        "most_lines_on_stderr": max(len(outcome["lines"]) for outcome in outcomes),
        "messages": dict(messages),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--phase", choices=PHASES, action="append", help="default: all in turn")
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clips", type=int, default=CLIPS)
    options = parser.parse_args()
    series = Series(options.directory.resolve(), options.seed, options.clips, options.steps)
    failed, found, phases = 0, {"cores": os.cpu_count()}, options.phase or PHASES
    for target in options.target or TARGETS:
        outcomes = []
        for number in range(options.runs):
            outcomes.append(series.run(target, number, phases[number % len(phases)]))
            last = outcomes[-1]
            failed += not as_promised(last)
            if not as_promised(last):
                print(json.dumps(last), flush=True)
            print(f"{target:8s} {number:2d} {last['phase']:11s} {last['exit']} {last['seconds']:6.2f} s", flush=True)
        found[target] = summary(outcomes)
    print(json.dumps(found, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
