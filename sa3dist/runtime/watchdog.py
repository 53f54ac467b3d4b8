"""Never a hang: threads beside the main one end this process when it, or a peer, has stood still for too long.

The heart tells the peers through the store that this rank lives, and looks at the next rank's heart; another thread
keeps heartbeat.json; the watchdog itself only counts, so that neither a dead network nor a dead disk can hold it up.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sa3dist import errors
from sa3dist.runtime import run_lock
from sa3dist.runtime.exit_status import has_spoken, report
from sa3dist.runtime.heartbeat import HeartbeatFile
from sa3dist.runtime.liveness import AVERAGING, Still
from sa3dist.runtime.peers import (
    END,
    HEARTBEAT_SECONDS,
    STALL_SECONDS,
    STOP,
    alive_key,
    default_store,
    end_for_all,
    heard_key,
    leave_stopped,
    lost_rank,
    read,
    sign_of_life,
    unpack,
)
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest, kill_loaders

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
# How long the main thread may take to end by itself when the run is over: it closes loaders and finishes a save.
GRACE_SECONDS = 5.0
# And how much longer while a save is in flight: after a silence of STALL_SECONDS it has to end within a minute.
SAVING_SECONDS = 10.0
# Asked to stop, the main thread is given this long to come out of a wait for data by itself.
BREAK_SECONDS = 2.0
# And this long to be broken off, which a read that the system does not interrupt keeps it from: then the unsaved steps
# are given up, in the time that launch agents and schedulers leave.
HANGING_SECONDS = 15.0
# A word to the store or to the disk that takes longer is not waited for.
WORD_SECONDS = 5.0
# A store that has not answered for this long is not asked for the last word.
OUT_OF_REACH_SECONDS = 4 * HEARTBEAT_SECONDS
# How long rank 0 may take to speak for all: it hears of the end a heartbeat later, and has its grace; a save in flight
# adds to that.
RANK_0_SECONDS = 2 * HEARTBEAT_SECONDS + GRACE_SECONDS + 1
AGAIN = "state is as last saved, run again to continue"


class Watchdog:
    """Runs between ``connect`` and the end of the stages, as a context manager.

    told   why another rank has left, as soon as this one knows
    """

    def __init__(self, group: Group, stop: StopRequest, output_dir: Path) -> None:
        self._group, self._stop, self._output_dir = group, stop, output_dir
        self._host = socket.gethostname()
        self._ended = threading.Event()
        self._next = (group.dist_rank + 1) % group.world_size
        self._next_last: dict | None = None
        self._contacts = 0
        self._asked_elsewhere = False
        self.told: errors.SA3DistError | None = None
        self._threads: list[threading.Thread] = []
        self._file = HeartbeatFile(output_dir, group.liveness)

    def __enter__(self) -> Watchdog:
        work = [self._watch]
        if self._group.world_size > 1:
            store = default_store()
            self._say_alive(store, 0)
            work.append(lambda: self._beat(store))
        if self._group.is_main:
            work.append(lambda: self._file.keep(self._ended))
        self._threads = [threading.Thread(target=target, daemon=True) for target in work]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, failure: BaseException | None, traceback) -> None:
        self._ended.set()
        for thread in self._threads:
            # One may hang in a dead store or on a dead disk.
            thread.join(WORD_SECONDS)
        if self._group.is_main:
            bounded(lambda: self._file.close(failure))
        elif failure is not None and self._is_saved_elsewhere(failure):
            # The first word in status.json, and the first rank gone, make launchers end the others.
            patience_seconds = self._patience_seconds(failure)
            bounded(lambda: has_spoken(self._output_dir, patience_seconds), patience_seconds + TICK_SECONDS)

    def _say_alive(self, store: dist.Store, count: int) -> None:
        store.set(alive_key(self._group.dist_rank), json.dumps(sign_of_life(count, self._group.liveness)))

    def _beat(self, store: dist.Store) -> None:
        count = 0
        while not self._ended.wait(HEARTBEAT_SECONDS):
            count += 1
            try:
                self._say_alive(store, count)
                self._next_last = read(store, alive_key(self._next))
                told = read(store, END)
                self._pass_on_stop(store)
            except RuntimeError:
                # The store is gone; the watchdog counts the time without contact.
                continue
            self._contacts += 1
            if told is not None and self.told is None:
                self.told = unpack(told)
                with contextlib.suppress(RuntimeError):
                    store.set(heard_key(self._group.dist_rank), "1")

    def _pass_on_stop(self, store: dist.Store) -> None:
        """While training: the one that waits for its loader may not be the one that was asked to stop."""
        if not self._stop.holds_state or self._asked_elsewhere:
            return
        if self._stop.requested():
            store.compare_set(STOP, "", json.dumps(f"{self._stop.reason} on rank {self._group.dist_rank}"))
        if (reason := read(store, STOP)) is not None:
            self._asked_elsewhere = True
            self._stop.hear(reason)

    def _watch(self) -> None:
        stuck, silent, cut, over, hanging = (Still() for _ in range(5))
        alone, last = self._group.world_size == 1, time.monotonic()
        while not self._ended.wait(TICK_SECONDS):
            now = time.monotonic()
            # A suspended process did not stand still, it did not run.
            tick, last = min(now - last, 2 * TICK_SECONDS), now
            limit = self._group.liveness.timeout_seconds
            progress = self._group.liveness.progress_count
            stood, cut_off = stuck.look(progress, tick), cut.look(self._contacts, tick)
            unheard = silent.look(self._next_last, tick)
            asked = self._stop.waiting and self._stop.requested()
            in_vain = hanging.look((progress, asked), tick)
            if asked and in_vain > BREAK_SECONDS:
                self._break_off(in_vain)
            taken_over = run_lock.lost(self._output_dir)
            if taken_over is not None:
                self._end_all(taken_over)
            elif self.told is not None:
                patience = GRACE_SECONDS + (SAVING_SECONDS if self._stop.saving else 0)
                if over.look("over", tick) > patience:
                    # Rank 0 was told as well, a heartbeat later at most.
                    self._end(self.told, WORD_SECONDS)
            elif not alone and cut_off > (OUT_OF_REACH_SECONDS if stood > limit else STALL_SECONDS):
                # Without the store nobody can be told, and rank 0 comes to an end of its own about now.
                self._end(self._explain_cut(cut_off), WORD_SECONDS)
            elif stood > limit:
                self._end_all(self._explain_standstill(limit))
            elif not alone and unheard > STALL_SECONDS and self._next_last is not None:
                how = f", silent for {STALL_SECONDS:.0f} s"
                self._end_all(lost_rank(self._next, self._next_last, how))

    def _break_off(self, in_vain: float) -> None:
        """Asked to stop, the loader gives nothing: the step's end, where stopping is looked at, may never come."""
        self._stop.break_off()
        if in_vain > HANGING_SECONDS + (SAVING_SECONDS if self._stop.saving else 0):
            problem = errors.Interrupted(f"{self._stop.reason} while waiting for data, which hangs; {AGAIN}")
            problem.origin = (self._group.dist_rank, self._host)
            if self._group.world_size > 1:
                # Peers that do not hear of it would take this rank for killed.
                problem = bounded(lambda: leave_stopped(problem)) or problem
            self._end(problem)

    def _explain_standstill(self, limit: float) -> errors.EnvironmentFailure:
        liveness = self._group.liveness
        peers = {} if self._group.world_size == 1 else bounded(self._peers) or {}
        here = liveness.step, liveness.place
        behind = {n: said for n, said in peers.items() if (said["step"], said["place"]) < here}
        if behind:
            first, *others = sorted(behind)
            also = f", nor have ranks {', '.join(map(str, others))}" if others else ""
            said = behind[first]
            problem = errors.LostPeer(
                f"has not come to the end of step {liveness.step} in {limit:.0f} s{also}; last seen in step "
                f"{said['step']} ({said['doing']}); {AGAIN} (step_timeout)"
            )
            problem.origin = (first, said["host"])
            return problem
        if liveness.doing == AVERAGING and peers:
            found = f"step {liveness.step}: every rank has arrived, but nothing has come in {limit:.0f} s"
        else:
            where = f"step {liveness.step}" if liveness.stage == "train" else liveness.stage
            found = f"{where}: no progress for {limit:.0f} s ({liveness.doing})"
        return self._failure(f"{found}; {AGAIN} (step_timeout)")

    def _explain_cut(self, seconds: float) -> errors.EnvironmentFailure:
        address = f"{os.environ.get('MASTER_ADDR', 'unknown')}:{os.environ.get('MASTER_PORT', '')}"
        return self._failure(
            f"no contact with the rendezvous store at {address} for {seconds:.0f} s: the network is cut, or the "
            f"host of rank 0 ({self._group.hosts[0]}) is gone; {AGAIN}"
        )

    def _failure(self, message: str) -> errors.EnvironmentFailure:
        problem = errors.EnvironmentFailure(message)
        problem.origin = (self._group.dist_rank, self._host)
        return problem

    def _peers(self) -> dict[int, dict]:
        store, found = default_store(), {}
        for dist_rank in range(self._group.world_size):
            said = read(store, alive_key(dist_rank))
            if said is not None and dist_rank != self._group.dist_rank:
                found[dist_rank] = said
        return found

    def _end_all(self, problem: errors.SA3DistError) -> None:
        if self._group.world_size > 1:
            told = bounded(lambda: end_for_all(default_store(), problem, self._group.dist_rank))
            problem = told or problem
        self._end(problem)

    def _is_saved_elsewhere(self, failure: BaseException) -> bool:
        """Whether rank 0 may have a save in flight: not when the failure is its own, or that it is lost."""
        origin = getattr(failure, "origin", None)
        return self._stop.saving and (origin is None or origin[0] != 0)

    def _patience_seconds(self, failure: BaseException) -> float:
        """How long rank 0 is left to speak of ``failure`` before this rank does."""
        return RANK_0_SECONDS + (SAVING_SECONDS if self._is_saved_elsewhere(failure) else 0)

    def _end(self, problem: errors.SA3DistError, patience_seconds: float | None = None) -> None:
        """patience_seconds: how long rank 0 is left to speak before this rank does, if not what it may need."""
        if patience_seconds is None:
            patience_seconds = self._patience_seconds(problem)
        if self._group.is_main:
            bounded(lambda: self._file.close(problem))
            patience_seconds = 0.0
        step = max(0, self._group.liveness.step - 1)
        bounded(
            lambda: report(problem, self._output_dir, step, patience_seconds),
            patience_seconds + WORD_SECONDS,
        )
        # Loader processes would outlive this one.
        kill_loaders()
        os._exit(problem.exit_code)


def bounded(work: Callable[[], Any], seconds: float = WORD_SECONDS) -> Any | None:
    """What ``work`` returns, or None when the store or the disk it needs is gone or does not answer in time."""
    results = []

    def run() -> None:
        try:
            results.append(work())
        except (RuntimeError, OSError) as error:
            log.warning("while ending: %s", error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
