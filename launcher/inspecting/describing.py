"""Builds the datasets of a job, reads some of their samples and draws the first ones, in a process of its own.

That process imports torch and the user's code, so that what they print, leak or crash stays there.
"""

import pickle
from collections import Counter
from typing import Any

import numpy as np
import torch

from cluster.errors import LauncherError, in_short, one_line
from cluster.process.fork_server import tell_caller
from cluster.process.orders import Task
from jobs.components.build import build_dataset, listed_targets, numerics, worker_device
from jobs.data.loader import shape_of
from jobs.images.decoding import BadSample, decode_image
from jobs.images.indexed_images import IndexedImages
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from jobs.images.inspection import inspect_image
from jobs.images.labelled_images import Split
from jobs.sampling import draw_key, permute
from jobs.spec import JobSpec
from launcher.inspecting.facts import Answer, DatasetFacts, IndexedSamples, IndexReader, Question
from launcher.inspecting.sheet import make_sheet
from launcher.inspecting.single import bad_sample, read_sample
from launcher.inspecting.summary import InspectedImage, summarise_index, summarise_labels

_READ_AT_ONCE = 32


def describe(task: Task) -> Answer:
    """Return what is known of the datasets of a job after reading a few samples of each.

    Args:
        task: Its content is the question; this process was started for it.

    Raises:
        DescriptionError: A dataset cannot be built, or its samples are no images and are to be drawn.
        StorageError: The data cannot be read.
    """
    question: Question = task.content
    spec = question.spec
    device = worker_device(on_gpu=False)
    numerics(spec, device)
    use_index_files(IndexFiles(tell=tell_caller))
    facts, built = dict[str, DatasetFacts](), dict[str, Any]()
    for split in question.splits:
        key, target = f"data.{split}", spec.data.train if split == "train" else spec.data.val
        assert target is not None, "the command has looked"
        dataset = build_dataset(spec, target, key, device)
        tell_caller(f"reading {min(question.num_sampled, len(dataset)):,} samples of {key}")
        named = {"key": key, "dataset": target.path}
        facts[split] = _describe(dataset, split, named, question)
        built[split] = dataset
    return Answer(facts, make_sheet(built["train"], spec) if question.with_sheet else None)


def _describe(dataset: Any, split: Split, named: dict[str, str], question: Question) -> DatasetFacts:
    spec, chosen = question.spec, _choose(len(dataset), question.num_sampled, question.spec.seed)
    if isinstance(dataset, IndexedImages):
        numbers = dataset.numbers
        document = named | summarise_index(dataset.index, numbers, _inspect(dataset, numbers, chosen))
        reader = IndexReader(dataset.index.path, pickle.dumps(dataset.read))
        return DatasetFacts(document, IndexedSamples(reader, numbers) if question.with_samples else None)
    labels, num_labels = _labels(dataset)
    names = getattr(dataset, "classes", None)
    has_names = isinstance(names, (list, tuple))
    shapes, broken = _shapes(dataset, split, chosen, spec)
    document = named | {
        "source": None,
        "samples": len(dataset),
        **summarise_labels(labels, names if has_names else None),
        "unused_targets": None if num_labels in (None, len(dataset)) else num_labels,
        "passed_over": {},
        "sampled": {"samples": len(chosen), "broken": broken},
        "shapes": shapes,
    }
    return DatasetFacts(document, None)


def _labels(dataset: Any) -> tuple[np.ndarray | None, int | None]:
    """Return the label of each sample, None if they are not listed; and how many labels are listed, None if none are.

    A list of another length than the dataset says nothing about its samples. numpy has neither bfloat16 nor any float
    of 8 bits.
    """
    targets = listed_targets(dataset)
    if targets is None or not targets.dim():
        return None, None
    if len(targets) != len(dataset) or targets.is_complex():
        return None, len(targets)
    has_numpy = not targets.is_floating_point() or targets.dtype in (torch.float16, torch.float32, torch.float64)
    labels: np.ndarray = (targets if has_numpy else targets.float()).numpy(force=True)
    return labels, len(labels)


def _choose(num_samples: int, num_chosen: int, seed: int) -> list[int]:
    """Return the numbers of some samples, in order; the same for the same seed."""
    positions = np.arange(min(num_samples, num_chosen))
    if not len(positions):
        return []
    chosen: list[int] = sorted(permute(positions, num_samples, draw_key("inspection", seed)).tolist())
    return chosen


def _inspect(dataset: IndexedImages, numbers: np.ndarray, chosen: list[int]) -> list[InspectedImage]:
    """Read and decode samples; the transform of the dataset does not run.

    Args:
        dataset: The dataset.
        numbers: The number of each of its samples in the index.
        chosen: The samples to read.
    """
    inspected = []
    for begin in range(0, len(chosen), _READ_AT_ONCE):
        some = chosen[begin : begin + _READ_AT_ONCE]
        for number, content in zip(numbers[some].tolist(), dataset.fetch(some), strict=True):
            inspected.append(_inspected(number, content, dataset.index.url_of(number)))
    return inspected


def _inspected(number: int, content: bytes | BadSample, url: str) -> InspectedImage:
    if isinstance(content, BadSample):
        return InspectedImage(number, 0, None, one_line(content.problem))
    facts = None
    try:
        facts = inspect_image(content, url)
        decode_image(content, url)
    except BadSample as error:
        return InspectedImage(number, len(content), facts, one_line(error.problem))
    return InspectedImage(number, len(content), facts)


def _shapes(
    dataset: Any, split: Split, chosen: list[int], spec: JobSpec
) -> tuple[dict[str, dict[str, int]], list[dict[str, Any]]]:
    """Return the shapes of samples, by ``input`` and ``target``, each with a count; and the samples that failed.

    Raises:
        StorageError: The data cannot be read.
    """
    found: dict[str, Counter[str]] = {}
    broken = []
    for number in chosen:
        try:
            sample = read_sample(dataset, number, split, spec)
        except LauncherError:
            raise
        except Exception as error:  # the dataset is the user's own code
            broken.append({"url": f"sample {number}", "problem": f"{type(error).__name__}: {in_short(error)}"})
            continue
        if isinstance(sample, BadSample):
            broken.append(bad_sample(number, sample))
            continue
        is_pair = isinstance(sample, (tuple, list)) and len(sample) == 2
        for part, value in zip(("input", "target"), sample) if is_pair else [("no pair", sample)]:
            found.setdefault(part, Counter())[_shape_of(value)] += 1
    return {part: dict(counts.most_common()) for part, counts in found.items()}, broken


def _shape_of(value: Any) -> str:
    return shape_of(torch.as_tensor(value) if isinstance(value, np.ndarray) else value)
