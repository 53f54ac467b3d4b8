"""Forward and backward pass of a micro batch as one CUDA graph: one launch from the host instead of thousands.

With short clips the GPU waits for its host. A pass depends on shapes alone, but for its values, and nothing in it reads
from the device. So it can be recorded once per shape and replayed on other values, copied into the tensors that it
was recorded with.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
from collections.abc import Callable, Hashable, Iterator

import torch

from sa3dist.data.batches.micro_batch import MicroBatch
from sa3dist.model.packing import FilledPacking, Packing
from sa3dist.training.graph_recorder import Recorder, Tensors

log = logging.getLogger(__name__)

# A shorter run does not earn back the time of recording.
STEPS_WORTH_RECORDING = 50
# A ladder has 24 rungs for one clip of up to 380 s, each with and without context given; large micro batches have more.
MOST_GRAPHS = 96
# Relative distance of a replay from the ordinary pass. Both run the same kernels, but flash attention adds in varying
# order.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 1e-2
# In a deep bfloat16 model that order matters more: the replay may also be this many times as far from the ordinary pass
# as a repetition of the ordinary pass is.
TIMES_AS_FAR = 4.0


def wants_graphs(choice: str, device: torch.device, steps: int) -> bool:
    """Whether to record: as told; with ``auto`` on CUDA, if the run is long enough."""
    if choice != "auto":
        return choice == "on"
    chosen = device.type == "cuda" and steps >= STEPS_WORTH_RECORDING
    if device.type == "cuda":
        log.info("cuda_graphs: auto chose %s", "on" if chosen else "off")
    return chosen


@dataclasses.dataclass
class _Recorded:
    """The graph of one shape, the micro batch it reads, and whether a replay was compared with an ordinary pass."""

    batch: MicroBatch
    replay: Callable[[], Tensors]
    compared: bool = False


class CudaGraphs:
    """Runs the passes of micro batches, and replays graphs for frequent shapes.

    The first micro batch of a shape takes the ordinary pass. Before the second one's, the pass is recorded. The third
    takes both: if loss or gradient disagree, no graph is used any more. Any other problem with a graph also turns all
    graphs off, with one warning; the training goes on.
    """

    def __init__(
        self,
        passes: Callable[[MicroBatch, bool], Tensors],
        recordable: Callable[[MicroBatch], Tensors],
        gradient: torch.Tensor,
        recorder: Recorder | None,
        exact: bool = False,
    ) -> None:
        """
        passes      (micro batch, last of its step) -> losses: forward and backward, adds to ``gradient``
        recordable  the same as a function of shapes and values alone: reads no state of the step, sends nothing
        recorder    None: record nothing
        exact       a replay must equal an ordinary pass bit by bit: a continued run may replace one by the other
        """
        self._passes = passes
        self._recordable = recordable
        self._gradient = gradient
        self._recorder = recorder
        self._exact = exact
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, _Recorded] = {}
        # Input tensors of graphs, shared by graphs with equal shapes: only one is replayed at a time.
        self._inputs: dict[Hashable, torch.Tensor] = {}

    @property
    def shapes(self) -> int:
        """Number of shapes that are replayed."""
        return sum(recorded.compared for recorded in self._recorded.values())

    def __call__(self, batch: MicroBatch, last: bool) -> Tensors:
        """Losses of a micro batch; its gradients are added."""
        key = shape_of(batch)
        recorded = self._recorded.get(key)
        if recorded is None:
            # Before the pass itself, whose gradients may be sent to other ranks as they arrive.
            if self._seen_before(key):
                self._record(key, batch)
            return self._passes(batch, last)
        copy_values(batch, recorded.batch)
        if recorded.compared:
            # stack copies in one launch: the next replay overwrites these results.
            return torch.stack(recorded.replay()).unbind()
        return self._compare(batch, recorded)

    def _seen_before(self, key: Hashable) -> bool:
        if self._recorder is None or len(self._recorded) == MOST_GRAPHS:
            return False
        seen = key in self._seen
        self._seen.add(key)
        return seen

    def drop(self) -> None:
        """Stop using graphs and free their memory."""
        self._recorder = None
        self._recorded.clear()
        self._inputs.clear()
        gc.collect()
        if self._gradient.is_cuda:
            torch.cuda.empty_cache()

    def _record(self, key: Hashable, batch: MicroBatch) -> None:
        before = self._gradient.clone()
        try:
            own = self._own(batch)
            self._recorder.warm_up(lambda: self._recordable(own))
            self._recorded[key] = _Recorded(own, self._recorder.record(lambda: self._recordable(own)))
        except Exception as problem:
            # Whatever the driver raises, the ordinary pass still works.
            self._give_up(problem)
        # Undo what the warm-up has added.
        self._gradient.copy_(before)

    def _own(self, batch: MicroBatch) -> MicroBatch:
        """A copy of ``batch`` in the input tensors of graphs."""
        own = batch.clone()
        for holder, name, value in _places(own):
            key = name, value.dtype, tuple(value.shape)
            shared = self._inputs.setdefault(key, value)
            if shared is not value:
                shared.copy_(value)
                object.__setattr__(holder, name.rpartition(".")[2], shared)
        return own

    def _compare(self, batch: MicroBatch, recorded: _Recorded) -> Tensors:
        before = self._gradient.clone()
        losses = self._passes(batch, False)
        after = self._gradient.clone()

        # exact compares the sums themselves: subtracting what was there before could round a difference away.
        begin = 0.0 if self._exact else before

        def distances(run: Callable[[], Tensors]) -> list[float]:
            """Relative distances of gradient and losses from those of the pass above."""
            self._gradient.copy_(before)
            found = torch.stack(run()).detach()
            gradient = _distance(self._gradient - begin, after - begin)
            return torch.stack([gradient, _distance(found, torch.stack(losses).detach())]).tolist()

        try:
            found = distances(recorded.replay)
            limits = [0.0, 0.0] if self._exact else [GRADIENT_TOLERANCE, LOSS_TOLERANCE]
            recorded.compared = _all_within(found, limits)
            if not (recorded.compared or self._exact):
                again = distances(lambda: self._passes(batch, False))
                limits = [max(limit, TIMES_AS_FAR * noise) for limit, noise in zip(limits, again, strict=True)]
                recorded.compared = _all_within(found, limits)
            if not recorded.compared:
                off = ", ".join(f"{value:.1e} (limit {limit:.0e})" for value, limit in zip(found, limits, strict=True))
                self._give_up(f"gradient and losses of a replay are off ordinary ones by {off}")
        except Exception as problem:
            self._give_up(problem)
        self._gradient.copy_(after)
        return losses

    def _give_up(self, why: str | Exception) -> None:
        while isinstance(why, Exception) and why.__context__ is not None:
            # Ending a failed recording raises again: report the first error.
            why = why.__context__
        log.warning("cuda_graphs: training goes on without them: %s", str(why).partition("\n")[0])
        self.drop()


def _all_within(values: list[float], limits: list[float]) -> bool:
    """NaN counts as outside."""
    return all(value <= limit for value, limit in zip(values, limits, strict=True))


def _distance(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative L2 distance. 0 only for equal tensors: in float64 no square underflows."""
    norm = functools.partial(torch.linalg.vector_norm, dtype=torch.float64)
    return norm(found - expected) / norm(expected).clamp_min(torch.finfo(torch.float32).tiny)


def _places(batch: MicroBatch) -> Iterator[tuple[object, str, torch.Tensor]]:
    """Every tensor of a micro batch: the object that holds it, its name, and the tensor."""
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            yield batch, name, value
        elif isinstance(value, Packing | FilledPacking):
            for part, tensor in vars(value).items():
                if isinstance(tensor, torch.Tensor):
                    yield value, f"{name}.{part}", tensor


def shape_of(batch: MicroBatch) -> Hashable:
    """Everything a pass depends on but for the values of its tensors."""
    packing = (batch.packing.frames, batch.packing.lengths) if isinstance(batch.packing, Packing) else None
    shapes = tuple((name, value.dtype, tuple(value.shape)) for _, name, value in _places(batch))
    return shapes, packing, batch.has_context, batch.prompt_length


def copy_values(source: MicroBatch, target: MicroBatch) -> None:
    """Copy the tensors of one micro batch into another with equal ``shape_of``."""
    for (*_, value), (*_, own) in zip(_places(source), _places(target), strict=True):
        own.copy_(value)
