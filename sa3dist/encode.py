"""Stage two: clips and captions become latents and prompt features on disk, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable

from sa3dist.data.crops import EncodedCrops
from sa3dist.data.latents import EncodedClips
from sa3dist.data.order import ClipOrder, micro_batch_slots
from sa3dist.data.stream import polarity_of_slot
from sa3dist.errors import SA3DistError
from sa3dist.parallel.group import Group, all_done
from sa3dist.parallel.outcome import translate
from sa3dist.parallel.signals import StopRequest


def encode_all(
    base,
    encoded: EncodedClips,
    group: Group,
    stop: StopRequest,
    report: Callable[[int, int], None] | None = None,
    order: ClipOrder | None = None,
    slots: int = 0,
) -> None:
    """Encode every clip in both polarities and every distinct caption; what is on disk already is not done again.

    Where crops are encoded, those of the first ``slots`` slots of ``order`` take the place of the clips.

    Each rank takes every world_size-th piece of work; all return together, however long the slowest one takes.
    report   called with (done, total) of this rank
    Raises what failed on any rank, on every rank.
    """
    captions = sorted({clip.caption for clip in encoded.clips})
    work: list[Callable[[], None]] = [lambda c=caption: encoded.encode_prompts(base, [c]) for caption in captions]
    if isinstance(encoded, EncodedCrops):
        for slot in range(slots):
            clip = encoded.clips[order.clip_of_slot(slot)]
            work.append(lambda c=clip, s=slot: encoded.encode_slot(base, c, order.seed, s))
    else:
        # Both polarities: the autoencoder is not linear, so the latents of a flipped clip are not the flipped latents.
        for clip in encoded.clips:
            work += [lambda c=clip, f=flipped: encoded.encode_latents(base, c, f) for flipped in (False, True)]
    mine = work[group.dist_rank :: group.world_size]
    problem: SA3DistError | None = None
    try:
        for done, piece in enumerate(mine, start=1):
            stop.raise_if_asked("encoding")
            piece()
            if report:
                report(done, len(mine))
    except Exception as failure:
        problem = translate(failure)
        if problem is None:
            all_done(group, "encode", SA3DistError(f"{type(failure).__name__}: {failure}"), stop)
            raise
    all_done(group, "encode", problem, stop)


def encode_on_first_use(base, encoded: EncodedClips, order: ClipOrder, micro_batch: int) -> Callable[[int], None]:
    """A function that encodes what one micro batch still lacks, given its index.

    The encoders are loaded when the first file is missing, and leave the memory when all have been seen.
    """
    ready: set[tuple[int, bool]] = set()

    def prepare(micro_index: int) -> None:
        for slot in micro_batch_slots(micro_index, micro_batch):
            number, flipped = order.clip_of_slot(slot), polarity_of_slot(order.seed, slot)
            if (number, flipped) in ready:
                continue
            encoded.encode_prompts(base, [encoded.clips[number].caption])
            encoded.encode_latents(base, encoded.clips[number], flipped)
            ready.add((number, flipped))
            if len(ready) == 2 * len(encoded.clips):
                base.release_encoders()

    return prepare
