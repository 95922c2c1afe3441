"""A process that verifies: reads samples of an index, decodes each and hashes its encoded image.

The dataset and its transform are not there: the process has the index, and the function that reads from it.
"""

import hashlib
import os
import pickle
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np
import torch

from cluster.errors import LauncherError, TrainingError, one_line, storable
from cluster.process import fork_server
from cluster.process.orders import Task
from cluster.process.workplace import take_place
from jobs.images.decoding import BadSample, decode_image
from jobs.images.index import Index
from jobs.images.indexed_images import ReadSamples
from launcher.inspecting.facts import IndexReader
from launcher.inspecting.verified_file import RECORD

BYTES_AT_ONCE = 2**25
"""A process holds so many bytes of encoded images, or one image that has more."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What became of some samples."""

    whole: np.ndarray
    """Shapes: RECORD [found whole]."""
    broken: dict[int, str] = field(default_factory=dict)
    """By their numbers in the index, the errors of the others."""


def main(commands: Connection, task: Task) -> None:
    """Answer each array of sample numbers with a ``Verified``, until it is killed; or with an error, and end.

    Args:
        commands: To the process that commands this one.
        task: Its content is an ``IndexReader``.
    """
    fork_server.print_to(os.devnull)  # libraries of image formats print what they think of a file
    try:
        reader: IndexReader = take_place(task).content
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # so does Pillow
        index, read = Index(reader.index_path), pickle.loads(reader.read)  # noqa: S301  # the command's own
        while True:
            commands.send(verify_samples(index, read, commands.recv()))
    except LauncherError as error:
        commands.send(error)
    except Exception as error:  # the outermost border of the process; the function that reads may be the user's own
        text = f"{type(error).__name__}: {one_line(error)}"
        commands.send(TrainingError(text, storable(traceback.format_exc())))


def verify_samples(index: Index, read: ReadSamples, numbers: np.ndarray) -> Verified:
    """Read, decode and hash samples.

    Shapes: numbers int64 [samples].

    Raises:
        StorageError: The store does not answer.
    """
    digests, broken = dict[int, bytes](), dict[int, str]()
    for some in _parted(index, numbers.tolist()):
        for number, content in zip(some, read(index, some)):
            try:
                if isinstance(content, BadSample):
                    raise content
                decode_image(content, index.url_of(number))
                digests[number] = hashlib.sha256(content).digest()
            except BadSample as error:
                broken[number] = one_line(error)
    return Verified(np.array(list(digests.items()), RECORD), broken)


def _parted(index: Index, numbers: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers in parts whose encoded images fit in memory together, as far as the index has their sizes."""
    part, size = list[int](), 0
    for number in numbers:
        place = index.place(number)
        own = place.length if place.length >= 0 else max(0, place.size)
        if part and size + own > BYTES_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(number)
        size += own
    if part:
        yield part
