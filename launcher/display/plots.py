"""What a person sees of a run: its curves, and the matrices of its newest validation.

Pure functions from rows and documents to PNG files; the same input gives the same bytes. Nothing here reads a
store. matplotlib stays in this file, and is imported only when a picture is drawn.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from launcher.display.tables import is_headline, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]
"""(step, value) in order of step; a value that is not finite is NaN, which matplotlib draws as a gap."""

_TRAIN, _VAL = "#0072b2", "#d55e00"  # Okabe and Ito: told apart by colour-blind eyes, and in grey
_MUTED = "#666666"
_BEST = {"loss": min, "accuracy": max}


def draw(rows: Iterable[Mapping[str, Any]], matrices: Mapping[str, Mapping[str, Any]], title: str) -> dict[str, bytes]:
    """Every picture of a run, by its name: ``curves``, and one of each matrix, such as ``val-confusion``.

    Args:
        rows: Metrics rows, as in ``metrics.jsonl``.
        matrices: What the run directory holds of each: ``step``, ``classes`` and ``values``.
        title: The run's name.
    """
    pictures = {"curves": draw_curves(rows, title)}
    for name, matrix in matrices.items():
        of_step = f"{title}: {name} at step {number(matrix['step'])}"
        pictures[name] = draw_matrix(matrix["values"], matrix["classes"], of_step)
    return pictures


# Curves ----------------------------------------------------------------------


def draw_curves(rows: Iterable[Mapping[str, Any]], title: str) -> bytes:
    """Loss, accuracy and learning rate over the steps, as a PNG of 1200 by 900 pixels.

    Every other number that validation measures makes it taller by a panel of 150 pixels; values of single classes
    are not drawn. A long run is thinned: every bin of steps keeps its lowest and its highest value, so a spike of a
    single step is still seen.

    Args:
        rows: Metrics rows, as in ``metrics.jsonl``. A panel without values is left out.
        title: The run's name.
    """
    rows = sorted(rows, key=lambda row: row["step"])
    figure = _new_figure(8, 6 + len(_declared(rows)))
    figure.suptitle(_drawable(title), fontsize=13, fontweight="bold", parse_math=False)
    _draw_panels(figure, rows)
    return _png(figure)


def _draw_panels(figure: "Figure", rows: Sequence[Mapping[str, Any]]) -> None:
    metrics = [name for name in _BEST if any(f"train/{name}" in row or f"val/{name}" in row for row in rows)]
    declared = _declared(rows)
    rates = _rates(rows)
    heights = [3.0] * len(metrics) + [1.5] * len(declared) + [1.5] * bool(rates)
    if not heights:
        figure.text(0.5, 0.5, "no rows yet", ha="center", va="center", fontsize=14, color=_MUTED)
        return
    panels: list[Axes] = list(figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for axes, name in zip(panels, [*metrics, *declared]):
        _draw_metric(axes, name, _points(rows, f"train/{name}"), _points(rows, f"val/{name}"))
    if rates:
        _draw_rates(panels[-1], rates)
    for axes in panels:
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="best", fontsize=9)
    figure.align_ylabels(panels)
    _label_steps(panels, rows)


def _draw_metric(axes: "Axes", name: str, train: Points, val: Points) -> None:
    if name in _BEST:  # a low panel has no room beside it for any name; its legend has
        axes.set_ylabel({"accuracy": "accuracy (fraction)"}.get(name, name))
    smoothed = _smooth(train) if len(train) > 20 else train
    if smoothed is not train:
        axes.plot(*_xy(_thin(train)), color=_TRAIN, alpha=0.25, linewidth=0.7)
        axes.plot(*_xy(smoothed), color=_TRAIN, linewidth=1.6, label="train (smoothed)")
    elif train:
        axes.plot(*_xy(train), color=_TRAIN, linewidth=1.6, marker=".", label="train")
    if val:
        marker = "o" if len(val) <= 100 else ""
        axes.plot(*_xy(_thin(val)), color=_VAL, linewidth=1.6, marker=marker, markersize=4, label=_val_label(name, val))
    broken = [step for step, value in train if math.isnan(value)]
    if broken:
        label = f"not finite, first at step {number(int(broken[0]))}"
        axes.axvline(broken[0], color=_MUTED, linewidth=1, linestyle=":", label=label)
    # Two decades on a linear axis are one decade and a flat line. Judged without the noise of single steps.
    values = _finite(smoothed + val)
    if name == "loss" and values and min(values) > 0 and max(values) > 100 * min(values):
        axes.set_yscale("log")


def _draw_rates(axes: "Axes", rates: Mapping[str, Points]) -> None:
    from matplotlib import colormaps

    axes.set_ylabel("learning rate")
    colours = colormaps["viridis"]
    for index, (label, points) in enumerate(rates.items()):
        place = index / max(1, len(rates) - 1)
        # Of many groups, as with layer-wise decay, the legend names the two ends of the colours.
        named = len(rates) > 1 and (len(rates) <= 4 or place in (0, 1))
        marker = "." if len(points) == 1 else ""
        axes.plot(*_xy(points), color=colours(0.85 * place), marker=marker, label=label if named else None)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))


def _label_steps(panels: Sequence["Axes"], rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    bottom = panels[-1].xaxis
    bottom.set_label_text("step (optimizer steps)")
    bottom.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    bottom.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    first, last = rows[0]["step"], rows[-1]["step"]
    if first < last:
        panels[-1].set_xlim(first - 0.01 * (last - first), last + 0.01 * (last - first))
    per_epoch = _steps_per_epoch(rows)
    if per_epoch:
        _label_epochs(panels[0], per_epoch)


def _label_epochs(axes: "Axes", per_epoch: float) -> None:
    from matplotlib.ticker import MaxNLocator

    def to_epochs(step: Any) -> Any:
        return step / per_epoch

    def to_steps(epoch: Any) -> Any:
        return epoch * per_epoch

    top = axes.secondary_xaxis("top", functions=(to_epochs, to_steps))
    top.set_xlabel("epochs completed")
    top.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10]))
    top.spines["top"].set_visible(False)


def _steps_per_epoch(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Steps from the first row to the first row of the newest epoch, per epoch; none within the first epoch."""
    begins: dict[int, int] = {}
    for row in rows:
        if "epoch" in row:
            begins.setdefault(row["epoch"], row["step"])
    epochs = sorted(begins)
    if len(epochs) < 2:
        return None
    return (begins[epochs[-1]] - begins[epochs[0]]) / (epochs[-1] - epochs[0])


