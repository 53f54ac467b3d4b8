"""Work done ahead of its turn by threads: results in the order of the items, with a bound on the bytes in memory."""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Bytes of the items being worked on at one time; a larger item is worked on alone.
IN_FLIGHT_BYTES = 1 << 30
# How soon a request to stop is noticed by who waits for a result.
TICK_SECONDS = 0.2
THREAD_NAME = "prefetch"


def prefetch(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    size_of: Callable[[Item], int],
    num_workers: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
    in_flight_bytes: int | None = None,
    ahead: int | None = None,
    close_seconds: float | None = None,
) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in the given order; threads do the work, for decoding and hashing release the interpreter.

    size_of        bytes an item holds until its result is taken; ``in_flight_bytes`` at most together, or one item's
    num_workers    threads; default: one per core. None is started before the first result is asked for
    check_stop     called while a result is waited for; what it raises ends the iteration. Between results the caller
                   asks: a step whose clips are all encoded is finished before a run stops
    ahead          how many items are begun before their turn; default: four per thread
    close_seconds  how long the end waits for work in hand; default: until it is done. Work that takes longer is left
                   behind: the threads are daemons
    Raises what ``work`` raised, at its item's turn.
    """
    workers = num_workers or os.cpu_count() or 1
    limit, most = in_flight_bytes or IN_FLIGHT_BYTES, ahead or 4 * workers
    tasks: queue.SimpleQueue[tuple[Future, Item] | None] = queue.SimpleQueue()
    threads: list[threading.Thread] = []
    waiting: deque[tuple[Item, int, Future]] = deque()

    def begin(item: Item, size: int) -> None:
        waiting.append((item, size, Future()))
        tasks.put((waiting[-1][2], item))
        if len(threads) < workers:
            threads.append(threading.Thread(target=_work_off, args=(tasks, work), name=THREAD_NAME, daemon=True))
            threads[-1].start()

    def finish() -> tuple[Item, Result]:
        item, _, future = waiting.popleft()
        while not wait([future], TICK_SECONDS).done:
            check_stop()
        return item, future.result()

    try:
        for item in items:
            size = size_of(item)
            while waiting and (len(waiting) >= most or size + sum(held for _, held, _ in waiting) > limit):
                yield finish()
            begin(item, size)
        while waiting:
            yield finish()
    finally:
        for _, _, future in waiting:
            future.cancel()
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join(close_seconds)


def _work_off(tasks: queue.SimpleQueue, work: Callable) -> None:
    while (task := tasks.get()) is not None:
        future, item = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work(item))
            except BaseException as problem:
                future.set_exception(problem)
        # While the next item is waited for no result must be kept alive here.
        del task, future, item
