"""SIGKILL and SIGTERM in runs with previews, validation, health, copies, a tracker, the page and the best adapter on.

    python tests/survival/watched_series.py DIRECTORY [--runs 10] [--processes 2] [--seed 0] [--steps 12] [--terms 6]

As kill_series.py, of which it is made: each run is killed one to three times and started again. The moments are also
those inside a preview, an evaluation, the search for copies and the writing of the page, whose process is killed with
the ranks. Checked beside what kill_series.py checks: the final file is, to the byte, that of an undisturbed run with
everything off; evaluations and the best are those of an undisturbed run with everything on, each once; at no time is
there a file of any kind that is half written under its name, and at the end none under another. Then SIGTERM, by turns
inside a preview, an evaluation and a search: gone with 75 and in time, the page says so, and the run goes on.
"""

import argparse
import json
import mmap
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from kill_series import SAVE_EVERY, Series, digest, figures
from trial import ForkedTrial, newest_intact, rows, send, status, wait_for

HELD_OUT = ["tone/tone_00", "chirp/chirp_01", "drum/drum_02", "noise/noise_03"]
# Seconds after a signal within which a run is gone.
PROMISED_SECONDS = 15.0
# What the main thread says it is doing, and what the thread beside it does.
INSIDE = {"preview": "making previews", "evaluation": "validating", "search": "searching"}
PAGE_PROCESS = b"sa3dist.report.process"
WIDTH = 64


class WatchedTrial(ForkedTrial):
    """Ranks that write what they are doing, and whether they search, to memory that this process shares."""

    def __init__(self, words: dict, processes: int, *where, slow_search: bool = False) -> None:
        self.slow_search = slow_search
        self._said = mmap.mmap(-1, 2 * WIDTH * processes)
        super().__init__(words, processes, *where)

    def in_rank(self, rank: int) -> None:
        from sa3dist.listening.copy_search import Search
        from sa3dist.runtime.liveness import Liveness

        begin, rows_of, check = Liveness.begin, Search.rows, Search.__init__

        def say(place: int, text: str) -> None:
            at = (2 * rank + place) * WIDTH
            self._said[at : at + WIDTH] = text.encode().ljust(WIDTH)

        def say_doing(liveness, doing, step=None):
            say(0, doing)
            begin(liveness, doing, step)

        def say_searching(search, *jobs):
            say(1, "searching")
            yield from rows_of(search, *jobs)
            say(1, "")

        def slow(search, source, frames, look):
            def look_slowly():
                # As in a data set of thousands of clips.
                time.sleep(0.3)
                look()

            check(search, source, frames, look_slowly if self.slow_search else look)

        Liveness.begin, Search.rows, Search.__init__ = say_doing, say_searching, slow

    def is_inside(self, moment: str) -> bool:
        """Whether any rank is in a preview, an evaluation or a search."""
        return INSIDE[moment].encode() in self._said[:]


class WatchedSeries(Series):
    MOMENTS = ("start", "step", "save", "preview", "preview", "evaluation", "evaluation", "search", "page")

    def __init__(self, directory: Path, processes: int, seed: int, steps: int) -> None:
        super().__init__(directory, processes, seed, steps, launcher=False)
        names = ",".join(HELD_OUT)
        self.words |= {"validation": f"[{names}]", "learning_rate": 3e-3, "keep_checkpoints": 9}
        off = {"validation_every": 0, "preview_every": 0, "health": "false", "report": "false", "copy_check": "false"}
        on = {"validation_every": SAVE_EVERY, "preview_every": SAVE_EVERY, "keep_best": "true"}
        on |= {"preview_seconds": 0.5, "preview_steps": 2, "preview_cfg": 1, "preview_prompts": "[a,b]"}
        on |= {"log_with": "tensorboard", "report": "true"}
        self.off, self.on = self.words | off, self.words | on

    def start(self, output_dir: Path, attempt: int, everything: bool = True, **changes) -> WatchedTrial:
        slow_search = changes.pop("slow_search", False)
        words = (self.on if everything else self.off) | {"output_dir": output_dir} | changes
        log = output_dir.with_name(f"{output_dir.name}-{attempt}.log")
        as_agent = self.draw.random() < 0.5
        return WatchedTrial(words, self.processes, output_dir, log, as_agent, slow_search=slow_search)

    def undisturbed(self, everything: bool = True) -> Path:
        output_dir = self.directory / ("watched" if everything else "alone")
        shutil.rmtree(output_dir, ignore_errors=True)
        trial = self.start(output_dir, 0, everything)
        assert trial.wait() == 0, trial.said()
        return output_dir

    def reach(self, trial: WatchedTrial, moment: str, first_step: int, before: int | None) -> None:
        if moment not in (*INSIDE, "page"):
            super().reach(trial, moment, first_step, before)
            return
        # The first ones are of the base.
        aim = self.draw.choice((0, first_step + 1, min(self.steps - 1, first_step + SAVE_EVERY + 1)))
        wait_for(f"step {aim}", lambda: len(rows(trial.output_dir)) >= aim or trial.ended(), poll=0.0005)
        inside = (lambda: bool(page_writers(trial.output_dir))) if moment == "page" else lambda: trial.is_inside(moment)
        wait_for(moment, lambda: inside() or trial.ended(), poll=0.0005)
        time.sleep(self.draw.uniform(0, 0.2))

    def disturb(self, output_dir: Path, attempt: int, moment: str, victim: str, **changes) -> bool:
        ended = super().disturb(output_dir, attempt, moment, victim, **changes)
        if moment == "page":
            # With the machine; otherwise it would write its page to the end.
            for pid in page_writers(output_dir):
                send(pid, signal.SIGKILL)
        check_whole(output_dir)
        return ended

    def run(self, number: int) -> dict:
        outcome = super().run(number)
        self.check_end(self.directory / f"run-{number:02d}")
        return outcome

    def check_end(self, output_dir: Path) -> None:
        """All that the undisturbed run with everything on has left is there, whole and once."""
        wait_for("a page of before", lambda: not page_writers(output_dir))
        check_whole(output_dir, ended=True)
        evaluated = range(0, self.steps + 1, SAVE_EVERY)
        assert [row["step"] for row in evaluations(output_dir)] == list(evaluated)
        assert evaluations(output_dir) == evaluations(self.directory / "watched")
        best = [json.loads((folder / "best.json").read_text()) for folder in (output_dir, self.directory / "watched")]
        assert best[0] == best[1]
        for name in ("health.jsonl", "copies.jsonl"):
            steps = [row["step"] for row in lines(output_dir / name)]
            assert steps == sorted(set(steps)), f"{output_dir / name}: {steps}"
        made = {path.name: len(list(path.glob("*.json"))) for path in (output_dir / "previews").iterdir()}
        assert made == {f"step-{step:08d}": 2 for step in evaluated}, made
        assert f"step {self.steps} of {self.steps}, finished" in (output_dir / "report.html").read_text()

    def end_by_signal(self, number: int, moment: str) -> dict:
        """A run that is asked to stop inside of something, and then goes on."""
        output_dir = self.directory / f"asked-{number:02d}"
        shutil.rmtree(output_dir, ignore_errors=True)
        trial = self.start(output_dir, 0, slow_search=moment == "search")
        self.reach(trial, moment, 0, None)
        inside = trial.is_inside(moment)
        pid = self.draw.choice(sorted(trial.ranks().values()))
        assert send(pid, signal.SIGTERM), f"{trial.log}: ended before the signal"
        asked = time.monotonic()
        code = trial.wait(90)
        seconds, said = time.monotonic() - asked, status(output_dir)
        wait_for("the page", lambda: not page_writers(output_dir))
        page = (output_dir / "report.html").read_text()
        found = {"moment": moment, "inside": inside, "seconds": round(seconds, 2), "exit": code, "lines": trial.said()}
        found["good"] = (
            (code, said.get("state"), newest_intact(output_dir)) == (75, "interrupted", said.get("step"))
            and seconds < PROMISED_SECONDS
            and f"interrupted, can be continued: {said['message'][:20]}" in page
            and not trial.leftovers()
        )
        check_whole(output_dir)
        self.finish(output_dir, 9)
        self.check_end(output_dir)
        return found | {"sha256": digest(output_dir)}


