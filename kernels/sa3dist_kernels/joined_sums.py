"""A compiler pass that joins the raw sums of all layers in a graph into one operation, and so into one launch.

Each layer's backward pass computes its own raw sums (``formed_linear``). Only FINISH reads them, so they may wait for
the last layer of a block; x, dy and z of its layers are kept until then.
"""

from __future__ import annotations

import operator

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

# Registers the operations used below.
import sa3dist_kernels.formed_linear  # noqa: F401
from sa3dist_kernels import joined_token_sums

SINGLE, JOINED = torch.ops.sa3dist.raw_sums.default, torch.ops.sa3dist.joined_raw_sums.default


class JoinedSums(CustomGraphPass):
    """The pass, for ``torch.compile``'s option "post_grad_custom_pre_pass".

    token_sums   ``impl`` for ``join_token_sums``, to replace other sums over tokens too; None leaves them as they are
    """

    def __init__(self, token_sums: str | None = None) -> None:
        self.token_sums = token_sums

    def __call__(self, graph: torch.fx.Graph) -> None:
        groups: dict[tuple, list[torch.fx.Node]] = {}
        for node in graph.nodes:
            # Sums that something else in the graph reads cannot wait.
            if node.target is SINGLE and all(user.op == "output" for user in node.users):
                groups.setdefault(tuple(node.args[6:]), []).append(node)
        for (kind, impl), nodes in groups.items():
            if len(nodes) > 1:
                _join(graph, nodes, kind, impl)
        if self.token_sums is not None:
            joined_token_sums.join_token_sums(graph, self.token_sums)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, joined_token_sums.__file__), extra=str(self.token_sums))


def _join(graph: torch.fx.Graph, nodes: list[torch.fx.Node], kind: str, impl: str) -> None:
    # One list each of x, dx, dy, z, L' and R'; empty where the type has no such tensor.
    tensors = [
        [value for value in values if value is not None]
        for values in zip(*(node.args[:6] for node in nodes), strict=True)
    ]
    with graph.inserting_after(nodes[-1]):
        joined = graph.call_function(JOINED, (*tensors, kind, impl))
    joined.meta["val"] = [node.meta["val"] for node in nodes]
    last = joined
    for index, node in enumerate(nodes):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (joined, index))
        last.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(last)
        graph.erase_node(node)
