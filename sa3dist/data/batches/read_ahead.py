"""Audio read before its turn, in a thread of its own that nobody waits for at the end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait

import torch

from sa3dist.data.batches.order import micro_batch_slots

# Decoded audio waiting for the encoder, beyond that of the clips being read and encoded.
WAITING_BYTES = 256 << 20
MICRO_BATCHES_AHEAD = 4
# How soon a request to stop is noticed by who waits for a clip.
TICK_SECONDS = 0.2
# What a clip usually takes at most. A read that hangs is left behind: the thread is a daemon.
CLOSE_SECONDS = 2.0
THREAD_NAME = "read-ahead"


class ReadAhead:
    """Reads what the slots of coming micro batches need, one slot after the other; closed by its ``close``."""

    def __init__(
        self, read: Callable[[int], torch.Tensor | None], micro_batch: int, check_stop: Callable[[], None]
    ) -> None:
        """read: called in the thread with a slot, None where it needs nothing; check_stop: may raise, to end a wait."""
        self._read, self._micro_batch, self._check_stop = read, micro_batch, check_stop
        self._changed = threading.Condition()
        self._wanted: deque[tuple[int, Future]] = deque()
        self._futures: dict[int, Future] = {}
        self._held_bytes = 0
        self._awaited: Future | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def over(self, micro_indices: Iterable[int]) -> Iterator[int]:
        """``micro_indices``, while the audio of those to come is read."""
        waiting: deque[int] = deque()
        for micro_index in micro_indices:
            self._want(micro_batch_slots(micro_index, self._micro_batch))
            waiting.append(micro_index)
            if len(waiting) > MICRO_BATCHES_AHEAD:
                yield waiting.popleft()
        yield from waiting

    def take(self, slot: int) -> torch.Tensor | None:
        """What was read for a slot, once; None where it needs nothing, or is not among those to come.

        Raises what reading it raised.
        """
        future = self._futures.pop(slot, None)
        if future is None:
            return None
        self._await(future)
        try:
            while not wait([future], TICK_SECONDS).done:
                self._check_stop()
        finally:
            self._await(None)
        audio_CN = future.result()
        with self._changed:
            self._held_bytes -= _bytes_of(audio_CN)
            self._changed.notify()
        return audio_CN

    def close(self) -> None:
        """Read no more. Waits for the clip in hand, but not for long."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread:
            self._thread.join(CLOSE_SECONDS)

    def _want(self, slots: Iterable[int]) -> None:
        with self._changed:
            for slot in slots:
                self._futures[slot] = Future()
                self._wanted.append((slot, self._futures[slot]))
            self._changed.notify()
        if self._thread is None:
            # Not before: the loader has forked its processes by now.
            self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
            self._thread.start()

    def _await(self, future: Future | None) -> None:
        with self._changed:
            self._awaited = future
            self._changed.notify()

    def _may_read(self) -> bool:
        # Not longer than it is awaited, however late whoever waits for it comes to say so.
        awaited = self._awaited is not None and not self._awaited.done()
        return bool(self._wanted) and (awaited or self._held_bytes < WAITING_BYTES)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_read())
                if self._closed:
                    return
                slot, future = self._wanted.popleft()
            try:
                audio_CN = self._read(slot)
            except BaseException as problem:
                # Raised where the slot is taken.
                future.set_exception(problem)
                continue
            with self._changed:
                self._held_bytes += _bytes_of(audio_CN)
            future.set_result(audio_CN)
            del audio_CN, future


def still_reading() -> bool:
    """Whether a read that hangs was left behind in this process."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


def _bytes_of(audio_CN: torch.Tensor | None) -> int:
    return 0 if audio_CN is None else audio_CN.nbytes
