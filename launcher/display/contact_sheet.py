"""Draws samples of a dataset with their labels, in a square of four by four."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.display.figure import MUTED, drawable, new_figure, to_png

if TYPE_CHECKING:
    import numpy as np

_COLUMNS = 4
_TILE = 1.9
"""Inches."""


def draw_sheet(tiles: "Sequence[tuple[np.ndarray[Any, Any] | None, str]]", title: str) -> bytes:
    """Draw images with their captions under them as a PNG; an image that is None is an empty frame.

    Shapes: images uint8 [H, W, 3].
    """
    rows = max(1, math.ceil(len(tiles) / _COLUMNS))
    figure = new_figure(_COLUMNS * _TILE, rows * (_TILE + 0.25) + 0.5)
    figure.suptitle(drawable(title, longest=160), fontsize=9, parse_math=False, wrap=True)
    for axes, (pixels, caption) in zip(figure.subplots(rows, _COLUMNS, squeeze=False).flat, tiles):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(drawable(caption, longest=28), fontsize=9, parse_math=False)
        if pixels is None:
            axes.set_aspect(1)
            axes.spines[:].set_color(MUTED)
        else:
            axes.imshow(pixels)
            axes.spines[:].set_visible(False)
    for axes in figure.axes[len(tiles) :]:
        axes.set_axis_off()
    return to_png(figure)
