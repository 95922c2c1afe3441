"""From the bytes of an image file to pixels."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

DAMAGED = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, RuntimeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises for a damaged file; it depends on the format: SyntaxError for PNG, RuntimeError for AVIF."""

UPRIGHT = 1
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image upright, by its orientation in EXIF."""


class BadSample(ValueError):  # noqa: N818 - it says what is so
    """A sample that is not there or cannot be read; the message names its URL. The store itself works.

    Args:
        problem: What is wrong, as a predicate of its URL, and what to do.
        url: Where it lies; empty: unknown, or ``problem`` names it.
    """

    url = ""

    def __init__(self, problem: str, url: str = "") -> None:
        super().__init__(f"{url}: {problem}" if url else problem)
        self.url = url

    @property
    def problem(self) -> str:
        """What is wrong, without the URL."""
        return str(self).removeprefix(f"{self.url}: ")


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
        raise BadSample(f"cannot be read, {error.strerror}; repair or remove the file", name) from error
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
                raise BadSample(f"must have 8 bits a channel, got {image.mode}; convert the file", url)
            image.load()  # of some files, EXIF comes after the pixels
            # Not ImageOps.exif_transpose: it writes EXIF again, and fails on odd values in it.
            turn = _TURNED.get(orientation_of(image))
            upright = image if turn is None else image.transpose(turn)
            # Pillow warns unless a transparent palette is converted to RGBA first.
            opaque = upright.convert("RGBA") if "transparency" in image.info else upright
            return torch.from_numpy(np.array(opaque.convert("RGB"))).permute(2, 0, 1)
    except BadSample:
        raise
    except DAMAGED as error:
        raise undecodable(error, url) from error


def undecodable(error: Exception, url: str) -> BadSample:
    """Returns the error for an image that Pillow cannot decode; ``error`` is Pillow's."""
    # The text of the first is the address of the bytes in memory.
    is_unknown = isinstance(error, UnidentifiedImageError)
    found = "it has no header of an image that Pillow knows" if is_unknown else f"{error}"
    return BadSample(f"cannot be decoded, {found}; repair or remove the file", url)


def orientation_of(image: Image.Image) -> int:
    """Returns the orientation of an image's EXIF, from 1 to 8; 1, upright, if it has none, or one that is undefined."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if orientation in _TURNED else UPRIGHT
