"""The exchange of slices of a gradient among the peers of a level: one collective call in each direction."""

import math
from collections.abc import Sequence
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.collectives.groups import all_gather_flat, new_group
from cluster.collectives.summation_tree import Fold, complete_subtrees
from cluster.collectives.topology import Level, Peers

_SLICE_ALIGNMENT = 16
"""Slices begin at multiples of this many bytes, so that kernels and NCCL move whole vectors."""


class SliceExchange:
    """The exchange of slices among the peers of one level.

    A bucket, padded at its end, has equal pieces. The peers of a level exchange a region of pieces; the slice that one
    of them owns is its region at the next level.

    Collective: every peer constructs it, and calls ``scatter`` for the same buckets in the same order, and ``gather``.

    Thread: one calls ``scatter``, another may call ``gather``.
    """

    def __init__(
        self, peers: Peers, rank: int, region: range, num_pieces: int, shards: int, timeout_s: float | None
    ) -> None:
        """Opens the process groups.

        Args:
            peers: The workers that exchange slices.
            rank: The rank of this worker, one of them.
            region: The pieces that they exchange.
            num_pieces: The number of pieces of a bucket.
            shards: The number of shards of a step.
            timeout_s: The longest wait for a peer, in seconds; None: torch's default.
        """
        self._source = peers.ranks[0]
        self._place = peers.ranks.index(rank)
        self._num_slices = peers.num_slices
        self._region = region
        self._num_pieces = num_pieces
        self._shards = shards
        self._nodes = [complete_subtrees(block, shards) for block in peers.blocks]
        self.own_pieces = range(0)
        """The pieces that this worker owns."""
        if self._place < self._num_slices:
            length = len(region) // self._num_slices
            self.own_pieces = region[self._place * length : (self._place + 1) * length]
        # Two groups, because one bucket is scattered while another one is gathered.
        self._scattering = new_group(timeout_s, ranks=peers.ranks)
        self._gathering = new_group(timeout_s, ranks=peers.ranks)

    def padded_length(self, buffer: Tensor) -> int:
        """Returns the length of a bucket, rounded up so that its pieces are equal and aligned."""
        unit = self._num_pieces * max(1, _SLICE_ALIGNMENT // buffer.itemsize)
        return math.ceil(buffer.numel() / unit) * unit

    def scatter(self, sums: list[Tensor], padded_length: int) -> list[Tensor]:
        """Sends each peer the partial sums of its slice; returns the partial sums of all peers in this rank's slice.

        Args:
            sums: This rank's partial sums of the region, which end where the bucket ends.
            padded_length: The length of the bucket, rounded up.

        Shapes:
            sums: [length of the region] each -> [length of this rank's slice] each, none if it owns no slice.
        """
        length = sums[0].numel()
        slice_length = padded_length // self._num_pieces * len(self._region) // self._num_slices
        # The last slices may be cut short by the end of the bucket, and peers without a slice get nothing.
        ends = [min(number * slice_length, length) for number in range(len(self._nodes) + 1)]
        slices = list(pairwise(ends))
        own_length = slices[self._place][1] - slices[self._place][0]
        packed = sums[0] if len(sums) == 1 else torch.cat([each[begin:end] for begin, end in slices for each in sums])
        received = packed.new_empty(sum(map(len, self._nodes)), own_length)
        dist.all_to_all_single(
            received.view(-1),
            packed,
            [len(nodes) * own_length for nodes in self._nodes],
            [len(sums) * (end - begin) for begin, end in slices],
            group=self._scattering,
        )
        if not self.own_pieces:
            return []
        fold = Fold(self._shards)
        for node, partial in zip(chain.from_iterable(self._nodes), received):
            fold.push(node, partial)
        return fold.sums

    def gather(self, whole: Tensor) -> None:
        """Completes the region of a bucket, in place, of which each peer with a slice has that slice.

        Shapes:
            whole: [padded length of the bucket].
        """
        region = self._at(whole, self._region)
        if self._num_slices == 1:
            dist.broadcast(region, self._source, group=self._gathering)
        else:
            all_gather_flat(region, self.own_slice(whole), group=self._gathering)

    def own_slice(self, whole: Tensor) -> Tensor:
        """Returns the slice that this worker owns. Shapes: [padded length of the bucket] -> [length of a slice]."""
        return self._at(whole, self.own_pieces)

    def _at(self, whole: Tensor, pieces: range) -> Tensor:
        return whole.view(self._num_pieces, -1)[pieces.start : pieces.stop].view(-1)


def open_levels(levels: Sequence[Level], rank: int, shards: int, timeout_s: float | None) -> list[SliceExchange]:
    """Opens the exchanges of a rank, from its own sums to those of all shards, or to the first without a slice of it.

    Collective: every rank of the default group, because torch names a group by the number of groups before it.
    """
    num_pieces = math.prod(max(peers.num_slices for peers in level) for level in levels)
    region = range(num_pieces)
    opened: list[SliceExchange] = []
    for level in levels:
        (peers,) = (peers for peers in level if rank in peers.ranks)
        opened.append(SliceExchange(peers, rank, region, num_pieces, shards, timeout_s))
        region = opened[-1].own_pieces
    has_part = [True, *(bool(level.own_pieces) for level in opened)]
    return [level for level, owns in zip(opened, has_part) if owns]
