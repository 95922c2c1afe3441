"""The exchange of slices of a gradient among the peers of a level: one collective call in each direction."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from cluster.collectives.buffer_pool import BufferPool
from cluster.collectives.groups import all_to_all, new_group
from cluster.collectives.summation_tree import Fold, complete_subtrees
from cluster.collectives.topology import Level, Peers

_SLICE_ALIGNMENT = 16
"""Slices begin at multiples of this many bytes, so that kernels and NCCL move whole vectors."""
_BUCKETS_IN_FLIGHT = 4
"""Buckets of which a level holds partial sums. Between hosts one is scattered and one gathered, and one waits on either
side, so that neither stands idle."""


class SliceExchange:
    """The exchange of slices among the peers of one level.

    The peers bring partial sums of one region of a bucket. Each peer that owns a slice of it receives all partial sums
    of that slice (``scattered``), and sends the slice to all peers once it is complete (``gather``).

    Collective: every peer constructs it, and calls each of ``scattered`` and ``gather`` for the same buckets in order.

    Thread: one calls ``scattered``, another may call ``gather``.
    """

    def __init__(self, peers: Peers, rank: int, shards: int, timeout_s: float | None) -> None:
        """Opens the process groups.

        Args:
            peers: The workers that exchange slices; ``rank``, this worker's, is one of them.
            rank: The rank of this worker.
            shards: The number of shards of a step.
            timeout_s: The longest wait for a peer, in seconds; None: torch's default.
        """
        self._place = peers.ranks.index(rank)
        self._num_slices = peers.num_slices
        self._shards = shards
        self._nodes = [complete_subtrees(block, shards) for block in peers.blocks]
        self._pool = BufferPool(_BUCKETS_IN_FLIGHT)
        # Two groups, because one bucket is scattered while another one is gathered.
        self._scattering = new_group(timeout_s, ranks=peers.ranks)
        self._gathering = new_group(timeout_s, ranks=peers.ranks)

    @contextmanager
    def scattered(self, sums: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Sends each peer the partial sums of its slice; adds up those of this worker's slice, for a context.

        A context holds memory for one bucket. If as many as may be in flight hold some, this waits until one ends.

        Shapes:
            sums: [length of the region] each; overwritten -> the partial sums that remain, [length of the own slice]
            each; none if this worker owns no slice.
        """
        by_peer = list(zip(*(self._slices(each) for each in sums)))
        own = by_peer[self._place]
        sent = [
            of_peer[0] if len(of_peer) == 1 or place == self._place else torch.cat(of_peer)
            for place, of_peer in enumerate(by_peer)
        ]
        rows = [0 if place == self._place else len(nodes) for place, nodes in enumerate(self._nodes)]
        with self._pool.lend(own[0], sum(rows) * own[0].numel()) as memory:
            received = memory.view(sum(rows), own[0].numel()).split(rows)
            all_to_all([of_peer.view(-1) for of_peer in received], sent, self._scattering)
            fold = Fold(self._shards)
            for place, nodes in enumerate(self._nodes if self._place < self._num_slices else ()):
                for node, partial in zip(nodes, own if place == self._place else received[place]):
                    fold.push(node, partial)
            yield fold.sums

    def gather(self, region: Tensor) -> None:
        """Sends this worker's slice, which is complete, to all peers, and receives theirs, in place.

        Shapes:
            region: [length of the region].
        """
        slices = self._slices(region)
        all_to_all(slices, [slices[self._place]] * len(slices), self._gathering)

    def own_slice(self, region: Tensor) -> Tensor:
        """Returns the slice that this worker owns. Shapes: [length of the region] -> [length of the own slice]."""
        return self._slices(region)[self._place]

    def _slices(self, region: Tensor) -> tuple[Tensor, ...]:
        """Returns the slice of each peer. They begin at aligned places; peers that own no slice have an empty one."""
        unit = max(1, _SLICE_ALIGNMENT // region.itemsize)
        length = math.ceil(region.numel() / self._num_slices / unit) * unit
        ends = [min(number * length, region.numel()) for number in range(len(self._nodes) + 1)]
        slices: tuple[Tensor, ...] = region.split([end - begin for begin, end in pairwise(ends)])
        return slices


def open_levels(levels: Sequence[Level], rank: int, shards: int, timeout_s: float | None) -> list[SliceExchange]:
    """Opens the exchanges of a rank with its peers, from its own sums to those of all shards.

    Collective: every rank of the default group, because torch names a group by the number of groups before it.
    """
    of_rank = [next(peers for peers in level if rank in peers.ranks) for level in levels]
    opened = [(peers, SliceExchange(peers, rank, shards, timeout_s)) for peers in of_rank]
    return [exchange for peers, exchange in opened if len(peers.ranks) > 1]
