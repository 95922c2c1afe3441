"""Stamps of objects: numbers that change with their content and its decoder; they tell what need not be read again."""

import hashlib
import os
from collections.abc import Iterable

import numpy as np

from jobs.images.data_stores import data_store
from jobs.images.indexing.index import Index

UNKNOWN = 0
"""The stamp of an object that is not there, or whose store tells neither versions nor times."""


def stamps_of(index: Index, numbers: np.ndarray, decoder: str) -> np.ndarray:
    """Return the stamp of the object that each sample lies in.

    Take them before the samples are read: content that comes in between then belongs to an older stamp, and counts as
    changed. The index has the versions that its listing found; without them the store is asked for each object.

    Args:
        index: The index.
        numbers: The numbers of samples in it.
        decoder: What decides which images are bad, and its version.

    Shapes: int64 [samples] -> uint64 [samples].

    Raises:
        StorageError: The store does not answer.
    """
    objects, of_samples = np.unique(index.object_numbers[numbers], return_inverse=True)
    columns, texts, unversioned = index.objects, dict[int, str](), dict[int, str]()
    for each in objects.tolist():
        version = columns["version"][each].as_py()
        if version:
            texts[each] = f"{columns['size'][each].as_py()} {version.decode()}"
        else:
            unversioned[each] = os.fsdecode(columns["name"][each].as_py())
    if unversioned:
        texts |= dict(zip(unversioned, data_store(index.source.url).fingerprints(unversioned.values())))
    return _digests((texts[each] for each in objects.tolist()), decoder)[of_samples]


def _digests(texts: Iterable[str], decoder: str) -> np.ndarray:
    return np.array([_digest(f"{decoder} {text}") if text else UNKNOWN for text in texts], np.uint64)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) or 1