def _rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """One line per distinct course of the learning rate, labelled with the groups that share it."""
    keys = {key for row in rows for key in row if key.startswith("lr/")}
    shared: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for key in sorted(keys, key=lambda key: (len(key), key)):  # lr/2 before lr/10
        shared.setdefault(tuple(_thin(_points(rows, key))), []).append(key.removeprefix("lr/"))
    return {_groups_label(groups): list(points) for points, groups in shared.items()}


def _groups_label(groups: Sequence[str]) -> str:
    if len(groups) == 1:
        return f"group {groups[0]}"
    return "groups " + (", ".join(groups) if len(groups) <= 4 else f"{groups[0]}, … {groups[-1]}")


def _val_label(name: str, val: Points) -> str:
    finite = _finite(val)
    if name not in _BEST:  # whether smaller or larger is better is not known
        return f"val/{name} (last {number(finite[-1])})" if finite else f"val/{name}"
    if not finite:
        return "val"
    best = _BEST[name](finite)
    step = min(step for step, value in val if value == best)
    return f"val (best {number(best)} at step {number(int(step))})"


def _declared(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What validation measures beside loss and accuracy, as far as it is one number each."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("val/") and is_headline(key))
    return [name for name in (key.removeprefix("val/") for key in names) if name not in _BEST]


def _points(rows: Iterable[Mapping[str, Any]], key: str) -> Points:
    return [(row["step"], _drawn(row[key])) for row in rows if key in row]


def _drawn(value: float | None) -> float:
    # Near the largest float the axis itself would overflow.
    return value if value is not None and abs(value) < 1e300 else math.nan


def _finite(points: Iterable[tuple[float, float]]) -> list[float]:
    return [value for _, value in points if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _xy(points: Points) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _bins(points: Points, most: int) -> Iterator[Points]:
    size = math.ceil(len(points) / most)
    return (points[start : start + size] for start in range(0, len(points), size))


def _thin(points: Points, most: int = 2000) -> Points:
    """At most about so many points: of every bin the lowest and the highest; a bin without a value stays a gap."""
    if len(points) <= most:
        return points
    thinned: Points = []
    for bin_ in _bins(points, most // 2):
        finite = [point for point in bin_ if not math.isnan(point[1])] or bin_[:1]
        ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
        thinned.extend(sorted(ends))
    return thinned


def _smooth(points: Points) -> Points:
    """A centred moving mean over a twentieth of the run, which narrows to nothing at the first step.

    Centred, so that it does not lag; narrowing, so that the fall of the first steps is kept.
    """
    binned = [(_mean([step for step, _ in bin_]), _mean(_finite(bin_))) for bin_ in _bins(points, 400)]
    smoothed: Points = []
    for index, (step, value) in enumerate(binned):
        reach = min(index, len(binned) // 40 + 1)
        near = _finite(binned[index - reach : index + reach + 1])
        smoothed.append((step, value if math.isnan(value) else _mean(near)))
    return smoothed


# Matrices --------------------------------------------------------------------

_MOST_WRITTEN, _MOST_LABELLED = 20, 50


def draw_matrix(values: Sequence[Sequence[float | None]], classes: Sequence[str], title: str) -> bytes:
    """A table over classes, such as a confusion matrix, as a PNG: rows true, columns predicted.

    The colour of a cell is its share of its row, so that rare classes are seen as well as frequent ones. Up to 20
    classes the values are written into the cells; up to 50 the classes are named, beyond that numbered.
    """
    side = min(10.0, max(4.0, (0.5 if len(classes) <= _MOST_WRITTEN else 0.2) * len(classes)))
    figure = _new_figure(side + 2.4, side + 1.2)
    _draw_table(figure, values, classes, title)
    return _png(figure)


def _draw_table(figure: "Figure", values: Sequence[Sequence[float | None]], classes: Sequence[str], title: str) -> None:
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    count = len(classes)
    axes = figure.subplots()
    axes.set_title(_drawable(title, longest=60), fontsize=13, fontweight="bold", parse_math=False, pad=12)
    shares = [_shares(row) for row in values]
    # A few in a hundred are what one looks for: the scale gives small shares more room than large ones.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    bar = figure.colorbar(image, shrink=0.8, label="share of the row", format=PercentFormatter(1, decimals=0))
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.outline.set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.spines[:].set_visible(False)
    if count <= _MOST_LABELLED:
        _name_classes(axes, [_drawable(name, longest=20) for name in classes])
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
    if count <= _MOST_WRITTEN:
        _write_cells(axes, values, shares)


def _name_classes(axes: "Axes", names: Sequence[str]) -> None:
    size = 10 if len(names) <= _MOST_WRITTEN else 7
    # Side by side, a name has room for about seven letters.
    rotation = 90 if max(map(len, names)) > 7 or len(names) > _MOST_WRITTEN else 0
    axes.set_xticks(range(len(names)), names, rotation=rotation, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)


def _write_cells(axes: "Axes", values: Sequence[Sequence[float | None]], shares: Sequence[Sequence[float]]) -> None:
    texts = [["" if value is None else _short(value) for value in row] for row in values]
    size = min(10.0, 44 / max(1, *(len(text) for row in texts for text in row)))
    for row, (texts_of_row, shares_of_row) in enumerate(zip(texts, shares)):
        for column, (text, share) in enumerate(zip(texts_of_row, shares_of_row)):
            colour = "white" if share > 0.4 else _MUTED if share == 0 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _shares(row: Sequence[float | None]) -> list[float]:
    whole = sum(abs(value) for value in row if value is not None)
    return [value / whole if value is not None and whole else 0.0 for value in row]


def _short(value: float) -> str:
    """A number of few characters: a count in full up to 9,999, then in thousands; two digits of a fraction."""
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.2f}"
    return f"{value:.0f}" if abs(value) < 10_000 else f"{value / 1000:.0f}k"


# Both ------------------------------------------------------------------------


def _new_figure(width: float, height: float) -> "Figure":
    """Inches of 150 pixels."""
    # Figure without pyplot: no backend is chosen, no figure is registered, any thread may draw.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _png(figure: "Figure") -> bytes:
    png = BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _drawable(text: str, longest: int = 80) -> str:
    """Text that the font can draw, in one line: a missing glyph would be a warning for every drawing."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties(weight="bold"))).get_charmap()
    text = "".join(letter if ord(letter) in glyphs else "?" for letter in text)
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-longest // 2 :]}"
