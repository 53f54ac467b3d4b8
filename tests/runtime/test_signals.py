"""Processes that end with the one that started them."""

import os
import select
import signal

from sa3dist.runtime.signals import end_with_parent


def test_a_process_that_ends_with_its_parent_does_so_when_that_is_killed():
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        if not os.fork():
            end_with_parent()
            os.write(write, b"ready")
        signal.pause()
        os._exit(0)
    os.close(write)
    assert os.read(read, 5) == b"ready"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    # Both held the other end.
    assert select.select([read], [], [], 30)[0]
    assert os.read(read, 1) == b""
    os.close(read)
