"""A compiler pass that replaces sums over tokens in a backward graph by ``token_sums``, joined where they may wait.

The compiler's own kernels for them are slow: each sum is a kernel on few programs, plus one that adds up. The pass runs
after the graph is partitioned into forward and backward; before, the partitioner would save whatever an opaque
operation reads from the forward pass.

    sum_k left * right          the gradient of a gate, a scale or, without right, a shift
    owner_BK @ (left * right)   the same per clip

Right is a stored tensor, possibly with casts, a factor per token (a norm's) or per channel, or a bias. These become
operands of ``token_sums``, so their result is not written to memory.

Legend: K tokens, E channels, B clips.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

# Registers the operation used below.
import sa3dist_kernels.token_sums  # noqa: F401

TOKEN_SUMS = torch.ops.sa3dist.token_sums.default
aten, CAST = torch.ops.aten, torch.ops.prims.convert_element_type.default
# Views; see ``_is_the_same`` for when they keep a tensor's last two axes.
VIEWS = (aten.view.default, aten.reshape.default, aten.select.int, aten.squeeze.dim, aten.unsqueeze.default)


@dataclasses.dataclass
class Match:
    """A matched ``TokenSum``: the graph nodes of its two results (None if absent) and of its operands."""

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
        """Sums with equal keys can be one operation."""
        return _dtype(self.left), _dtype(self.right or self.left), self.owner


def join_token_sums(graph: Graph, impl: str) -> None:
    """Replace the sums over tokens in ``graph``; ``impl`` is that of ``token_sums``."""
    matches = [match for node in graph.nodes if (match := _match(node)) is not None]
    deferrable = _merged([match for match in matches if _may_wait(match.nodes[0])])
    groups: dict[tuple, list[Match]] = {}
    for match in deferrable:
        groups.setdefault(match.group, []).append(match)
    groups |= {(index,): [match] for index, match in enumerate(matches) if not _may_wait(match.nodes[0])}
    order = {node: place for place, node in enumerate(graph.nodes)}
    for members in groups.values():
        _replace(graph, members, order, impl)
    graph.eliminate_dead_code()


def _match(node: Node) -> Match | None:
    """Match ``node`` as a sum over all tokens; None if it is something else."""
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
    # Only the token axis has a symbolic length.
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
    match = Match(result, None, *tokens, owner=owner)
    match.rows, match.scale = (*rows, None)[0], (*columns, None)[0]
    if match.right is None and not rows and not columns:
        match.products, match.plain = None, result
    elif match.right is not None:
        _take_bias(match)
    return match if _dtype(result) is _dtype(match.left) else None


def _rounded(node: Node, dtype: torch.dtype) -> Node | None:
    """The node that holds the sum in ``dtype``: on CUDA torch sums 16-bit values in float32 and casts afterwards."""
    while _dtype(node) is not dtype:
        users = list(node.users)
        if len(users) != 1 or not _is_the_same(users[0]):
            return None
        (node,) = users
    return node


def _factors(node: Node) -> Iterator[Node]:
    """The factors of ``node`` as a product, looking through views, casts and masks."""
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
    """Whether ``node`` has the values of its first argument, in another shape or dtype."""
    if node.target in VIEWS:
        return _last_two(node) is not None and _last_two(node) == _last_two(node.args[0])
    if node.target is CAST:
        return _dtype(node.args[0]).is_floating_point
    return node.target is aten.mul.Scalar and node.args[1] == 1


def _take_bias(match: Match) -> None:
    """If right is a stored tensor plus a bias, take both as operands instead of their sum."""
    if match.rows is not None or match.scale is not None:
        return
    for left, right in ((match.left, match.right), (match.right, match.left)):
        if right.target is aten.add.Tensor and not right.kwargs and isinstance(right.args[1], Node):
            values, bias = right.args
            if _shape(values) == _shape(right) and _shape(bias) == _shape(right)[-1:]:
                match.left, match.right, match.bias = left, values, bias
                return


def _merged(matches: list[Match]) -> list[Match]:
    """Merge plain sums into the matches that also multiply the same left, which compute both in one pass."""
    alone = {(match.left, match.owner): match for match in matches if match.products is None}
    for match in matches:
        if match.products is None or match.right is None:
            continue
        if (match.right, match.owner) in alone and match.bias is None:
            match.left, match.right = match.right, match.left
        plain = alone.pop((match.left, match.owner), None)
        match.plain = plain and plain.plain
    return [match for match in matches if match.products is not None or alone.get((match.left, match.owner)) is match]


def _replace(graph: Graph, members: list[Match], order: dict[Node, int], impl: str) -> None:
    """Insert one ``token_sums`` behind the last of the members' nodes and redirect what reads them."""
    operands = [[getattr(match, name) for match in members] for name in ("left", "right", "rows", "scale", "bias")]
    last_sum = last = max((node for match in members for node in match.nodes), key=order.__getitem__)
    with graph.inserting_after(last):
        joined = last = graph.call_function(TOKEN_SUMS, (*operands, members[0].owner, impl))
    clips = 1 if members[0].owner is None else _shape(members[0].owner)[0]
    lefts = [match.left.meta["val"] for match in members]
    joined.meta["val"] = [left.new_empty(clips, left.shape[-1]) for left in lefts for _ in range(2)]
    for index, match in enumerate(members):
        for part, node in enumerate((match.products, match.plain)):
            if node is None:
                continue
            with graph.inserting_after(last):
                item = graph.call_function(operator.getitem, (joined, 2 * index + part))
            item.meta["val"] = joined.meta["val"][2 * index + part]
            with graph.inserting_after(item):
                last = graph.call_function(aten.view.default, (item, list(_shape(node))))
            last.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(last)
            # Views and casts of the old sum that precede the joined operation move behind it.
            for user in _views_and_casts(last):
                if order[user] < order[last_sum]:
                    last.append(user)
                    last = user


def _views_and_casts(node: Node) -> Iterator[Node]:
    """Views and casts of a node, and of those, in topological order."""
    for user in list(node.users):
        if user.target in VIEWS or user.target is CAST:
            yield user
            yield from _views_and_casts(user)


def _may_wait(node: Node) -> bool:
    """Whether a result only leaves the graph, possibly through views and casts."""
    forwarded = list(_views_and_casts(node))
    return all(user.op == "output" or user in forwarded for each in (node, *forwarded) for user in each.users)


def _uncast(node: Node) -> Node:
    return _uncast(node.args[0]) if node.target is CAST else node


def _is_zero(node: object) -> bool:
    return (
        isinstance(node, Node) and node.target in (aten.full.default, aten.scalar_tensor.default) and node.args[-1] == 0
    )


def _shape(node: Node) -> tuple:
    """Lengths; expressions for symbolic ones, because comparing SymInts would add guards to the program."""
    return tuple(size if isinstance(size, int) else size.node.expr for size in node.meta["val"].shape)


def _last_two(node: Node) -> tuple | None:
    """Lengths of the last two axes; None if another axis is longer than 1."""
    *others, tokens, channels = 1, 1, *_shape(node)
    return None if set(others) - {1} else (tokens, channels)


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype
