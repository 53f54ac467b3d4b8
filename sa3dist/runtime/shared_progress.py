"""One bar over a phase that all ranks share: each tells the store how far it is, rank 0 shows the sum and the ranks."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from sa3dist.progress import clock_text, progress
from sa3dist.runtime.process_group import Group

# How often rank 0 looks at what the others have told.
LOOK_SECONDS = 1.0
# More ranks than this fill a line: then only the one that will be last is named.
NAMED_RANKS = 4


@contextlib.contextmanager
def shared_progress(group: Group, title: str, total: int, held: int = 0) -> Iterator[Callable[[int, float], None]]:
    """Gives report(done, share) to every rank; rank 0 shows all of them on stderr until its block ends.

    total   pieces of this rank        held   how many of them an earlier run has done
    done    pieces this rank has done, with those held        share   of what was left, by cost: what the ETA goes by
    The ETA of the whole is that of its slowest rank. Leave the block only when all ranks are done.
    """
    if not group.is_main:
        yield lambda done, share: group.tell(_key(title, group.dist_rank), [done, total, share])
        return
    heard = {0: (held, total, 0.0)}
    with progress(title, total, shown=True) as update:
        begin, ended = time.monotonic(), threading.Event()

        def show() -> None:
            for dist_rank in range(1, group.world_size):
                if (told := group.told(_key(title, dist_rank))) is not None:
                    heard[dist_rank] = tuple(told)
            update(*summary(dict(heard), group.world_size, time.monotonic() - begin))

        def watch() -> None:
            while not ended.wait(LOOK_SECONDS):
                # The store goes with the run; what ended that is told elsewhere.
                with contextlib.suppress(RuntimeError):
                    show()

        def report(done: int, share: float) -> None:
            heard[0] = (done, total, share)
            if group.world_size == 1:
                show()

        watcher = threading.Thread(target=watch, daemon=True)
        if group.world_size > 1:
            watcher.start()
        try:
            yield report
        finally:
            ended.set()
            if group.world_size > 1:
                watcher.join()
                with contextlib.suppress(RuntimeError):
                    show()


def summary(heard: dict[int, tuple[int, int, float]], world_size: int, elapsed: float) -> tuple[int, str, int, float]:
    """(done, text, total, seconds left) over the ranks heard of, each (done, total, share of its work)."""
    left = {
        dist_rank: 0.0 if done >= total else elapsed * (1 - share) / share if share > 0 else float("inf")
        for dist_rank, (done, total, share) in heard.items()
    }
    done, total = (sum(values[part] for values in heard.values()) for part in (0, 1))
    if world_size == 1:
        return done, "", total, left[0]

    def of_rank(dist_rank: int) -> str:
        return f"rank {dist_rank} {heard[dist_rank][0]}/{heard[dist_rank][1]} ETA {clock_text(left[dist_rank])}"

    slowest = max(left, key=lambda dist_rank: (left[dist_rank], dist_rank))
    if world_size <= NAMED_RANKS:
        text = ", ".join(of_rank(dist_rank) for dist_rank in sorted(heard))
    else:
        text = f"last: {of_rank(slowest)}"
    return done, text, total, left[slowest]


def _key(title: str, dist_rank: int) -> str:
    return f"sa3dist/progress/{title}/{dist_rank}"
