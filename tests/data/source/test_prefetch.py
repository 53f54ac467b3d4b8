"""Work ahead of its turn: in order, within bounds, and left at once whatever a thread is doing."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from sa3dist.data.source.prefetch import THREAD_NAME, prefetch
from sa3dist.errors import DataError, Interrupted

BYTES = 4000


class Reading:
    """Audio whose first sample is the item, and what was read where."""

    def __init__(self):
        self.read, self.main = [], []

    def __call__(self, item):
        self.read.append(item)
        self.main.append(threading.current_thread() is threading.main_thread())
        return torch.full((2, BYTES // 8), float(item))


def settled(reading, expected):
    """How many items have been read, a while after as many as expected."""
    deadline = time.monotonic() + 30
    while len(reading.read) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    return len(reading.read)


def size(item):
    return BYTES


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items_from_other_threads_each_once(workers):
    reading, items = Reading(), [0, 2, 3, 7, 8, 9, 11, 5]
    found = [(item, int(result[0, 0])) for item, result in prefetch(reading, iter(items), size, workers)]
    assert found == list(zip(items, items, strict=True))
    assert sorted(reading.read) == sorted(items)
    assert not any(reading.main)


def test_nothing_is_begun_before_the_first_result_is_asked_for_and_then_no_more_than_ahead():
    reading = Reading()
    results = prefetch(reading, range(100), size, 1, ahead=6)
    assert settled(reading, 0) == 0
    for taken in range(1, 5):
        assert next(results)[0] == taken - 1
        # The one that was taken makes room when the next is asked for.
        assert settled(reading, taken + 5) == taken + 5
    results.close()


@pytest.mark.parametrize("room", [1, 2.5, 3])
def test_no_more_is_held_than_there_is_room_for_but_one_item_always(room):
    reading = Reading()
    results = prefetch(reading, range(20), size, 4, in_flight_bytes=int(room * BYTES))
    for taken in range(1, 6):
        next(results)
        assert settled(reading, taken + int(room) - 1) == taken + int(room) - 1
    results.close()


def test_a_result_that_was_taken_is_not_kept_alive():
    held = []

    class Result:
        def __init__(self):
            held.append(1)

        def __del__(self):
            held.pop()

    for _, result in prefetch(lambda item: Result(), range(20), lambda item: 1, 1, in_flight_bytes=3):
        del result
        assert len(held) <= 3


def test_what_work_raises_is_raised_at_its_turn():
    def read(item):
        if item == 1:
            raise DataError("clip b: damaged")
        return item

    results = prefetch(read, range(3), size, 1)
    assert next(results) == (0, 0)
    with pytest.raises(DataError, match="^clip b: damaged$"):
        next(results)


def working_threads():
    return {thread for thread in threading.enumerate() if thread.name == THREAD_NAME}


def test_work_that_hangs_keeps_nobody():
    others, hangs, begin = working_threads(), threading.Event(), time.monotonic()

    def asked():
        if time.monotonic() - begin > 0.5:
            raise Interrupted("SIGTERM while reading audio")

    results = prefetch(lambda item: hangs.wait(60), range(2), size, 1, check_stop=asked, close_seconds=0.3)
    with pytest.raises(Interrupted):
        next(results)
    assert time.monotonic() - begin < 30
    (thread,) = working_threads() - others
    assert thread.daemon
    assert thread.is_alive()
    hangs.set()
    thread.join(5)
    assert not thread.is_alive()


def test_closing_waits_for_the_work_in_hand_and_begins_no_more():
    others, ended = working_threads(), []

    def read(item):
        time.sleep(0.2 * (item > 0))
        ended.append(item)

    results = prefetch(read, range(20), size, 2)
    next(results)
    results.close()
    assert len(ended) <= 3
    assert working_threads() <= others


LEAVES = """
import time, torch
from sa3dist.runtime import own_process
from sa3dist.data.source.prefetch import prefetch
began = []
def read(item):
    began.append(item)
    signal, kernel = torch.randn(1, 1, 200_000), torch.randn(1, 1, 999)
    while item:
        torch.nn.functional.conv1d(signal, kernel)
results = prefetch(read, [0, 1], lambda item: 1, 1, close_seconds=0.1)
next(results)
while len(began) < 2:
    time.sleep(0.01)
results.close()
print("said", flush=False)
own_process.end_process(75)
"""


def test_a_process_leaves_with_its_code_though_a_thread_is_in_the_middle_of_an_operator():
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (75, "said\n", "")
