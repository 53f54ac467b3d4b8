"""What can go wrong beneath a running job: does every rank end in time, with one line that names rank, host and cause?

    python tests/survival/failures.py DIRECTORY [SCENARIO ...]          needs root: it mounts small disks

Two ranks without a launch agent, so that nobody ends the peers for them. In each scenario they train, something breaks
after step 3, and the seconds are counted until both are gone. Prints one JSON line per scenario and leaves with 1 when
any of them failed.
"""

import argparse
import ctypes
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trial import ForkedTrial, newest_intact, own_lines, prepare, rows, send, session_members, status, tail, wait_for

STEPS, SAVE_EVERY, BREAK_AFTER = 4000, 2, 3
END_SECONDS = 60.0
STEP_TIMEOUT_SECONDS = 8
HOST = socket.gethostname()


class Scenario:
    """words: settings beside the usual ones; mount: size of an own disk for the results; code and said: the end."""

    def __init__(
        self,
        disturb: Callable[[ForkedTrial], None],
        said: str,
        code: int = 70,
        words: dict | None = None,
        mount: str = "",
    ) -> None:
        self.disturb, self.said, self.code, self.words, self.mount = disturb, said, code, words or {}, mount


def kill(rank: int) -> Callable[[ForkedTrial], None]:
    return lambda trial: send(trial.ranks()[rank], signal.SIGKILL)


def freeze(rank: int) -> Callable[[ForkedTrial], None]:
    return lambda trial: send(trial.ranks()[rank], signal.SIGSTOP)


def freeze_loader(trial: ForkedTrial) -> None:
    """The loader processes of rank 1 stand still, as in front of a dead network disk."""
    rank_1 = trial.ranks()[1]
    workers = [pid for pid in session_members({rank_1}) if pid != rank_1]
    assert workers
    for pid in workers:
        send(pid, signal.SIGSTOP)


def fill_disk(trial: ForkedTrial) -> None:
    try:
        with (trial.output_dir.parent / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def make_read_only(trial: ForkedTrial) -> None:
    # Busy as long as a file is being written; that lasts for moments.
    wait_for("remounting", lambda: not mount("-o", "remount,ro", str(trial.output_dir.parent)))


def remove_data(trial: ForkedTrial) -> None:
    # Files may appear while they are removed.
    wait_for("removing", lambda: shutil.rmtree(trial.output_dir.parent / "own-work", ignore_errors=True) is None)


def take_memory(trial: ForkedTrial) -> None:
    """Rank 1 may map no more than it has now: its next large allocation fails."""
    pid = trial.ranks()[1]
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)


def nothing(trial: ForkedTrial) -> None:
    """It breaks by itself."""


LARGE_STEP = {"duration": 12, "batch_size": 2}
SCENARIOS = {
    "killed rank 1": Scenario(kill(1), f"rank 1 on {HOST}: gone, last seen in step"),
    "killed rank 0, which holds the store": Scenario(kill(0), f"rank 0 on {HOST}: gone"),
    "frozen rank 1": Scenario(freeze(1), f"rank 1 on {HOST}: gone, last seen in step"),
    "frozen rank 0": Scenario(freeze(0), ": no contact with the rendezvous store"),
    "frozen loader of rank 1": Scenario(
        freeze_loader,
        # By itself, or by the peer that waits for it.
        "(waiting for data); state is as last saved",
        words={"num_workers": 1, "step_timeout": STEP_TIMEOUT_SECONDS},
    ),
    "full disk": Scenario(fill_disk, "disk full", mount="8m"),
    "read-only disk": Scenario(make_read_only, "Read-only file system", mount="8m"),
    "vanished data": Scenario(remove_data, "own-work", words={"own_work": True}),
    "out of memory on rank 1": Scenario(take_memory, f"rank 1 on {HOST}: out of memory", words=LARGE_STEP),
    "loss not finite": Scenario(nothing, "is not finite", words={"learning_rate": 1e30}),
}


def mount(*words: str) -> int:
    return subprocess.run(["mount", *words], stderr=subprocess.DEVNULL).returncode


def run(name: str, scenario: Scenario, directory: Path, words: dict) -> dict:
    place = directory / name.replace(" ", "-").replace(",", "")
    subprocess.run(["umount", str(place)], stderr=subprocess.DEVNULL)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if scenario.mount and mount("-t", "tmpfs", "-o", f"size={scenario.mount}", "tmpfs", str(place)):
        raise SystemExit("cannot mount; run as root")
    words = words | {"number_of_steps": STEPS, "save_every": SAVE_EVERY, "output_dir": place / "run"} | scenario.words
    if words.pop("own_work", False):
        words["work_dir"] = place / "own-work"
    trial = ForkedTrial(words, 2, place / "run", directory / "logs" / f"{place.name}.log", as_agent=False)
    try:
        if scenario.disturb is not nothing:
            wait_for("the first steps", lambda: len(rows(trial.output_dir)) >= BREAK_AFTER or trial.ended(), 240, 0.05)
            assert not trial.codes, tail(trial.log)
        scenario.disturb(trial)
        begin = time.monotonic()
        frozen = name.startswith("frozen rank")
        wait_for("the end", lambda: trial.ended() or (frozen and bool(trial.codes)), END_SECONDS + 60, 0.02)
        seconds = time.monotonic() - begin
        if frozen:
            # It learns, when it may run again, that the job is over.
            for pid in trial.ranks().values():
                send(pid, signal.SIGCONT)
            trial.wait(END_SECONDS)
        return judge(name, scenario, trial, seconds)
    finally:
        trial.kill_all()
        for pid in trial.leftovers():
            send(pid, signal.SIGKILL)
        if scenario.mount:
            subprocess.run(["umount", "-l", str(place)], check=True)


