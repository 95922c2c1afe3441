"""The contact sheet: the first samples of a run, exactly as its first steps get them, as pixels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cluster.errors import DescriptionError, LauncherError, TrainingError, in_short
from jobs.components.build import make_steps
from jobs.data.loader import shape_of, single_samples
from jobs.images.decoding import BadSample
from jobs.spec import JobSpec
from launcher.inspecting.facts import Sheet, Tile
from launcher.inspecting.single import bad_sample, read_sample

NUM_TILES = 16
_LONGEST_SIDE = 256
"""In pixels; a larger tile is reduced."""
_ROUNDING = 1e-3
"""How far a value may lie outside of [0, 1] after mean and standard deviation are undone."""


def make_sheet(dataset: Any, spec: JobSpec) -> Sheet:
    """Return the first samples of the first epoch: their numbers, keys and transforms are those of training.

    Raises:
        DescriptionError: A sample is no image, or the dataset has too few for a step.
        StorageError: The data cannot be read.
    """
    steps = make_steps(spec, len(dataset))
    numbers, last_step = list[int](), 0
    while len(numbers) < NUM_TILES and last_step < steps.steps_per_epoch:
        for shard in range(spec.train.shards):
            numbers += steps.samples(spec.seed, last_step, shard).tolist()
        last_step += 1
    del numbers[NUM_TILES:]
    images, captions, broken = list[Tensor | None](), list[str](), list[dict[str, str]]()
    for tile, number in enumerate(numbers):
        try:
            sample = read_sample(dataset, number, "train", spec)
            if isinstance(sample, BadSample):
                broken.append(bad_sample(number, sample))
                numbers[tile], sample = _replaced(dataset, number, spec)
            image, target = (None, None) if sample is None else sample
        except LauncherError:
            raise
        except Exception as error:  # the dataset is the user's own code
            raise DescriptionError(
                f"data.train: sample {number} raised {type(error).__name__}: {in_short(error)}"
            ) from error
        if sample is None:
            images.append(None)
            captions.append("broken")
            continue
        images.append(_as_image(image))
        captions.append(_caption(target, getattr(dataset, "classes", None)))
    pixels, scaling = to_pixels(images, getattr(dataset, "mean_C11", None), getattr(dataset, "std_C11", None))
    return Sheet(
        tiles=tuple(Tile(None if each is None else _reduced(each), text) for each, text in zip(pixels, captions)),
        numbers=tuple(numbers),
        last_step=last_step,
        scaling=scaling,
        broken=tuple(broken),
    )


def _replaced(dataset: Any, number: int, spec: JobSpec) -> tuple[int, Any]:
    """Return the number of the sample that training gets in place of a bad one, and that sample; None: it gets none."""
    if spec.data.on_bad_sample != "skip":
        return number, None
    read = single_samples(dataset, [number], split="train", seed=spec.seed, loaders=0, on_bad_sample="skip")
    try:
        other, sample, *_ = next(read)
    except TrainingError:  # those that were tried are bad, too
        return number, None
    return other, sample


def to_pixels(
    images: Sequence[Tensor | None], mean_C11: Tensor | None, std_C11: Tensor | None
) -> tuple[list[np.ndarray | None], str]:
    """Return images as bytes of RGB, and in words how their values were scaled.

    Mean and standard deviation are undone. If that gives values outside of [0, 1], because the transform normalises
    too, each image is stretched from its smallest to its largest value.

    Args:
        images: As training gets them.
        mean_C11: What the dataset subtracts from each channel.
        std_C11: What the dataset divides by after that.

    Shapes: images [C, H, W]; returns uint8 [H, W, 3].
    """
    undone = []
    for image in images:
        if image is not None:
            image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
            image = image if std_C11 is None else image * std_C11
            image = image if mean_C11 is None else image + mean_C11
        undone.append(image)
    is_unit = all(
        bool((each >= -_ROUNDING).all() and (each <= 1 + _ROUNDING).all()) for each in undone if each is not None
    )
    if not is_unit:
        scaling = "each stretched from its smallest to its largest value"
        undone = [None if each is None else _stretched(each) for each in undone]
    else:
        scaling = "values as they are" if mean_C11 is None and std_C11 is None else "mean and std undone"
    return [None if each is None else _rgb(each) for each in undone], scaling


def _stretched(image_CHW: Tensor) -> Tensor:
    finite = image_CHW.nan_to_num(0.0, 0.0, 0.0)
    least, most = finite.min(), finite.max()
    return (finite - least) / (most - least) if most > least else torch.zeros_like(finite)


def _rgb(image_CHW: Tensor) -> np.ndarray:
    """Return the first three channels, or the first one as grey. Shapes: [C, H, W] -> uint8 [H, W, 3]."""
    channels = image_CHW[:3] if len(image_CHW) >= 3 else image_CHW[:1].expand(3, -1, -1)
    rgb: np.ndarray = channels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return rgb


def _as_image(value: Any) -> Tensor:
    """Return the input of a sample as [C, H, W].

    Raises:
        DescriptionError: It has another shape.
    """
    image = torch.as_tensor(value) if isinstance(value, np.ndarray) else value
    if isinstance(image, Tensor) and image.ndim == 2:
        image = image.unsqueeze(0)
    if not (isinstance(image, Tensor) and image.ndim == 3 and image.numel() and not image.is_complex()):
        raise DescriptionError(
            f"--sheet: draws inputs that are images, [channels, height, width], got {shape_of(image)} of data.train; "
            "leave it out"
        )
    return image.detach()


def _caption(target: Any, classes: Any) -> str:
    value = target.tolist() if isinstance(target, (Tensor, np.ndarray, np.generic)) else target
    if isinstance(value, int) and isinstance(classes, (list, tuple)) and 0 <= value < len(classes):
        return str(classes[value])
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reduced(rgb_HW3: np.ndarray) -> np.ndarray:
    if max(rgb_HW3.shape) <= _LONGEST_SIDE:
        return rgb_HW3
    image = Image.fromarray(rgb_HW3)
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return np.asarray(image)
