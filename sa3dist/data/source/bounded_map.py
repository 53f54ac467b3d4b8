"""Work on many files at once with a bound on the bytes in memory, results in the order of the items."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Compressed bytes of the items being worked on at one time; a larger item is worked on alone.
IN_FLIGHT_BYTES = 1 << 30


def ordered_map(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    size_of: Callable[[Item], int],
    num_workers: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
    in_flight_bytes: int | None = None,
) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in the given order; threads do the work, for decoding and hashing release the interpreter.

    size_of      bytes an item holds while it is worked on; ``in_flight_bytes`` at most together, or one item's
    num_workers  threads; default: one per core
    check_stop   called before every item and every result; what it raises ends the map
    """
    workers = num_workers or os.cpu_count() or 1
    limit = IN_FLIGHT_BYTES if in_flight_bytes is None else in_flight_bytes
    pool = ThreadPoolExecutor(workers, thread_name_prefix="clips")
    waiting: deque[tuple[Item, int, Future]] = deque()
    in_flight = 0
    try:
        for item in items:
            size = size_of(item)
            while waiting and (len(waiting) >= 4 * workers or in_flight + size > limit):
                done, freed, future = waiting.popleft()
                in_flight -= freed
                yield done, future.result()
            check_stop()
            waiting.append((item, size, pool.submit(work, item)))
            in_flight += size
        while waiting:
            check_stop()
            done, _, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
