"""No run hangs: threads beside the main one end this process when it, or a peer, makes no progress for too long.

One thread exchanges heartbeats and reasons through the store. The watchdog's own thread only counts, so that neither a
dead network nor a dead disk can block it; what it needs from them it asks in another thread, for a bounded time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sa3dist import errors
from sa3dist.runtime import peers, run_lock
from sa3dist.runtime.exit_status import REPORT_SECONDS, has_status, report
from sa3dist.runtime.heartbeat import HeartbeatFile
from sa3dist.runtime.liveness import AVERAGING, Unchanged
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest, exit_now

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
# How long the main thread may take to end by itself when the run is over: it closes loaders and finishes a save.
GRACE_SECONDS = 5.0
# Added while a save is in flight: after STALL_SECONDS of silence the save must end within a minute.
SAVING_SECONDS = 10.0
# How long the main thread, when asked to stop, may take to leave a wait for data by itself.
BREAK_SECONDS = 2.0
# How long it may take to leave preparation, or a wait that was broken off; a read that the system does not interrupt
# can keep it. After that, unsaved steps are given up. Half of what launch agents and schedulers wait before they kill.
LEAVE_SECONDS = 15.0
# Longest wait for an answer of the store or the disk.
ANSWER_SECONDS = 5.0
AS_LAST_SAVED = "state is as last saved, run again to continue"


class Watchdog:
    """A context manager that runs from before ``connect`` to the end of the stages; ``watch`` tells it of the peers.

    told        why another rank has left, once this rank knows
    heartbeat   heartbeat.json, on rank 0
    """

    def __init__(self, stop: StopRequest, output_dir: Path) -> None:
        self._stop, self._output_dir = stop, output_dir
        self._ended = threading.Event()
        self._group: Group | None = None
        self.heartbeat: HeartbeatFile | None = None
        self._next_last: dict | None = None
        self._contacts = 0
        self._stop_shared = False
        self.told: errors.SA3DistError | None = None
        self._stuck, self._silent, self._cut, self._over, self._asked = (Unchanged() for _ in range(5))
        self._threads = [threading.Thread(target=self._watch, daemon=True)]

    def watch(self, group: Group) -> Watchdog:
        """Watch this process and its peers from now on; before that only a stop request ends the process."""
        if group.is_main:
            self.heartbeat = HeartbeatFile(self._output_dir, group.liveness)
        if group.world_size > 1:
            peers.say_alive(peers.default_store(), group.dist_rank, group.liveness)
            self._threads.append(threading.Thread(target=self._exchange, args=(group,), daemon=True))
            self._threads[-1].start()
        self._group = group
        return self

    def __enter__(self) -> Watchdog:
        self._threads[0].start()
        return self

    def __exit__(self, kind, failure: BaseException | None, traceback) -> None:
        self._ended.set()
        for thread in self._threads:
            # One of them may hang in a dead store.
            thread.join(ANSWER_SECONDS)
        if self.heartbeat is not None:
            within(ANSWER_SECONDS, lambda: self.heartbeat.close(failure))
        elif failure is not None and self._is_saved_by_rank_0(failure):
            # Launchers end the other ranks at the first status.json report, or when the first rank is gone: wait for
            # rank 0.
            seconds = self._patience_seconds(failure)
            within(seconds + TICK_SECONDS, lambda: has_status(self._output_dir, seconds))

    def _exchange(self, group: Group) -> None:
        store, next_rank = peers.default_store(), (group.dist_rank + 1) % group.world_size
        while not self._ended.wait(peers.HEARTBEAT_SECONDS):
            # If the store is gone, the watchdog counts the time without contact.
            with contextlib.suppress(RuntimeError):
                peers.say_alive(store, group.dist_rank, group.liveness)
                self._next_last = peers.read(store, peers.ALIVE.format(next_rank))
                told = peers.read(store, peers.END)
                self._share_stop(store, group)
                self._contacts += 1
                if told is not None and self.told is None:
                    self.told = peers.unpack(told)
                    if not group.liveness.holds_state:
                        # The main thread leaves with that reason at its next look for a stop request.
                        self._stop.hear("another rank has ended")
                    store.set(peers.LEFT.format(group.dist_rank), "1")

    def _share_stop(self, store, group: Group) -> None:
        """While training, share the request: the rank that waits for its loader may not be the one asked to stop."""
        if self._stop_shared or not group.liveness.holds_state:
            return
        if self._stop.requested():
            store.compare_set(peers.STOP, "", json.dumps(f"{self._stop.reason} on rank {group.dist_rank}"))
        if (reason := peers.read(store, peers.STOP)) is not None:
            self._stop_shared = True
            self._stop.hear(reason)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(TICK_SECONDS):
            now = time.monotonic()
            # A suspended process did not run: count at most two ticks.
            tick, last = min(now - last, 2 * TICK_SECONDS), now
            self._stop.hear_signals()
            self._check_stop(tick)
            if self._group is not None:
                self._check_run(self._group, tick)

    def _check_stop(self, tick: float) -> None:
        """End a process that was asked to stop, but does not reach a point where it looks for that.

        In preparation there is nothing to save. In training the loader may return nothing, so that the step never ends.
        """
        group, waiting = self._group, self._stop.waiting
        training = group is not None and group.liveness.holds_state
        asked = self._stop.requested() and (waiting or not training)
        seconds = self._asked.look((asked, training and group.liveness.progress_count), tick)
        if not asked:
            return
        if waiting and seconds > BREAK_SECONDS:
            self._stop.break_off()
        if seconds > LEAVE_SECONDS + self._saving_seconds():
            what = f"while waiting for data, which hangs; {AS_LAST_SAVED}" if training else "during preparation"
            if not training:
                what += "; finished work is kept, run the same command to continue"
            problem = errors.Interrupted(f"{self._stop.reason} {what}")
            problem = within(ANSWER_SECONDS, lambda: self._stop.judge(problem)) or problem
            if group is not None:
                # Otherwise the peers would take this rank for killed.
                problem = within(ANSWER_SECONDS, lambda: peers.leave(group, problem)) or problem
            self._end(problem, None if training else REPORT_SECONDS)

    def _check_run(self, group: Group, tick: float) -> None:
        limit, alone = group.liveness.timeout_seconds, group.world_size == 1
        stood = self._stuck.look(group.liveness.progress_count, tick)
        cut_off = self._cut.look(self._contacts, tick)
        unheard = self._silent.look(self._next_last, tick)
        over = self._over.look(self.told, tick)
        if (taken_over := run_lock.lost(self._output_dir)) is not None:
            self._end_all(taken_over)
        elif self.told is not None:
            if over > GRACE_SECONDS + self._saving_seconds():
                # Rank 0 was told too, at most one heartbeat later.
                self._end(self.told, ANSWER_SECONDS)
        elif not alone and cut_off > (4 * peers.HEARTBEAT_SECONDS if stood > limit else peers.STALL_SECONDS):
            # Without the store nobody can be told; rank 0 ends by itself at about the same time.
            self._end(self._explain_cut(group, cut_off), ANSWER_SECONDS)
        elif stood > limit:
            self._end_all(self._explain_standstill(group, limit))
        elif not alone and unheard > peers.STALL_SECONDS and self._next_last is not None:
            how = f", silent for {peers.STALL_SECONDS:.0f} s"
            self._end_all(peers.lost_rank((group.dist_rank + 1) % group.world_size, self._next_last, how))

    def _explain_standstill(self, group: Group, limit: float) -> errors.EnvironmentFailure:
        here, said = group.liveness, within(ANSWER_SECONDS, lambda: self._peers(group)) or {}
        behind = [n for n, last in sorted(said.items()) if (last["step"], last["place"]) < (here.step, here.place)]
        if behind:
            first, *others = behind
            also = f", nor have ranks {', '.join(map(str, others))}" if others else ""
            problem = errors.LostPeer(
                f"has not come to the end of step {here.step} in {limit:.0f} s{also}; last seen in step "
                f"{said[first]['step']} ({said[first]['doing']}); {AS_LAST_SAVED} (step_timeout)"
            )
            problem.origin = (first, said[first]["host"])
            return problem
        if here.doing == AVERAGING and said:
            found = f"step {here.step}: every rank has arrived, but nothing has come in {limit:.0f} s"
        else:
            where = f"step {here.step}" if here.stage == "train" else here.stage
            found = f"{where}: no progress for {limit:.0f} s ({here.doing})"
        return errors.EnvironmentFailure(f"{found}; {AS_LAST_SAVED} (step_timeout)")

    def _explain_cut(self, group: Group, seconds: float) -> errors.EnvironmentFailure:
        address = f"{os.environ.get('MASTER_ADDR', 'unknown')}:{os.environ.get('MASTER_PORT', '')}"
        return errors.EnvironmentFailure(
            f"no contact with the rendezvous store at {address} for {seconds:.0f} s: the network is cut, or the "
            f"host of rank 0 ({group.hosts[0]}) is gone; {AS_LAST_SAVED}"
        )

    @staticmethod
    def _peers(group: Group) -> dict[int, dict]:
        """The last heartbeat of every other rank."""
        if group.world_size == 1:
            return {}
        store, others = peers.default_store(), set(range(group.world_size)) - {group.dist_rank}
        found = {dist_rank: peers.read(store, peers.ALIVE.format(dist_rank)) for dist_rank in others}
        return {dist_rank: said for dist_rank, said in found.items() if said is not None}

    def _saving_seconds(self) -> float:
        return SAVING_SECONDS if self._stop.saving else 0.0

    def _is_saved_by_rank_0(self, failure: BaseException) -> bool:
        """Whether rank 0 may have a save in flight: not if the failure is rank 0's own, or that it is lost."""
        origin = getattr(failure, "origin", None)
        return self._stop.saving and (origin is None or origin[0] != 0)

    def _patience_seconds(self, failure: BaseException) -> float:
        """How long to wait for rank 0 to report ``failure``.

        Rank 0 learns of it a heartbeat later and has its own grace period; a save in flight adds to that.
        """
        saving = SAVING_SECONDS if self._is_saved_by_rank_0(failure) else 0.0
        return 2 * peers.HEARTBEAT_SECONDS + GRACE_SECONDS + 1 + saving

    def _end_all(self, problem: errors.SA3DistError) -> None:
        self._end(within(ANSWER_SECONDS, lambda: peers.end_for_all(problem, self._group)) or problem)

    def _end(self, problem: errors.SA3DistError, patience_seconds: float | None = None) -> None:
        """patience_seconds: how long to wait for rank 0's report; None = ``_patience_seconds``."""
        if patience_seconds is None:
            patience_seconds = self._patience_seconds(problem)
        if self.heartbeat is not None:
            within(ANSWER_SECONDS, lambda: self.heartbeat.close(problem))
            patience_seconds = 0.0
        step = 0 if self._group is None else max(0, self._group.liveness.step - 1)
        # The main thread may be waiting for the disk.
        seconds = max(ANSWER_SECONDS, patience_seconds + 2)
        within(seconds, lambda: report(problem, self._output_dir, step, patience_seconds))
        exit_now(problem.exit_code)


def within(seconds: float, work: Callable[[], Any]) -> Any | None:
    """What ``work`` returns, or None if the store or disk it needs is gone or does not answer in time."""
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
