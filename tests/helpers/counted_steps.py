"""Launches of a step as this tree's code makes them, held to their limits and to the stored counts."""

import functools
import json

import check_step

# Medium's blocks are alike: two show what one launches.
DEPTH = 2


def stored(adapter_type, frames):
    rows = json.loads(check_step.COUNTED.read_text())["rows"]
    return next(row for row in rows if (row["adapter_type"], row["frames"]) == (adapter_type, frames))


@functools.cache
def frozen(lengths):
    # It imports the compiler, which takes seconds, and every process of the suite reads the files that need this.
    import count_launches

    return count_launches.counted_step("frozen", "lora", lengths, depth=DEPTH)


def assert_within_limits(kind, lengths):
    """Counts, for every length, of the frozen model and of one with adapters of that kind."""
    import count_launches as counts

    bares, rows = frozen(tuple(lengths)), counts.counted_step("ours", kind, lengths, depth=DEPTH)
    for bare, row in zip(bares, rows, strict=True):
        assert bare["block_forward"] + bare["block_backward"] <= counts.PER_FROZEN_BLOCK
        assert row["total"] <= counts.most(bare, row)
        assert row["once_per_step"] <= counts.PER_STEP
        for name, counted in (("frozen", bare), (kind, row)):
            expected = stored(name, row["frames"])
            for way in ("block_forward", "block_backward"):
                assert counted[way] == expected[way], f"count_launches.py --json {check_step.COUNTED.name} is due"
    return bares, rows
