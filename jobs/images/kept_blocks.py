"""Blocks of neighbouring samples that a process has read, each kept until its samples are used."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from jobs.images.decoding import BadSample

Read = Callable[[Sequence[int]], list[bytes | BadSample]]
"""Reads the encoded images of samples of a dataset; an error in place of each that is not there."""


class KeptBlocks:
    """Reads a whole block when it needs one of its samples, and keeps the others; a sample is given out once.

    Of blocks that still have samples, those whose use is longest ago are dropped if there are too many. A pickle of it
    holds no samples.

    Args:
        num_samples: Samples in the dataset.
        block: Samples of a block; the last block may have fewer.
        most: The number of blocks to keep.

    Thread: one thread at a time; each loader process has its own.
    """

    def __init__(self, num_samples: int, block: int, most: int) -> None:
        self._num_samples, self._block, self._most = num_samples, block, most
        self._kept: OrderedDict[int, dict[int, bytes | BadSample]] = OrderedDict()

    def __reduce__(self) -> tuple[type["KeptBlocks"], tuple[int, int, int]]:
        return KeptBlocks, (self._num_samples, self._block, self._most)

    def fetch(self, numbers: Sequence[int], read: Read) -> list[bytes | BadSample]:
        """Returns samples, and reads the blocks that do not hold them any more together."""
        missing = sorted({number // self._block for number in numbers if number not in self._block_of(number)})
        ranges = [self._numbers_of(block) for block in missing]
        contents = iter(read([number for own in ranges for number in own]) if ranges else ())
        for block, own in zip(missing, ranges):
            self._kept[block] = {number: next(contents) for number in own}
        found = [self._block_of(number)[number] for number in numbers]
        for number in numbers:
            self._give_out(number)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return found

    def _block_of(self, number: int) -> dict[int, bytes | BadSample]:
        return self._kept.get(number // self._block, {})

    def _numbers_of(self, block: int) -> range:
        return range(block * self._block, min((block + 1) * self._block, self._num_samples))

    def _give_out(self, number: int) -> None:
        """Forgets a sample, and its block with the last one."""
        own = self._block_of(number)
        own.pop(number, None)
        if own:
            self._kept.move_to_end(number // self._block)
        else:
            self._kept.pop(number // self._block, None)
