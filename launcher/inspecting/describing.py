"""Builds the datasets of a job, reads some of their samples and draws the first ones, in a process of its own.

That process imports torch and the user's code, so that what they print, leak or crash stays there.
"""

import pickle
from collections import Counter
from typing import Any

import numpy as np
import torch

from cluster.errors import in_short, one_line
from cluster.process.fork_server import tell_caller
from cluster.process.orders import Task
from jobs.components.build import build_dataset, listed_targets, numerics, worker_device
from jobs.data.loader import shape_of, single_samples
from jobs.images.decoding import BadSample, decode_image
from jobs.images.index_files import IndexFiles, use_index_files
from jobs.images.indexed_images import IndexedImages
from jobs.images.inspection import inspect_image
from jobs.images.labelled_images import Split
from jobs.sampling import draw_key, permute
from jobs.spec import JobSpec
from launcher.inspecting.facts import Answer, DatasetFacts, IndexedSamples, IndexReader, Question
from launcher.inspecting.sheet import make_sheet
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
        facts[split] = _describe(dataset, split, named, question.num_sampled, spec)
        built[split] = dataset
    return Answer(facts, make_sheet(built["train"], spec) if question.with_sheet else None)


def _describe(dataset: Any, split: Split, named: dict[str, str], num_sampled: int, spec: JobSpec) -> DatasetFacts:
    chosen = _choose(len(dataset), num_sampled, spec.seed)
    if isinstance(dataset, IndexedImages):
        inspected = _inspect(dataset, chosen)
        document = named | summarise_index(dataset.index, dataset.numbers, inspected)
        reader = IndexReader(dataset.index.path, pickle.dumps(dataset.read))
        return DatasetFacts(document, IndexedSamples(reader, dataset.numbers))
    targets = listed_targets(dataset)
    names = getattr(dataset, "classes", None)
    has_names = isinstance(names, (list, tuple))
    shapes, broken = _shapes(dataset, split, chosen, spec)
    document = named | {
        "source": None,
        "samples": len(dataset),
        **summarise_labels(None if targets is None else targets.numpy(force=True), names if has_names else None),
        "passed_over": {},
        "sampled": {"samples": len(chosen), "broken": broken},
        "shapes": shapes,
    }
    return DatasetFacts(document, None)


def _choose(num_samples: int, num_chosen: int, seed: int) -> list[int]:
    """Return the numbers of some samples, in order; the same for the same seed."""
    positions = np.arange(min(num_samples, num_chosen))
    if not len(positions):
        return []
    chosen: list[int] = sorted(permute(positions, num_samples, draw_key("inspection", seed)).tolist())
    return chosen


def _inspect(dataset: IndexedImages, chosen: list[int]) -> list[InspectedImage]:
    """Read and decode samples; the transform of the dataset does not run."""
    inspected = []
    for begin in range(0, len(chosen), _READ_AT_ONCE):
        numbers = chosen[begin : begin + _READ_AT_ONCE]
        for number, content in zip(dataset.numbers[numbers].tolist(), dataset.fetch(numbers)):
            inspected.append(_inspected(number, content, dataset.index.url_of(number)))
    return inspected


def _inspected(number: int, content: bytes | BadSample, url: str) -> InspectedImage:
    if isinstance(content, BadSample):
        return InspectedImage(number, 0, None, one_line(content))
    facts = None
    try:
        facts = inspect_image(content, url)
        decode_image(content, url)
    except BadSample as error:
        return InspectedImage(number, len(content), facts, one_line(error))
    return InspectedImage(number, len(content), facts)


def _shapes(
    dataset: Any, split: Split, chosen: list[int], spec: JobSpec
) -> tuple[dict[str, dict[str, int]], list[dict[str, Any]]]:
    """Return the shapes of samples, by ``input`` and ``target``, each with a count; and the samples that failed."""
    found: dict[str, Counter[str]] = {}
    broken = []
    for number in chosen:
        try:
            sample = next(single_samples(dataset, [number], split=split, seed=spec.seed, loaders=0)).sample
        except Exception as error:  # the dataset is the user's own code
            broken.append({"url": f"sample {number}", "problem": f"{type(error).__name__}: {in_short(error)}"})
            continue
        is_pair = isinstance(sample, (tuple, list)) and len(sample) == 2
        for part, value in zip(("input", "target"), sample) if is_pair else [("no pair", sample)]:
            found.setdefault(part, Counter())[_shape_of(value)] += 1
    return {part: dict(counts.most_common()) for part, counts in found.items()}, broken


def _shape_of(value: Any) -> str:
    return shape_of(torch.as_tensor(value) if isinstance(value, np.ndarray) else value)
