"""Starts that max_wall_time ends before their first step: the second in a row that leaves nothing new is refused."""

import contextlib
import json
import os
from pathlib import Path

from sa3dist.errors import ConfigError, Interrupted, OutOfTime
from sa3dist.formats import STATUS_NAME
from sa3dist.runtime.exit_status import KEPT_KEY
from sa3dist.runtime.signals import StopRequest

# The only part of a work directory whose unfinished files a later start continues.
DOWNLOADS = "downloads"


class StartLimit:
    """Compares what such a start leaves in ``work_dir`` with what the start before left.

    Created before the processes connect: rank 0 then removes the status of the start before.
    """

    def __init__(self, stop: StopRequest, output_dir: Path, work_dir: Path) -> None:
        self._stop, self._work_dir = stop, work_dir
        self._before = None
        # A damaged status has nothing to say.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._before = json.loads((output_dir / STATUS_NAME).read_text(encoding="utf-8")).get(KEPT_KEY)

    def judge(self, failure: Exception) -> Exception:
        """``failure``; as OutOfTime if max_wall_time ended this start before a step, or as ConfigError the second time.

        A scheduler that starts the run again at every 75 would otherwise do so for ever.
        """
        early = isinstance(failure, Interrupted) and self._stop.out_of_time
        if not (early or isinstance(failure, OutOfTime)) or getattr(failure, "kept", None) is not None:
            return failure
        kept = kept_in(self._work_dir)
        if kept == self._before:
            return ConfigError(
                f"max_wall_time: too short to begin, twice now without a step or anything new in {self._work_dir} "
                f"({str(failure).partition(';')[0]}); choose a longer time"
            )
        judged = OutOfTime(str(failure))
        judged.origin, judged.kept = failure.origin, kept
        return judged


def kept_in(work_dir: Path) -> list[int]:
    """The number of finished files below ``work_dir``, and of bytes among its downloads, unfinished ones included."""
    files = downloaded = 0
    for folder, folders, names in os.walk(work_dir):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += sum(not name.startswith(".") and not name.endswith(".part") for name in names)
        if DOWNLOADS in Path(folder).relative_to(work_dir).parts[:1]:
            for name in names:
                with contextlib.suppress(OSError):
                    downloaded += os.stat(os.path.join(folder, name)).st_size
    return [files, downloaded]
