"""The summation tree: the same bits, wherever the shards are."""

from functools import reduce
from itertools import pairwise, starmap

import pytest
import torch
from torch import Tensor

from cluster.collectives.summation_tree import Fold, complete_subtrees


def leaves(shards: int) -> list[Tensor]:
    """Gradients of very different sizes, so that every order of a sum has its own last bits."""
    generator = torch.Generator().manual_seed(shards)
    return [torch.randn(257, generator=generator) * 10 ** (shard % 3) for shard in range(shards)]


def folded(shards: int, nodes: list[tuple[int, int]], values: list[Tensor]) -> Fold:
    fold = Fold(shards)
    for node, value in zip(nodes, values):
        fold.push(node, value.clone())
    return fold


def fold_of_block(shards: int, block: range) -> Fold:
    return folded(shards, [(shard, shard + 1) for shard in block], [leaves(shards)[shard] for shard in block])


def even_blocks(shards: int, world_size: int) -> list[range]:
    """Blocks that cut across subtrees; those of a run avoid it where they can."""
    ends = [shards * rank // world_size for rank in range(world_size + 1)]
    return list(starmap(range, pairwise(ends)))


def sum_along_the_tree(values: list[Tensor]) -> Tensor:
    """The definition: a range splits at the largest power of two below its size."""
    if len(values) == 1:
        return values[0]
    split = 1 << (len(values) - 1).bit_length() - 1
    return sum_along_the_tree(values[:split]) + sum_along_the_tree(values[split:])


@pytest.mark.parametrize("shards", range(1, 18))
class TestFold:
    def test_all_leaves_become_the_sum_along_the_tree(self, shards: int) -> None:
        fold = fold_of_block(shards, range(shards))

        assert fold.nodes == [(0, shards)]
        assert torch.equal(fold.sums[0], sum_along_the_tree(leaves(shards)))

    def test_blocks_and_then_their_partial_sums_give_the_same_bits(self, shards: int) -> None:
        for world_size in range(1, shards + 1):
            of_ranks = [fold_of_block(shards, block) for block in even_blocks(shards, world_size)]

            total = folded(
                shards, [node for fold in of_ranks for node in fold.nodes], [s for fold in of_ranks for s in fold.sums]
            )

            assert total.nodes == [(0, shards)]
            assert torch.equal(total.sums[0], sum_along_the_tree(leaves(shards)))

    def test_the_nodes_of_a_block_are_known_without_its_gradients(self, shards: int) -> None:
        for world_size in range(1, shards + 1):
            for block in even_blocks(shards, world_size):
                nodes = complete_subtrees(block, shards)

                assert nodes == fold_of_block(shards, block).nodes
                assert [shard for first, end in nodes for shard in range(first, end)] == list(block)
                assert len(nodes) <= 2 * len(block).bit_length()


def test_another_order_gives_other_bits() -> None:
    """So the comparisons above can fail. Up to 3 shards the tree is the order from left to right."""
    for shards in range(4, 18):
        assert not torch.equal(reduce(torch.add, leaves(shards)), sum_along_the_tree(leaves(shards)))


def test_lists_of_tensors_fold_like_each_of_their_tensors() -> None:
    fold = Fold(6)
    for shard, leaf in enumerate(leaves(6)):
        fold.push((shard, shard + 1), [leaf.clone(), 3 * leaf.view(1, -1)])

    first, second = fold.sums[0]
    assert torch.equal(first, sum_along_the_tree(leaves(6)))
    assert torch.equal(second, sum_along_the_tree([3 * leaf.view(1, -1) for leaf in leaves(6)]))