def page_writers(output_dir: Path) -> list[int]:
    """Processes that write the page of a run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if PAGE_PROCESS in words and os.fsencode(output_dir) in words:
            found.append(int(entry.name))
    return found


def lines(path: Path, ended: bool = True) -> list[dict]:
    """Rows of a file; a start that was killed may have torn the last."""
    texts = path.read_text().splitlines(keepends=True)
    if texts and not ended and not texts[-1].endswith("\n"):
        texts.pop()
    return [json.loads(text) for text in texts]


def evaluations(output_dir: Path) -> list[dict]:
    return [row for row in lines(output_dir / "metrics.jsonl") if "val/loss" in row]


def check_whole(output_dir: Path, ended: bool = False) -> None:
    """Read every file of a run to its end. ended: it ended by itself; then nothing is left that was being written."""
    import soundfile
    from safetensors import safe_open

    for path in sorted(path for path in output_dir.rglob("*") if path.is_file()):
        if any(part.startswith(".") for part in path.relative_to(output_dir).parts):
            beside = path.name.startswith((".report.html.", ".heartbeat.json."))
            assert not ended or beside, f"{path}: left over"
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            lines(path, ended)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>"), path
        elif path.suffix == ".flac":
            # The file says how many there are.
            assert len(soundfile.read(path)[0]) == soundfile.info(path).frames > 0
        elif path.suffix == ".png":
            assert path.read_bytes()[-8:-4] == b"IEND", path
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--terms", type=int, default=6)
    options = parser.parse_args()
    began = time.monotonic()
    series = WatchedSeries(options.directory.resolve(), options.processes, options.seed, options.steps)
    expected = digest(series.undisturbed(everything=False))
    watched = series.undisturbed()
    series.check_end(watched)
    identical = digest(watched) == expected
    outcomes = []
    for number in range(options.runs):
        outcomes.append(series.run(number))
        told = ", ".join(f"{kill['victim']}@{kill['moment']}->{kill['saved']}" for kill in outcomes[-1]["kills"])
        same = "identical" if outcomes[-1]["sha256"] == expected else "DIFFERENT"
        print(f"run {number:2d}  {same}  {told}", flush=True)
    asked = []
    for number in range(options.terms):
        asked.append(series.end_by_signal(number, list(INSIDE)[number % len(INSIDE)]))
        asked[-1]["good"] &= asked[-1].pop("sha256") == expected
        said = asked[-1].pop("lines")
        print(json.dumps(asked[-1]) + ("" if asked[-1]["good"] else f"\n{said}"), flush=True)
    moments = [kill["moment"] for kill in series.kills]
    found = {
        "watched_is_alone": identical,
        "runs": options.runs,
        "identical": sum(outcome["sha256"] == expected for outcome in outcomes),
        **figures(series.kills),
        "moments": {moment: moments.count(moment) for moment in dict.fromkeys(series.MOMENTS)},
        "asked": options.terms,
        "asked_inside": sum(one["inside"] for one in asked),
        "as_promised": sum(one["good"] for one in asked),
        "seconds_after_signal": max((one["seconds"] for one in asked), default=None),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(json.dumps(found, indent=1))
    good = identical and found["identical"] == options.runs and found["as_promised"] == options.terms
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
