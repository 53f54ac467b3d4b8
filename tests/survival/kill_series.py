"""SIGKILL at random moments, again and again: the file that comes out is the undisturbed run's, bit for bit.

    python tests/survival/kill_series.py DIRECTORY [--runs 25] [--processes 2] [--seed 0] [--steps 24] [--launcher]
    python tests/survival/kill_series.py DIRECTORY --elastic [--runs 5]

Each run is killed one to three times: a random rank, or every process of it as a power cut would, at a random moment of
start and preparation, in a step, or inside a save. The same command starts it again, as a scheduler would. Checked:
no step is missing or logged twice; each restart resumes from the newest intact checkpoint; whatever is left of a killed
run ends within 60 s with one message; the final file equals the undisturbed one. Ranks are forked from this process,
which has imported the program and stands in for the launch agent; with --launcher they come of launch/local.sh, with
torchrun above them, and a start takes seconds longer. With --elastic a run goes 2, 1, 4, 2
processes, killed after each of the first three, and its float32 state is held to 1e-5 of a straight run's.
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
from pathlib import Path

from trial import (
    ForkedTrial,
    Trial,
    local,
    newest_intact,
    own_lines,
    percentile,
    prepare,
    rows,
    send,
    status,
    unfinished,
    wait_for,
)

SAVE_EVERY = 4
# A dead rank's peers and launch agent have this long.
END_SECONDS = 60.0
ELASTIC = (2, 1, 4, 2)
ELASTIC_TOLERANCE = 1e-5


def metrics_file(output_dir: Path) -> int | None:
    path = output_dir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def digest(output_dir: Path) -> str:
    return hashlib.sha256((output_dir / "lora.safetensors").read_bytes()).hexdigest()


def wait_until(trial: Trial | ForkedTrial, what: str, true) -> None:
    """Wait for a moment of a trial; returns early when the trial ends before it."""
    wait_for(what, lambda: true() or trial.ended(), poll=0.0005)


def kill(trial: Trial | ForkedTrial, victim: str) -> bool:
    """Whether anything was there to be killed."""
    if victim == "all":
        there = not trial.ended()
        trial.kill_all()
        return there
    return send(trial.ranks().get(int(victim), -1), signal.SIGKILL) if victim.isdigit() and trial.ranks() else False


class Series:
    """All runs of one series and what was seen of them."""

    # When a run is killed, one drawn for each; "start" comes before its ranks can be told apart.
    MOMENTS = ("start", "step", "step", "save", "save")

    def __init__(self, directory: Path, processes: int, seed: int, steps: int, launcher: bool) -> None:
        self.directory, self.processes, self.steps, self.launcher = directory, processes, steps, launcher
        self.words = prepare(directory) | {"number_of_steps": steps, "save_every": SAVE_EVERY}
        self.draw = random.Random(seed)
        self.kills: list[dict] = []

    def start(self, output_dir: Path, attempt: int, **changes) -> Trial | ForkedTrial:
        words = self.words | {"output_dir": output_dir} | changes
        processes = words.pop("processes", self.processes)
        log = output_dir.with_name(f"{output_dir.name}-{attempt}.log")
        if self.launcher:
            return Trial(local(words, processes), output_dir, log)
        return ForkedTrial(words, processes, output_dir, log, as_agent=self.draw.random() < 0.5)

    def undisturbed(self, **changes) -> Path:
        output_dir = self.directory / "undisturbed"
        shutil.rmtree(output_dir, ignore_errors=True)
        assert self.start(output_dir, 0, **changes).wait() == 0
        return output_dir

    def reach(self, trial: Trial | ForkedTrial, moment: str, first_step: int, before: int | None) -> None:
        """Wait until the run is in the given phase, and a random time more.

        before   which file an earlier start left as metrics.jsonl
        """
        if moment == "start":
            time.sleep(self.draw.uniform(0, 3))
            return
        wait_until(trial, "training", lambda: metrics_file(trial.output_dir) not in (None, before))
        if moment == "save":
            aim = min(self.steps, (first_step // SAVE_EVERY + self.draw.randint(1, 3)) * SAVE_EVERY)
            wait_until(trial, f"step {aim}", lambda: len(rows(trial.output_dir)) >= aim)
            earlier = unfinished(trial.output_dir)
            wait_until(trial, "a save", lambda: unfinished(trial.output_dir) - earlier)
            time.sleep(self.draw.uniform(0, 0.008))
        else:
            # The kill before may have come when the last step was saved.
            aim = self.draw.randint(min(first_step + 1, self.steps), self.steps)
            wait_until(trial, f"step {aim}", lambda: len(rows(trial.output_dir)) >= aim)
            time.sleep(self.draw.uniform(0, 0.2))

    def disturb(self, output_dir: Path, attempt: int, moment: str, victim: str, **changes) -> bool:
        """One start that is killed. Returns whether it ended before it could be."""
        saved, before, torn = newest_intact(output_dir), metrics_file(output_dir), unfinished(output_dir)
        trial = self.start(output_dir, attempt, **changes)
        self.reach(trial, moment, saved, before)
        killed_at = time.monotonic()
        killed = kill(trial, victim)
        code = trial.wait(END_SECONDS)
        seconds = time.monotonic() - killed_at
        assert not trial.leftovers(), f"{trial.log}: processes left behind"
        if not killed:
            return code == 0
        self.check_restart(output_dir, saved, before)
        said = status(output_dir).get("message", "")
        self.kills.append(
            {
                "moment": moment,
                "victim": victim,
                "in_save": bool(unfinished(output_dir) - torn),
                "resumed_from": saved,
                "saved": newest_intact(output_dir),
                "exit": code,
                "seconds": round(seconds, 2),
                "message": said,
                "lines": own_lines(trial.log),
            }
        )
        return False

    def check_restart(self, output_dir: Path, saved: int, before: int | None) -> None:
        """The first step a start made must follow the newest checkpoint it found.

        before   which file metrics.jsonl was: a start that reaches training replaces it
        """
        if not saved or metrics_file(output_dir) == before:
            return
        made = [row for row in rows(output_dir) if row["step"] > saved]
        if made:
            first = (made[0]["step"], made[0].get("resumed_from"))
            assert first == (saved + 1, saved), f"{output_dir}: went on at {first}, the newest checkpoint was {saved}"

    def finish(self, output_dir: Path, attempt: int, **changes) -> None:
        saved, before = newest_intact(output_dir), metrics_file(output_dir)
        trial = self.start(output_dir, attempt, **changes)
        assert trial.wait() == 0, f"{trial.log}: {trial.log.read_text()}"
        self.check_restart(output_dir, saved, before)
        assert not trial.leftovers()
        assert [row["step"] for row in rows(output_dir)] == list(range(1, self.steps + 1))

    def run(self, number: int) -> dict:
        """One run, killed one to three times, then finished."""
        output_dir = self.directory / f"run-{number:02d}"
        shutil.rmtree(output_dir, ignore_errors=True)
        first_kill = len(self.kills)
        done = False
        for attempt in range(self.draw.randint(1, 3)):
            moment = self.draw.choice(self.MOMENTS)
            victim = self.draw.choice((*map(str, range(self.processes)), "all")) if self.processes > 1 else "all"
            # A start that is killed before its ranks live can only be killed as a whole.
            done = self.disturb(output_dir, attempt, moment, "all" if moment == "start" else victim)
            if done:
                break
        if not done:
            self.finish(output_dir, 9)
        return {"run": number, "kills": self.kills[first_kill:], "sha256": digest(output_dir)}


def plain(series: Series, runs: int) -> dict:
    expected = digest(series.undisturbed())
    outcomes = []
    for number in range(runs):
        outcome = series.run(number)
        outcomes.append(outcome)
        told = ", ".join(
            f"{k['victim']}@{k['moment']}{'!' if k['in_save'] else ''}->{k['saved']}" for k in outcome["kills"]
        )
        print(f"run {number:2d}  {'identical' if outcome['sha256'] == expected else 'DIFFERENT'}  {told}", flush=True)
    identical = sum(outcome["sha256"] == expected for outcome in outcomes)
    return {"identical": identical, "runs": runs} | figures(series.kills)


def figures(kills: list[dict]) -> dict:
    partial = [kill for kill in kills if kill["victim"] != "all"]
    seconds = [kill["seconds"] for kill in partial]
    return {
        "kills": len(kills),
        "kills_inside_a_save": sum(kill["in_save"] for kill in kills),
        "kills_of_one_rank": len(partial),
        "restarts_after_a_save": sum(kill["saved"] > 0 for kill in kills),
        "end_seconds_median": percentile(seconds, 0.5) if seconds else None,
        "end_seconds_worst": max(seconds, default=None),
        "exits_of_one_rank": sorted({kill["exit"] for kill in partial}),
        "messages_of_one_rank": sorted({kill["message"] for kill in partial}),
        "most_lines_on_stderr": max((len(kill["lines"]) for kill in partial), default=0),
    }


def difference(one: Path, other: Path, steps: int) -> float:
    """Largest relative Frobenius distance of any adapter tensor or moment between two runs' last checkpoints."""
    import torch

    from sa3dist.training import checkpoint

    first, second = (checkpoint.find(path, "auto") for path in (one, other))
    assert first.step == second.step == steps
    pairs = [(first.adapters, second.adapters)] + [(first.moments[m], second.moments[m]) for m in first.moments]
    worst = 0.0
    for a, b in pairs:
        assert a.keys() == b.keys()
        for name in a:
            norm = torch.linalg.vector_norm(a[name].double())
            if norm > 0:
                worst = max(worst, float(torch.linalg.vector_norm(a[name].double() - b[name].double()) / norm))
    return worst


