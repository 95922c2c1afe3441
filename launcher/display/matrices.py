"""Draws tables over classes, such as a confusion matrix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.display.figure import MUTED, drawable, new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_CLASSES_WITH_VALUES, _MAX_CLASSES_WITH_NAMES = 20, 50


def draw_matrix(values: Sequence[Sequence[float | None]], classes: Sequence[str], title: str) -> bytes:
    """Draw a table over classes, such as a confusion matrix, as a PNG: rows are true classes, columns predicted ones.

    The colour of a cell is its share of its row, so that rare classes are as visible as frequent ones. With up to 20
    classes, values are written into the cells; with up to 50, the classes are named; with more, they are numbered.
    """
    side = min(10.0, max(4.0, (0.5 if len(classes) <= _MAX_CLASSES_WITH_VALUES else 0.2) * len(classes)))
    figure = new_figure(side + 2.4, side + 1.2)
    _draw_table(figure, values, classes, title)
    return to_png(figure)


def _draw_table(figure: "Figure", values: Sequence[Sequence[float | None]], classes: Sequence[str], title: str) -> None:
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    count = len(classes)
    axes = figure.subplots()
    axes.set_title(drawable(title, longest=60), fontsize=13, fontweight="bold", parse_math=False, pad=12)
    shares = [_shares(row) for row in values]
    # Confusions are often a few in a hundred: the colour scale gives small shares more range than large ones.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    bar = figure.colorbar(image, shrink=0.8, label="share of the row", format=PercentFormatter(1, decimals=0))
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.outline.set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.spines[:].set_visible(False)
    if count <= _MAX_CLASSES_WITH_NAMES:
        _name_classes(axes, [drawable(name, longest=20) for name in classes])
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
    if count <= _MAX_CLASSES_WITH_VALUES:
        _write_cells(axes, values, shares)


def _name_classes(axes: "Axes", names: Sequence[str]) -> None:
    size = 10 if len(names) <= _MAX_CLASSES_WITH_VALUES else 7
    # A horizontal name has room for about seven letters.
    rotation = 90 if max(map(len, names)) > 7 or len(names) > _MAX_CLASSES_WITH_VALUES else 0
    axes.set_xticks(range(len(names)), names, rotation=rotation, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)


def _write_cells(axes: "Axes", values: Sequence[Sequence[float | None]], shares: Sequence[Sequence[float]]) -> None:
    texts = [["" if value is None else _short(value) for value in row] for row in values]
    size = min(10.0, 44 / max(1, *(len(text) for row in texts for text in row)))
    for row, (texts_of_row, shares_of_row) in enumerate(zip(texts, shares)):
        for column, (text, share) in enumerate(zip(texts_of_row, shares_of_row)):
            colour = "white" if share > 0.4 else MUTED if share == 0 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _shares(row: Sequence[float | None]) -> list[float]:
    whole = sum(abs(value) for value in row if value is not None)
    return [value / whole if value is not None and whole else 0.0 for value in row]


def _short(value: float) -> str:
    """Format a number in few characters: counts in full up to 9999, then in thousands; fractions with two digits."""
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.2f}"
    return f"{value:.0f}" if abs(value) < 10_000 else f"{value / 1000:.0f}k"
