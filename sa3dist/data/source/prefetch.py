"""Threads that work ahead: results in the order of the items, with a limit on the bytes in memory."""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Total size of items in progress; a larger item is processed alone.
IN_FLIGHT_BYTES = 1 << 30
# How often a request to stop is checked while waiting for a result.
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
    """(item, work(item)) in order. Threads do the work: decoding and hashing release the interpreter lock.

    size_of          bytes an item occupies until its result is taken
    num_workers      threads; default: one per core. They start when the first result is requested
    check_stop       called while waiting for a result; if it raises, the iteration ends. Between results the caller
                     checks, so that a step whose clips are all encoded is finished before a run stops
    in_flight_bytes  limit of the sum of ``size_of``; a single larger item is allowed
    ahead            number of items in progress; default: four per thread
    close_seconds    how long closing waits for work in progress; default: until it is done. Work that takes longer is
                     abandoned: the threads are daemons
    Raises what ``work`` raised, when its item's turn comes.
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
            threads.append(threading.Thread(target=_run_tasks, args=(tasks, work), name=THREAD_NAME, daemon=True))
            threads[-1].start()

    def finish() -> tuple[Item, Result]:
        item, _, future = waiting.popleft()
        while not wait([future], TICK_SECONDS).done:
            check_stop()
        return item, future.result()

    try:
        for item in items:
            size = size_of(item)
            while waiting and (len(waiting) >= most or size + sum(bytes_ for _, bytes_, _ in waiting) > limit):
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


def _run_tasks(tasks: queue.SimpleQueue, work: Callable) -> None:
    while (task := tasks.get()) is not None:
        future, item = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work(item))
            except BaseException as problem:
                future.set_exception(problem)
        # Do not keep the result alive while waiting for the next item.
        del task, future, item
