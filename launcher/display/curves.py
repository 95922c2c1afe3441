"""Draws loss, metrics and learning rates of a run over its steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.display.figure import MUTED, drawable, new_figure, to_png
from launcher.display.points import Points, coordinates, finite_values, points_of, smooth, thin
from launcher.display.tables import is_headline, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAIN, _VAL = "#0072b2", "#d55e00"  # by Okabe and Ito: distinct for colour-blind readers and in grey
_BEST = {"loss": min, "accuracy": max}


def draw_curves(rows: Iterable[Mapping[str, Any]], title: str) -> bytes:
    """Draw loss, accuracy and learning rate over the steps, as a PNG of 1200 by 900 pixels.

    Every further validation metric adds a panel of 150 pixels; values of single classes are not drawn. A long run is
    thinned, but a spike of a single step stays visible.

    Args:
        rows: Metrics rows, as in ``metrics.jsonl``. A panel without values is left out.
        title: The run's name.
    """
    rows = sorted(rows, key=lambda row: row["step"])
    figure = new_figure(8, 6 + len(_declared(rows)))
    figure.suptitle(drawable(title), fontsize=13, fontweight="bold", parse_math=False)
    _draw_panels(figure, rows)
    return to_png(figure)


def _draw_panels(figure: "Figure", rows: Sequence[Mapping[str, Any]]) -> None:
    metrics = [name for name in _BEST if any(f"train/{name}" in row or f"val/{name}" in row for row in rows)]
    declared = _declared(rows)
    rates = _rates(rows)
    heights = [3.0] * len(metrics) + [1.5] * len(declared) + [1.5] * bool(rates)
    if not heights:
        figure.text(0.5, 0.5, "no rows yet", ha="center", va="center", fontsize=14, color=MUTED)
        return
    panels: list[Axes] = list(figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for axes, name in zip(panels, [*metrics, *declared]):
        _draw_metric(axes, name, points_of(rows, f"train/{name}"), points_of(rows, f"val/{name}"))
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
    if name in _BEST:  # the other panels are too low for a label; their legend has the name
        axes.set_ylabel({"accuracy": "accuracy (fraction)"}.get(name, name))
    smoothed = smooth(train) if len(train) > 20 else train
    if smoothed is not train:
        axes.plot(*coordinates(thin(train)), color=_TRAIN, alpha=0.25, linewidth=0.7)
        axes.plot(*coordinates(smoothed), color=_TRAIN, linewidth=1.6, label="train (smoothed)")
    elif train:
        axes.plot(*coordinates(train), color=_TRAIN, linewidth=1.6, marker=".", label="train")
    if val:
        marker = "o" if len(val) <= 100 else ""
        axes.plot(
            *coordinates(thin(val)), color=_VAL, linewidth=1.6, marker=marker, markersize=4, label=_val_label(name, val)
        )
    broken = [step for step, value in train if math.isnan(value)]
    if broken:
        label = f"not finite, first at step {number(int(broken[0]))}"
        axes.axvline(broken[0], color=MUTED, linewidth=1, linestyle=":", label=label)
    # A linear axis shows only the upper of two decades. The smoothed curve decides, not the noise of single steps.
    values = finite_values(smoothed + val)
    if name == "loss" and values and min(values) > 0 and max(values) > 100 * min(values):
        axes.set_yscale("log")


def _draw_rates(axes: "Axes", rates: Mapping[str, Points]) -> None:
    from matplotlib import colormaps

    axes.set_ylabel("learning rate")
    colours = colormaps["viridis"]
    for index, (label, points) in enumerate(rates.items()):
        place = index / max(1, len(rates) - 1)
        # Of many groups, as with layer-wise decay, the legend names only the first and the last.
        named = len(rates) > 1 and (len(rates) <= 4 or place in (0, 1))
        marker = "." if len(points) == 1 else ""
        axes.plot(*coordinates(points), color=colours(0.85 * place), marker=marker, label=label if named else None)
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
    """Return the steps per epoch, measured from the first row to the newest epoch's first; None in the first epoch."""
    begins: dict[int, int] = {}
    for row in rows:
        if "epoch" in row:
            begins.setdefault(row["epoch"], row["step"])
    epochs = sorted(begins)
    if len(epochs) < 2:
        return None
    return (begins[epochs[-1]] - begins[epochs[0]]) / (epochs[-1] - epochs[0])


def _rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Return the distinct learning rate curves, labelled with the parameter groups that share them."""
    keys = {key for row in rows for key in row if key.startswith("lr/")}
    shared: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for key in sorted(keys, key=lambda key: (len(key), key)):  # lr/2 before lr/10
        shared.setdefault(tuple(thin(points_of(rows, key))), []).append(key.removeprefix("lr/"))
    return {_groups_label(groups): list(points) for points, groups in shared.items()}


def _groups_label(groups: Sequence[str]) -> str:
    if len(groups) == 1:
        return f"group {groups[0]}"
    return "groups " + (", ".join(groups) if len(groups) <= 4 else f"{groups[0]}, … {groups[-1]}")


def _val_label(name: str, val: Points) -> str:
    finite = finite_values(val)
    if name not in _BEST:  # unknown whether lower or higher is better
        return f"val/{name} (last {number(finite[-1])})" if finite else f"val/{name}"
    if not finite:
        return "val"
    best = _BEST[name](finite)
    step = min(step for step, value in val if value == best)
    return f"val (best {number(best)} at step {number(int(step))})"


def _declared(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the validation metrics that are one number each, without loss and accuracy."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("val/") and is_headline(key))
    return [name for name in (key.removeprefix("val/") for key in names) if name not in _BEST]