def elastic(series: Series, runs: int) -> dict:
    reference = series.undisturbed(processes=ELASTIC[0], global_batch_size=4)
    worst = []
    for number in range(runs):
        output_dir = series.directory / f"elastic-{number}"
        shutil.rmtree(output_dir, ignore_errors=True)
        for attempt, processes in enumerate(ELASTIC[:-1]):
            victim = series.draw.choice((*map(str, range(processes)), "all")) if processes > 1 else "all"
            words = {"processes": processes, "global_batch_size": 4}
            for _ in range(5):
                ended = disturb_after_a_save(series, output_dir, attempt, victim, words)
                if ended:
                    break
        series.finish(output_dir, 9, processes=ELASTIC[-1], global_batch_size=4)
        worst.append(difference(reference, output_dir, series.steps))
        told = ", ".join(str(row["resumed_from"]) for row in rows(output_dir) if "resumed_from" in row)
        print(f"elastic {number}  state differs by {worst[-1]:.1e}  resumed from {told}", flush=True)
    return {"runs": runs, "worst_difference": max(worst), "within": max(worst) <= ELASTIC_TOLERANCE} | figures(
        series.kills
    )


def disturb_after_a_save(series: Series, output_dir: Path, attempt: int, victim: str, words: dict) -> bool:
    """Kill within the four steps after the next save, so that each world size leaves a checkpoint of its own."""
    saved, before, torn = newest_intact(output_dir), metrics_file(output_dir), unfinished(output_dir)
    trial = series.start(output_dir, attempt, **words)
    wait_until(trial, "a checkpoint", lambda: newest_named(output_dir) > saved)
    time.sleep(series.draw.uniform(0, 0.5))
    began = time.monotonic()
    assert kill(trial, victim), f"{trial.log}: ended before it was killed"
    code = trial.wait(END_SECONDS)
    assert not trial.leftovers()
    series.check_restart(output_dir, saved, before)
    found = newest_intact(output_dir)
    said = status(output_dir).get("message", "")
    series.kills.append(
        {
            "moment": "step",
            "victim": victim,
            "in_save": bool(unfinished(output_dir) - torn),
            "resumed_from": saved,
            "saved": found,
        }
        | {"exit": code, "seconds": round(time.monotonic() - began, 2), "message": said, "lines": own_lines(trial.log)}
    )
    return found > saved


def newest_named(output_dir: Path) -> int:
    return max((int(path.name[5:]) for path in (output_dir / "checkpoints").glob("step-*")), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--launcher", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    series = Series(options.directory.resolve(), options.processes, options.seed, options.steps, options.launcher)
    found = (elastic if options.elastic else plain)(series, options.runs)
    found |= {
        "processes": options.processes,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "cores": os.cpu_count(),
    }
    print(json.dumps(found, indent=1))
    (options.directory / "kills.json").write_text(json.dumps(series.kills, indent=1))
    return 0 if found.get("within", found.get("identical") == found["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
