"""Reading ahead: in order, within bounds, and left at once whatever the thread is doing."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from sa3dist.data.batches import read_ahead
from sa3dist.data.batches.read_ahead import MICRO_BATCHES_AHEAD, ReadAhead
from sa3dist.errors import DataError, Interrupted

AUDIO_BYTES = 4000


def never_asked():
    """No request to stop."""


class Reading:
    """Audio whose first sample is the slot, and what was read when."""

    def __init__(self):
        self.read, self.main = [], []

    def __call__(self, slot):
        self.read.append(slot)
        self.main.append(threading.current_thread() is threading.main_thread())
        return torch.full((2, AUDIO_BYTES // 8), float(slot))


def settled(reading, expected):
    """How many slots the thread has read, a while after it has read as many as expected."""
    deadline = time.monotonic() + 30
    while len(reading.read) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    return len(reading.read)


def test_slots_come_in_order_from_another_thread_and_once():
    reading = Reading()
    reader = ReadAhead(reading, 3, never_asked)
    taken = []
    for micro_index in reader.over(iter([0, 2, 3, 7, 8, 9, 11])):
        for slot in range(3 * micro_index, 3 * micro_index + 3):
            taken.append(slot)
            assert reader.take(slot)[0, 0] == slot
            assert reader.take(slot) is None
    reader.close()
    assert reading.read == taken
    assert not any(reading.main)


def test_it_looks_a_few_micro_batches_ahead():
    reading = Reading()
    reader = ReadAhead(reading, 2, never_asked)
    assert next(reader.over(iter(range(100)))) == 0
    expected = 2 * (MICRO_BATCHES_AHEAD + 1)
    assert settled(reading, expected) == expected
    reader.close()


@pytest.mark.parametrize("room", [1, 2.5, 3])
def test_no_more_waits_than_there_is_room_for_and_the_one_that_fills_it(monkeypatch, room):
    monkeypatch.setattr(read_ahead, "WAITING_BYTES", int(room * AUDIO_BYTES))
    reading = Reading()
    reader = ReadAhead(reading, 4, never_asked)
    indices = reader.over(iter(range(4)))
    next(indices)
    fit = int(-(-room // 1))
    assert settled(reading, fit) == fit
    for slot in range(5):
        assert reader.take(slot) is not None
        assert settled(reading, slot + 1 + fit) == slot + 1 + fit
    # One out of turn, for which there is no room: it comes all the same.
    assert reader.take(12)[0, 0] == 12
    reader.close()


def test_what_reading_raises_is_raised_where_the_slot_is_taken():
    def read(slot):
        if slot == 1:
            raise DataError("clip b: damaged")
        return torch.zeros(2, slot)

    reader = ReadAhead(read, 3, never_asked)
    assert next(reader.over(iter([0]))) == 0
    assert reader.take(0).shape == (2, 0)
    with pytest.raises(DataError, match="^clip b: damaged$"):
        reader.take(1)
    assert reader.take(2).shape == (2, 2)
    reader.close()


def reading_threads():
    return {thread for thread in threading.enumerate() if thread.name == "read-ahead"}


def test_a_read_that_hangs_keeps_nobody(monkeypatch):
    others = reading_threads()
    monkeypatch.setattr(read_ahead, "CLOSE_SECONDS", 0.3)
    hangs = threading.Event()
    begin = time.monotonic()

    def asked():
        if time.monotonic() - begin > 0.5:
            raise Interrupted("SIGTERM while reading audio")

    reader = ReadAhead(lambda slot: hangs.wait(60) and None, 1, asked)
    assert next(reader.over(iter([0, 1]))) == 0
    with pytest.raises(Interrupted):
        reader.take(0)
    reader.close()
    assert time.monotonic() - begin < 30
    (thread,) = reading_threads() - others
    assert thread.daemon
    hangs.set()
    thread.join(5)
    assert not thread.is_alive()


def wait_until_closed(reader):
    """Returns once the reader has been told to read no more."""
    # Its users never ask; a test that closes it on another thread has to know when.
    while not reader._closed:
        time.sleep(0.001)


def test_closing_ends_the_thread_and_reads_no_more():
    reading, begun, closing = Reading(), threading.Event(), threading.Event()
    others = reading_threads()

    def read(slot):
        begun.set()
        assert closing.wait(30)
        return reading(slot)

    reader = ReadAhead(read, 4, never_asked)
    next(reader.over(iter(range(20))))
    assert begun.wait(30)
    # The first is in hand until the reader is being closed.
    threading.Thread(target=lambda: (wait_until_closed(reader), closing.set())).start()
    reader.close()
    assert reading.read == [0]
    assert reading_threads() <= others
    reader.close()


LEAVES = """
import time, torch
from sa3dist import train
from sa3dist.data.batches import read_ahead as ahead
ahead.CLOSE_SECONDS = 0.1
began = []
def read(slot):
    began.append(slot)
    signal, kernel = torch.randn(1, 1, 200_000), torch.randn(1, 1, 999)
    while True:
        torch.nn.functional.conv1d(signal, kernel)
reader = ahead.ReadAhead(read, 1, lambda: None)
next(reader.over(iter([0])))
while not began:
    time.sleep(0.01)
reader.close()
print("said", flush=False)
train.end_process(75)
"""


def test_a_process_leaves_with_its_code_though_the_thread_is_in_the_middle_of_an_operator():
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (75, "said\n", "")
