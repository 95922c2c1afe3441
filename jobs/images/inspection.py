"""What an encoded image says of itself, without its pixels."""

from dataclasses import dataclass

from PIL import ImageFile

from jobs.images.decoding import UPRIGHT, opened, orientation_of


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the header of an image file says."""

    format: str
    """By Pillow's name: ``JPEG``, ``PNG``."""
    mode: str
    """Pillow's: ``RGB``, ``L``, ``CMYK``, ``P``, ``RGBA``, ``I;16``; ``RGB;16`` for 16 bits a channel."""
    width: int
    """In pixels, as stored: before it is turned upright."""
    height: int
    """In pixels, as stored."""
    num_frames: int
    """More than one: it is animated, or has pages. Training uses the first."""
    orientation: int
    """EXIF's, from 1 to 8; 1: it is stored upright."""

    @property
    def is_rotated(self) -> bool:
        """Whether its pixels must be turned or mirrored to be upright."""
        return self.orientation != UPRIGHT


def inspect_image(content: bytes, url: str) -> ImageFacts:
    """Returns what an encoded image says of itself. It is not decoded, so its pixels may still be damaged.

    Args:
        content: Of the file.
        url: Where it lies, for errors.

    Raises:
        BadSample: It is no image, its header is damaged, or it is so large that it may be an attack.
        MemoryError: This host has too little memory.
    """
    with opened(content, url) as image:
        return ImageFacts(
            format=str(image.format),
            mode=_mode(image),
            width=image.width,
            height=image.height,
            num_frames=getattr(image, "n_frames", 1),
            orientation=_orientation(image),
        )


def _mode(image: ImageFile.ImageFile) -> str:
    """Returns the mode of an image; with its bits, if Pillow reads 16 bits a channel as 8."""
    may_be_deep = image.format in ("PNG", "TIFF") and not image.mode.startswith("I")
    is_deep = may_be_deep and any(";16" in str(tile) for tile in image.tile)
    return f"{image.mode};16" if is_deep else image.mode


def _orientation(image: ImageFile.ImageFile) -> int:
    # Of a PNG whose EXIF comes after its pixels, Pillow would decode those first.
    if image.format == "PNG" and "exif" not in image.info:
        return UPRIGHT
    return orientation_of(image)
