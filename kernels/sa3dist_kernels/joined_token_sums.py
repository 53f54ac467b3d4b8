"""A pass over a compiled backward graph that gives its sums over tokens to ``token_sums``, joined where they may wait.

The compiler's own kernels for them are slow: one for each sum that spreads it over few programs, and one that adds up.
The graph is looked at once it is divided into forward and backward: before, the compiler would keep from the forward
pass whatever an operation reads that it does not look into.

    sum_k left * right       the gradient of a gate, of a scale or, without right, of a shift
    owner_BK @ (left * right)   likewise of several clips

where right is made of a kept tensor by casts, a factor of each token (a norm's) or of each channel, or a bias. These
enter the sums; what they make is not written to memory.

Legend: K tokens, E channels, B clips.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

# Registers the operation.
import sa3dist_kernels.token_sums  # noqa: F401

TOKEN_SUMS = torch.ops.sa3dist.token_sums.default
aten, CAST = torch.ops.aten, torch.ops.prims.convert_element_type.default
# They change nothing where both sides have the same two last axes, and others of length 1.
VIEWS = (aten.view.default, aten.reshape.default, aten.select.int, aten.squeeze.dim, aten.unsqueeze.default)


@dataclasses.dataclass
class Found:
    """Nodes of the graph: the sums themselves, and what they are of; see ``TokenSum``."""

    products: Node | None
    plain: Node | None
    left: Node
    right: Node | None = None
    rows: Node | None = None
    scale: Node | None = None
    bias: Node | None = None
    owner: Node | None = None

    @property
    def nodes(self) -> list[Node]:
        return [node for node in (self.products, self.plain) if node is not None]

    @property
    def group(self) -> tuple:
        """Alike among those that are one operation."""
        return _dtype(self.left), _dtype(self.right or self.left), self.owner


def join_token_sums(graph: Graph, impl: str) -> None:
    """impl: of ``token_sums``."""
    found = [each for node in graph.nodes if (each := _found(node)) is not None]
    waiting = _merged([each for each in found if _may_wait(each.nodes[0])])
    groups: dict[tuple, list[Found]] = {}
    for each in waiting:
        groups.setdefault(each.group, []).append(each)
    groups |= {(index,): [each] for index, each in enumerate(found) if not _may_wait(each.nodes[0])}
    order = {node: place for place, node in enumerate(graph.nodes)}
    for members in groups.values():
        _replace(graph, members, order, impl)
    graph.eliminate_dead_code()


def _found(node: Node) -> Found | None:
    """What ``node`` sums over all tokens, or None where it is something else."""
    owner, values = None, node.args[0] if node.args else None
    if node.target is aten.sum.dim_IntList:
        axes = {axis % len(_shape(values)) - len(_shape(values)) for axis in node.args[1]}
        over_tokens = -2 in axes and -1 not in axes
    elif node.target is aten.mm.default:
        owner, values = _uncast(values), node.args[1]
        over_tokens = _dtype(owner) is torch.bool
    else:
        return None
    K, E = _last_two(values) or (0, 0)
    # The tokens' axis alone has any length.
    if not over_tokens or isinstance(K, int) or not isinstance(E, int):
        return None
    tokens, rows, columns = [], [], []
    for factor in _factors(values):
        kind = {(K, E): tokens, (K, 1): rows, (1, E): columns}.get(_last_two(factor))
        if kind is None:
            return None
        kind.append(factor)
    if len(tokens) not in (1, 2) or len(rows) > 1 or len(columns) > 1:
        return None
    result = _rounded(node, _dtype(tokens[0]))
    if result is None:
        return None
    found = Found(result, None, *tokens, owner=owner)
    found.rows, found.scale = (*rows, None)[0], (*columns, None)[0]
    if found.right is None and not rows and not columns:
        found.products, found.plain = None, result
    elif found.right is not None:
        _take_bias(found)
    return found if _dtype(result) is _dtype(found.left) else None


def _rounded(node: Node, dtype: torch.dtype) -> Node | None:
    """A sum in the format that is wanted: on CUDA torch adds 16 bit numbers in float32, and rounds what it shapes."""
    while _dtype(node) is not dtype:
        users = list(node.users)
        if len(users) != 1 or not _is_the_same(users[0]):
            return None
        (node,) = users
    return node


def _factors(node: Node) -> Iterator[Node]:
    """``node`` as a product: what is multiplied, as it is kept in memory or made by something else."""
    if _is_the_same(node):
        yield from _factors(node.args[0])
    elif node.target is aten.mul.Tensor and isinstance(node.args[1], Node):
        yield from _factors(node.args[0])
        yield from _factors(node.args[1])
    elif node.target is aten.where.self and _is_zero(node.args[2]):
        yield node.args[0]
        yield from _factors(node.args[1])
    else:
        yield node


def _is_the_same(node: Node) -> bool:
    """Whether ``node`` holds what its first argument does, but for shape and format."""
    if node.target in VIEWS:
        return _last_two(node) is not None and _last_two(node) == _last_two(node.args[0])
    if node.target is CAST:
        return _dtype(node.args[0]).is_floating_point
    return node.target is aten.mul.Scalar and node.args[1] == 1


def _take_bias(found: Found) -> None:
    """Where right is itself the sum of a product's result and a bias, that is not made again."""
    if found.rows is not None or found.scale is not None:
        return
    for left, right in ((found.left, found.right), (found.right, found.left)):
        if right.target is aten.add.Tensor and not right.kwargs and isinstance(right.args[1], Node):
            values, bias = right.args
            if _shape(values) == _shape(right) and _shape(bias) == _shape(right)[-1:]:
                found.left, found.right, found.bias = left, values, bias
                return