def judge(name: str, scenario: Scenario, trial: ForkedTrial, seconds: float) -> dict:
    lines = [line for line in own_lines(trial.log) if "cannot write" not in line]
    said = status(trial.output_dir)
    ended = {rank: code for rank, code in trial.codes.items() if code != -signal.SIGKILL}
    result = {"scenario": name, "seconds": round(seconds, 1), "codes": trial.codes, "said": lines}
    result |= {"status": {key: said.get(key) for key in ("exit_code", "dist_rank", "host", "message")}}
    result["saved_step"] = newest_intact(trial.output_dir)
    # A full or read-only disk may not take the status.
    status_fits = said.get("exit_code", scenario.code) == scenario.code
    result["good"] = (
        seconds < END_SECONDS
        and set(ended.values()) == {scenario.code}
        and len(lines) == 1
        and scenario.said in lines[0]
        and lines[0].startswith("rank ")
        and status_fits
        and (result["saved_step"] > 0 or scenario.disturb is nothing)
    )
    return result


def clock_jumps(directory: Path, words: dict) -> dict:
    """The same run under a clock that leaps by days, both ways: the same file, and nothing takes offence."""
    place = directory / "clock"
    shutil.rmtree(place, ignore_errors=True)
    words = words | {"number_of_steps": 12, "save_every": 3, "max_wall_time": 600, "step_timeout": 60}
    files, real, codes = [], time.time, []
    leaps = random.Random(1)
    for kind in ("steady", "leaping"):
        if kind == "leaping":
            time.time = lambda: real() + leaps.choice((-1, 1)) * leaps.random() * 30 * 86400
        output_dir = place / kind
        try:
            trial = ForkedTrial(words | {"output_dir": output_dir}, 2, output_dir, directory / f"{kind}.log", False)
        finally:
            time.time = real
        codes.append(trial.wait(240))
        files.append((output_dir / "lora.safetensors").read_bytes() if codes[-1] == 0 else kind)
    return {"scenario": "clock jump", "codes": codes, "good": codes == [0, 0] and files[0] == files[1]}


def damaged_checkpoint(directory: Path, words: dict) -> dict:
    """The newest checkpoint lost a byte: the run continues from the one before, says so, and gives the same file."""
    place = directory / "damaged"
    shutil.rmtree(place, ignore_errors=True)

    def train(output_dir: Path, steps: int) -> int:
        more = {"number_of_steps": steps, "save_every": 2, "output_dir": output_dir}
        return ForkedTrial(words | more, 2, output_dir, place / f"{output_dir.name}-{steps}.log", False).wait(240)

    codes = [train(place / "whole", 8), train(place / "broken", 6)]
    newest = place / "broken/checkpoints/step-00000006/moments.safetensors"
    with newest.open("r+b") as file:
        file.truncate(newest.stat().st_size // 2)
    codes.append(train(place / "broken", 8))
    log = (place / "broken-8.log").read_text()
    resumed = [row["resumed_from"] for row in rows(place / "broken") if "resumed_from" in row]
    same = (place / "whole/lora.safetensors").read_bytes() == (place / "broken/lora.safetensors").read_bytes()
    good = codes == [0, 0, 0] and resumed == [4] and same and "skipping a damaged checkpoint" in log
    return {"scenario": "damaged checkpoint", "codes": codes, "resumed_from": resumed, "same_file": same, "good": good}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("scenarios", nargs="*", help=f"some of: {', '.join([*SCENARIOS, *OTHERS])}")
    arguments = parser.parse_args()
    # Every large tensor is mapped anew, so that a limit on the address space is met at once.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    multiprocessing.set_start_method("fork")
    words = prepare(arguments.directory)
    results = []
    for name in arguments.scenarios or [*SCENARIOS, *OTHERS]:
        if name in OTHERS:
            results.append(OTHERS[name](arguments.directory, words))
        else:
            results.append(run(name, SCENARIOS[name], arguments.directory, words))
        print(json.dumps(results[-1]), flush=True)
    return 0 if all(result["good"] for result in results) else 1


OTHERS = {"clock jump": clock_jumps, "damaged checkpoint": damaged_checkpoint}

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    sys.exit(main())
