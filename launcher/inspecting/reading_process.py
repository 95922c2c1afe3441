"""A process that verifies: reads samples of an index, decodes each and hashes its encoded image.

The dataset and its transform are not there: the process has the index, and the function that reads from it.
"""

import hashlib
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np
import torch

from cluster.errors import LauncherError, TrainingError, one_line, storable
from cluster.host.oom import be_taken_first
from cluster.process import fork_server
from cluster.process.orders import Task
from cluster.process.workplace import take_place
from jobs.images.decoding import DECODER, BadSample, decode_image
from jobs.images.indexed_images import ReadSamples
from jobs.images.indexing.index import Index, Place
from launcher.inspecting.facts import IndexReader
from launcher.inspecting.parts import Part, Verified
from launcher.inspecting.stamps import UNKNOWN, stamps_of
from launcher.inspecting.verified_file import RECORD

BYTES_AT_ONCE = 2**25
"""A process holds so many bytes of encoded images, or one image that has more."""


def main(commands: Connection, task: Task) -> None:
    """Answer each ``Part`` with a ``Verified``, until it is killed; or with an error, and end.

    Args:
        commands: To the process that commands this one.
        task: Its content is an ``IndexReader``.
    """
    fork_server.print_to(os.devnull)  # libraries of image formats print what they think of a file
    be_taken_first()  # and not the command, which tells what the process was reading
    try:
        reader: IndexReader = take_place(task).content
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # so does Pillow
        index, read = Index(reader.index_path), pickle.loads(reader.read)  # noqa: S301  # the command's own
        while True:
            commands.send(verify_part(index, read, commands.recv()))
    except LauncherError as error:
        commands.send(error)
    except Exception as error:  # the outermost border of the process; the function that reads may be the user's own
        text = f"{type(error).__name__}: {one_line(error)}"
        commands.send(TrainingError(text, storable(traceback.format_exc())))


def verify_part(index: Index, read: ReadSamples, part: Part) -> Verified:
    """Read, decode and hash samples, except for those that this decoder found whole and that have not changed.

    Raises:
        StorageError: The store does not answer.
    """
    stamps, read_at = stamps_of(index, part.numbers, DECODER), int(time.time())
    is_unchanged = (stamps == part.stamps) & (stamps != UNKNOWN)
    stamp_of = dict(zip(part.numbers[~is_unchanged].tolist(), stamps[~is_unchanged].tolist()))
    whole, broken = list[tuple[int, bytes, int, int]](), dict[int, str]()
    for some in _parted(index, list(stamp_of)):
        for number, content in zip(some, read(index, some), strict=True):
            try:
                if isinstance(content, BadSample):
                    raise content
                decode_image(content, index.url_of(number))
                whole.append((number, hashlib.sha256(content).digest(), stamp_of[number], read_at))
            except BadSample as error:
                broken[number] = one_line(error.problem)
    return Verified(np.array(whole, RECORD), part.numbers[is_unchanged], broken)


def _parted(index: Index, numbers: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers in parts whose encoded images fit in memory together, as far as the index has their sizes."""
    part, size = list[int](), 0
    for number in numbers:
        own = _num_bytes(index, number, index.place(number))
        if part and size + own > BYTES_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(number)
        size += own
    if part:
        yield part


def _num_bytes(index: Index, number: int, place: Place) -> int:
    """Return the bytes of an encoded image; of Parquet, the mean over the rows of its file; 0: unknown."""
    if index.source.format == "parquet":
        of_file = index.object_numbers[number]
        begin, end = np.searchsorted(index.object_numbers, [of_file, of_file + 1])
        return max(0, place.size) // int(end - begin)
    return place.length if place.length >= 0 else max(0, place.size)