def _merged(found: list[Found]) -> list[Found]:
    """Plain sums of what is multiplied elsewhere come with the products."""
    alone = {(each.left, each.owner): each for each in found if each.products is None}
    for each in found:
        if each.products is None or each.right is None:
            continue
        if (each.right, each.owner) in alone and each.bias is None:
            each.left, each.right = each.right, each.left
        plain = alone.pop((each.left, each.owner), None)
        each.plain = plain and plain.plain
    return [each for each in found if each.products is not None or alone.get((each.left, each.owner)) is each]


def _replace(graph: Graph, members: list[Found], order: dict[Node, int], impl: str) -> None:
    columns = [[getattr(each, name) for each in members] for name in ("left", "right", "rows", "scale", "bias")]
    last = place = max((node for each in members for node in each.nodes), key=order.__getitem__)
    with graph.inserting_after(place):
        made = place = graph.call_function(TOKEN_SUMS, (*columns, members[0].owner, impl))
    clips = 1 if members[0].owner is None else _shape(members[0].owner)[0]
    lefts = [each.left.meta["val"] for each in members]
    made.meta["val"] = [left.new_empty(clips, left.shape[-1]) for left in lefts for _ in range(2)]
    for index, each in enumerate(members):
        for part, node in enumerate((each.products, each.plain)):
            if node is None:
                continue
            with graph.inserting_after(place):
                got = graph.call_function(operator.getitem, (made, 2 * index + part))
            got.meta["val"] = made.meta["val"][2 * index + part]
            with graph.inserting_after(got):
                place = graph.call_function(aten.view.default, (got, list(_shape(node))))
            place.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(place)
            for user in _passed_on(place):
                if order[user] < order[last]:
                    place.append(user)
                    place = user


def _passed_on(node: Node) -> Iterator[Node]:
    """Views and casts of a result, and those of them, in an order in which they can be made."""
    for user in list(node.users):
        if user.target in VIEWS or user.target is CAST:
            yield user
            yield from _passed_on(user)


def _may_wait(node: Node) -> bool:
    """Whether nothing reads a result within this graph."""
    passed_on = list(_passed_on(node))
    return all(user.op == "output" or user in passed_on for each in (node, *passed_on) for user in each.users)


def _uncast(node: Node) -> Node:
    return _uncast(node.args[0]) if node.target is CAST else node


def _is_zero(node: object) -> bool:
    return (
        isinstance(node, Node) and node.target in (aten.full.default, aten.scalar_tensor.default) and node.args[-1] == 0
    )


def _shape(node: Node) -> tuple:
    """Numbers and, of axes of any length, expressions: to compare these adds no condition to the program."""
    return tuple(size if isinstance(size, int) else size.node.expr for size in node.meta["val"].shape)


def _last_two(node: Node) -> tuple | None:
    """Lengths of the last two axes, None where others are longer than 1."""
    *others, tokens, channels = 1, 1, *_shape(node)
    return None if set(others) - {1} else (tokens, channels)


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype
