"""Small image folders, made on the spot: what tests train and validate on instead of a download."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_image_folder(root: Path, num_classes: int, per_class: int, size: int = 64, seed: int = 0) -> Path:
    """Writes JPEGs to ``root/class_KKK/image_NNNN.jpg`` and returns ``root``.

    A class is a coarse pattern of colours, and each image a different shade of it, so that a network can
    learn them. The same arguments give the same pixels.

    Args:
        root: Where to write; made if it is not there.
        num_classes: Number of folders.
        per_class: Images in each of them.
        size: Height of an image, in pixels; images are a quarter wider than high.
        seed: Draws the patterns and the shades.
    """
    random = np.random.default_rng(seed)
    for label in range(num_classes):
        folder = root / f"class_{label:03d}"
        folder.mkdir(parents=True)
        pattern_443 = random.integers(32, 224, (4, 4, 3))
        for number in range(per_class):
            shades_443 = pattern_443 + random.integers(-32, 32, (4, 4, 3))
            image = Image.fromarray(shades_443.astype(np.uint8)).resize((size + size // 4, size))
            image.save(folder / f"image_{number:04d}.jpg", quality=90)
    return root
