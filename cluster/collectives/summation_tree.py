"""The order in which gradients are summed: one binary tree over the shards, the same for any number of workers.

Floating-point addition is not associative, so a sum over workers depends on their number. This sum runs along one tree
over the *shards*: [0, S) splits at the largest power of two below its size, down to single shards.
"""

from typing import Any

import torch
from torch import Tensor

Node = tuple[int, int]
"""A node of the summation tree: the shards [first, end) below it."""


class Fold:
    """Partial sums along the tree.

    Leaves, or sums of whole subtrees, are pushed in shard order; two neighbours that are children of one node are added
    up. What remains are the largest complete subtrees of what was pushed.
    """

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self.nodes: list[Node] = []
        self.sums: list[Any] = []

    def push(self, node: Node, value: Any) -> None:
        """Adds in place: from then on the fold owns ``value`` and everything pushed before.

        Shapes:
            value: a tensor, or a list of tensors, of the same shapes in every push.
        """
        self.nodes.append(node)
        self.sums.append(value)
        while len(self.nodes) > 1 and self._are_siblings(*self.nodes[-2:]):
            (_, end), right = self.nodes.pop(), self.sums.pop()
            (first, _), left = self.nodes[-1], self.sums[-1]
            if isinstance(left, Tensor):
                left.add_(right)
            else:
                torch._foreach_add_(left, right)
            self.nodes[-1] = (first, end)

    def _are_siblings(self, left: Node, right: Node) -> bool:
        size = left[1] - left[0]
        return (
            size & (size - 1) == 0
            and left[0] % (2 * size) == 0
            and right == (left[1], min(left[1] + size, self._shards))
        )


def complete_subtrees(block: range, shards: int) -> list[Node]:
    """Returns the nodes that remain after a worker has folded its block of shards."""
    fold = Fold(shards)
    for shard in block:
        fold.push((shard, shard + 1), torch.empty(0))
    return fold.nodes
