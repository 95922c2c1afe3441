"""From the bytes of an image file to pixels."""

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from cluster.errors import StorageError, one_line

_LONGEST = (2**31 - 1) // 64 - 8
"""Pixels of a row of 64 bits each for which Pillow's decoders have room; they raise a MemoryError for more. Rows and
columns, because an image may be turned."""
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""Error numbers of a path that leads to no file on any host."""
_BYTES_PER_PIXEL, _BESIDE = 16, 2**25
"""Memory that a decoder may need, at most: the coefficients of a progressive JPEG take 8 bytes a pixel, the canvases
of a WebP as many, and what it decodes and Pillow's copy up to 4 each."""
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
DECODER = f"Pillow {PIL.__version__}, rules 1"
"""What decides which images are bad. Make it rules 2 if ``decode_image`` refuses others."""


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
        BadSample: The file is gone or cannot be decoded; the message names it.
        StorageError: It cannot be read.
        MemoryError: This host has too little memory; the message names the file.
    """
    name = os.fsdecode(path)
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        if error.errno in _ABSENT:
            raise BadSample(f"cannot be read, {error.strerror}; repair or remove the file", name) from error
        raise StorageError(f"{name}: cannot be read, {error.strerror}; check the disk, and who may read it") from error
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
        MemoryError: This host has too little memory; the message names the file.
    """
    with opened(content, url) as image:
        if image.format == "EPS":  # Pillow runs Ghostscript, if this host has it
            raise BadSample("must hold pixels, got EPS, which a program draws; convert the file", url)
        if image.mode.startswith(("I", "F")):
            raise BadSample(f"must have 8 bits a channel, got {image.mode}; convert the file", url)
        image.load()  # of some files, EXIF comes after the pixels
        # Not ImageOps.exif_transpose: it writes EXIF again, and fails on odd values in it.
        turn = _TURNED.get(orientation_of(image))
        upright = image if turn is None else image.transpose(turn)
        # Pillow warns unless a transparent palette is converted to RGBA first.
        opaque = upright.convert("RGBA") if "transparency" in image.info else upright
        rgb = opaque if opaque.mode == "RGB" else opaque.convert("RGB")  # which copies in any case
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


@contextlib.contextmanager
def opened(content: bytes, url: str) -> Iterator[ImageFile.ImageFile]:
    """Opens an encoded image for the block of a ``with`` statement, and names it in what Pillow raises there.

    What is bad follows from the file alone, so that all hosts skip the same samples. So a lack of memory is always a
    MemoryError, and what Pillow would refuse as such for its size alone is refused before. Decoders report an
    allocation that failed as they report damage, so an image counts as bad only if this host has memory to decode it.

    Raises:
        BadSample: It is no image, is damaged or too large.
        MemoryError: This host has too little memory.
    """
    size = _size_of_webp(content)
    try:
        with Image.open(io.BytesIO(content)) as image:
            size = image.size
            if max(image.size) > _LONGEST:
                raise BadSample(
                    f"has {image.width:,} x {image.height:,} pixels, and at most {_LONGEST:,} can be in a row; remove "
                    "the file",
                    url,
                )
            yield image
    except BadSample:
        raise
    except Exception as error:  # it depends on the format and the damage, and may be any
        raise _undecodable(error, url, size) from error


def _undecodable(error: Exception, url: str, size: tuple[int, int]) -> Exception:
    """Returns the error for an image that Pillow cannot decode.

    Args:
        error: Pillow's.
        url: Where it lies.
        size: Its width and height, or zeros if its header could not be read.
    """
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or not _has_memory_for(size):
        return MemoryError(f"{url}: too little memory to decode it; give the process more, or remove the file")
    if isinstance(error, UnidentifiedImageError):  # its text is an address in memory
        problem = "it has no header of an image that Pillow knows"
    elif isinstance(error, OSError | SyntaxError | ValueError | Image.DecompressionBombError):
        problem = one_line(error)
    else:
        problem = f"{type(error).__name__}: {one_line(error)}"
    return BadSample(f"cannot be decoded, {problem}; repair or remove the file", url)


def _has_memory_for(size: tuple[int, int]) -> bool:
    """Returns whether this process can allocate what the decoder of an image may need."""
    pixels, limit = size[0] * size[1], Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > 2 * limit:  # Pillow refuses it for its size alone
        return True
    try:
        bytearray(pixels * _BYTES_PER_PIXEL + _BESIDE)  # no page of it is touched
    except MemoryError:
        return False
    return True


def _size_of_webp(content: bytes) -> tuple[int, int]:
    """Returns width and height of a WebP by its header, because Pillow allocates its pixels when it opens it.

    Zeros: it is none.

    Source: https://developers.google.com/speed/webp/docs/riff_container
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < 30:
        return 0, 0
    if content[12:16] == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if content[12:16] == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return 1 + bits % 2**14, 1 + (bits >> 14) % 2**14
    return int.from_bytes(content[26:28], "little") % 2**14, int.from_bytes(content[28:30], "little") % 2**14


def orientation_of(image: Image.Image) -> int:
    """Returns the orientation of an image's EXIF, from 1 to 8; 1, upright, if it has none, or one that is undefined."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if orientation in _TURNED else UPRIGHT
