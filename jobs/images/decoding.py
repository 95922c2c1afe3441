"""From the bytes of an image file to pixels."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class BadSample(ValueError):  # noqa: N818 - it says what is so
    """A sample that is not there or cannot be read; the message names its URL. The store itself works."""


def read_image(path: str | bytes | os.PathLike[str]) -> Tensor:
    """Reads and decodes an image file, see ``decode_image``.

    Shapes:
        Returns image_3HW, uint8.

    Raises:
        BadSample: The file cannot be read or decoded; the message names it.
    """
    name = os.fsdecode(path)
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise BadSample(f"{name}: cannot be read, {error.strerror}; repair or remove the file") from error
    return decode_image(content, name)


def decode_image(content: bytes, url: str) -> Tensor:
    """Decodes an image with 8 bits per channel as upright RGB; drops an alpha channel, and all frames but the first.

    Uses Pillow, because ``torchvision.io.decode_image`` is deprecated since torchvision 0.29.

    Args:
        content: Of the file.
        url: Where it lies, for errors.

    Shapes:
        Returns image_3HW, uint8.

    Raises:
        BadSample: It cannot be decoded, or is so large that it may be an attack (Pillow's ``MAX_IMAGE_PIXELS``, twice).
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):
                raise BadSample(f"{url}: must have 8 bits a channel, got {image.mode}; convert the file")
            ImageOps.exif_transpose(image, in_place=True)
            # Pillow warns unless a transparent palette is converted to RGBA first.
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            return torch.from_numpy(np.array(opaque.convert("RGB"))).permute(2, 0, 1)
    except BadSample:
        raise
    # What Pillow raises for a damaged file depends on its format: SyntaxError for PNG, and others.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadSample(f"{url}: cannot be decoded, {error}; repair or remove the file") from error
