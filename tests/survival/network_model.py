"""What an optimiser step sends over the wire, and how long many GPUs wait for it: counted, then predicted.

Pure functions of sizes, bandwidths and latencies; docs/scaling.md tells what they were checked against.
Bytes are payload sent by one rank unless said otherwise; what a network adds (headers, acknowledgements) is
``ethernet_bytes``'s.
"""

from __future__ import annotations

import dataclasses
import math

FP32_BYTES, BF16_BYTES = 4, 2
# Losses, stop and trouble flags that travel with the gradients; see trainer.py.
SCALAR_BYTES = 18 * FP32_BYTES
# Gradients leave in pieces of this many values; see parallel/reduction.py.
BUCKET_ELEMENTS = 1 << 22
# Of a micro batch's computing, and how much of a pass the network can really work beside: the first layers' gradients
# come last, and copies take their part of the memory's bandwidth. An assumption.
BACKWARD_SHARE, USABLE_SHARE = 2 / 3, 0.8
# A full frame on a wire with 1500-byte packets: Ethernet 14, IPv4 20, TCP with timestamps 32, payload 1448.
SEGMENT_PAYLOAD_BYTES, SEGMENT_BYTES = 1448, 1514
# The receiver acknowledges every second segment with an empty one.
ACKNOWLEDGEMENT_BYTES = SEGMENT_BYTES - SEGMENT_PAYLOAD_BYTES
SEGMENTS_PER_ACKNOWLEDGEMENT = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is trained, on what, and how a step is divided.

    adapter_elements   trained float32 values
    base_elements      frozen values that ZeRO-3 partitions
    base_bytes         bytes of one of them: 2 in bf16
    accumulation       micro batches per rank and step
    passes             times a micro batch runs through the base: forward, backward, again when blocks are recomputed
    layers             pieces in which ZeRO-3 gathers the base
    """

    adapter_elements: int
    base_elements: int = 0
    base_bytes: int = BF16_BYTES
    accumulation: int = 1
    passes: int = 2
    layers: int = 1

    @property
    def adapter_bytes(self) -> int:
        return self.adapter_elements * FP32_BYTES


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One kind of collective of a step: ``times`` times over ``whole_bytes``, the size of the tensor all ranks share.

    beside   share of the step's computing beside which it can run; the step waits for the rest of it
    pieces   messages it is cut into, each of which waits for the network's latency
    """

    kind: str
    whole_bytes: float
    times: int = 1
    beside: float = 0.0
    pieces: int = 1


def ddp(sizes: Sizes, compressed: bool = False) -> list[Transfer]:
    """Ours: whole buckets of the gradient beside the step's last backward pass, the rest and the scalars after it."""
    value_bytes = BF16_BYTES if compressed else FP32_BYTES
    buckets, rest = divmod(sizes.adapter_elements, BUCKET_ELEMENTS)
    beside = USABLE_SHARE * BACKWARD_SHARE / sizes.accumulation
    early = Transfer("all-reduce", buckets * BUCKET_ELEMENTS * value_bytes, beside=beside, pieces=buckets)
    late = [rest * value_bytes, SCALAR_BYTES] if compressed else [rest * value_bytes + SCALAR_BYTES]
    return [early] * (buckets > 0) + [Transfer("all-reduce", whole) for whole in late]


def zero_1_or_2(sizes: Sizes) -> list[Transfer]:
    """Our all-reduce, once per step behind the last backward pass, then the stepped values, sent by their owners."""
    return [
        Transfer("all-reduce", sizes.adapter_bytes),
        Transfer("all-reduce", SCALAR_BYTES),
        Transfer("all-gather", sizes.adapter_bytes),
    ]


def zero_3(sizes: Sizes) -> list[Transfer]:
    """DeepSpeed stage 3: base and adapters gathered layer by layer in every pass, gradients scattered per micro batch.

    An upper bound: tensors below ``stage3_param_persistence_threshold`` stay whole on every rank and are not gathered.
    """
    whole = sizes.base_elements * sizes.base_bytes + sizes.adapter_bytes
    return [
        Transfer("all-gather", whole, sizes.accumulation * sizes.passes, USABLE_SHARE, sizes.layers),
        Transfer("reduce-scatter", sizes.adapter_bytes, sizes.accumulation, USABLE_SHARE),
        Transfer("all-reduce", SCALAR_BYTES),
    ]


MODES = {"ddp": ddp, "zero-1": zero_1_or_2, "zero-2": zero_1_or_2, "zero-3": zero_3}
# Share of the whole tensor that a ring sends from each rank, times (n - 1) / n.
RING_ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


def sent_bytes(transfers: list[Transfer], ranks: int) -> float:
    """Payload that each rank sends per optimiser step by the ring algorithm; no algorithm sends less."""
    share = (ranks - 1) / ranks
    return sum(RING_ROUNDS[each.kind] * share * each.whole_bytes * each.times for each in transfers)


def ethernet_bytes(payload: float, acknowledged: float = 0.0) -> float:
    """Bytes of the frames that carry ``payload`` over TCP, and of the acknowledgements for as much received."""
    segments = payload / SEGMENT_PAYLOAD_BYTES
    acknowledgements = acknowledged / SEGMENT_PAYLOAD_BYTES / SEGMENTS_PER_ACKNOWLEDGEMENT
    return segments * SEGMENT_BYTES + acknowledgements * ACKNOWLEDGEMENT_BYTES


@dataclasses.dataclass(frozen=True)
class Link:
    """bytes_per_second: what a collective reaches in one direction; latency_seconds: of one message."""

    bytes_per_second: float
    latency_seconds: float


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    inside          between GPUs of one node
    between         what one node's network interfaces carry together
    """

    gpus_per_node: int
    inside: Link
    between: Link

    def nodes(self, ranks: int) -> int:
        return math.ceil(ranks / self.gpus_per_node)


def transfer_seconds(transfer: Transfer, ranks: int, cluster: Cluster) -> float:
    """Time of one kind of collective in a step, done in two levels as NCCL does: rings in the node, a tree between.

    Each GPU of a node carries its own part of the tensor over the network: a node sends the tensor's share once.
    """
    nodes, inside = cluster.nodes(ranks), min(ranks, cluster.gpus_per_node)
    seconds = _level(transfer, inside, cluster.inside, hops=inside - 1)
    if nodes > 1:
        seconds += _level(transfer, nodes, cluster.between, hops=math.ceil(math.log2(nodes)))
    return transfer.times * seconds


def _level(transfer: Transfer, members: int, link: Link, hops: int) -> float:
    share = (members - 1) / members
    waiting = transfer.pieces * hops * link.latency_seconds
    return RING_ROUNDS[transfer.kind] * (share * transfer.whole_bytes / link.bytes_per_second + waiting)


def step_seconds(compute_seconds: float, transfers: list[Transfer], ranks: int, cluster: Cluster) -> float:
    """One optimiser step.

    compute_seconds   of the same step on one rank, with nothing to send: measured, not predicted here
    """
    hidden, exposed, window = 0.0, 0.0, 0.0
    for each in transfers:
        seconds = transfer_seconds(each, ranks, cluster)
        if each.beside:
            hidden += seconds
            window = max(window, each.beside * compute_seconds)
        else:
            exposed += seconds
    return compute_seconds + exposed + max(0.0, hidden - window)


def efficiency(compute_seconds: float, transfers: list[Transfer], ranks: int, cluster: Cluster) -> float:
    """Share of the GPUs' time that is not spent waiting for the network: 1 = twice the GPUs, twice the clips."""
    return compute_seconds / step_seconds(compute_seconds, transfers, ranks, cluster)
