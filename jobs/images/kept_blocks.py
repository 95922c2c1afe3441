"""Blocks of neighbouring samples that a process has read, each kept until its samples are used."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

from jobs.images.decoding import BadSample

Read = Callable[[Sequence[int]], list[bytes | BadSample]]
"""Reads the encoded images of samples of a dataset; an error in place of each that is not there."""


class KeptBlocks:
    """Reads a whole block when it needs one of its samples, and keeps the others.

    It forgets a sample when it returns it, because no epoch asks for one twice; for one that it has forgotten, it reads
    the block again. Blocks whose use is longest ago are dropped before there are too many samples. A pickle of it holds
    no samples.

    Args:
        num_samples: Samples in the dataset.
        block: Samples of a block; the last block may have fewer.
        most: Samples to keep. While it reads, it holds those of one ``fetch`` beside them.

    Thread: one thread at a time; each loader process has its own.
    """

    def __init__(self, num_samples: int, block: int, most: int) -> None:
        self._num_samples, self._block, self._most = num_samples, block, most
        self._kept: OrderedDict[int, dict[int, bytes | BadSample]] = OrderedDict()
        self._num_kept = 0

    def __reduce__(self) -> tuple[type["KeptBlocks"], tuple[int, int, int]]:
        return KeptBlocks, (self._num_samples, self._block, self._most)

    def fetch(self, numbers: Sequence[int], read: Read) -> list[bytes | BadSample]:
        """Returns samples, and reads the blocks that do not hold them any more together."""
        missing = sorted({number // self._block for number in numbers if number not in self._block_of(number)})
        ranges = [self._numbers_of(block) for block in missing]
        for block in missing:
            self._drop(block)
        self._make_room(sum(map(len, ranges)) - len(numbers), {number // self._block for number in numbers})
        contents = iter(read([number for own in ranges for number in own]) if ranges else ())
        for block, own in zip(missing, ranges):
            self._kept[block] = {number: next(contents) for number in own}
            self._num_kept += len(own)
        found = [self._block_of(number)[number] for number in numbers]
        for number in numbers:
            self._forget(number)
        return found

    def _make_room(self, added: int, needed: Collection[int]) -> None:
        """Drops blocks that are not needed now, for as many samples as will be added."""
        for block in list(self._kept):
            if self._num_kept + added <= self._most:
                return
            if block not in needed:
                self._drop(block)

    def _block_of(self, number: int) -> dict[int, bytes | BadSample]:
        return self._kept.get(number // self._block, {})

    def _numbers_of(self, block: int) -> range:
        return range(block * self._block, min((block + 1) * self._block, self._num_samples))

    def _drop(self, block: int) -> None:
        self._num_kept -= len(self._kept.pop(block, ()))

    def _forget(self, number: int) -> None:
        """Forgets a sample, and its block with the last one."""
        own = self._block_of(number)
        self._num_kept -= own.pop(number, None) is not None
        if own:
            self._kept.move_to_end(number // self._block)
        else:
            self._kept.pop(number // self._block, None)
