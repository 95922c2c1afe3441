"""Pictures of a run, from rows and documents made by hand."""

import io
import math
import random
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from launcher.display import curves, matrices
from launcher.display.plots import draw, draw_curves, draw_matrix
from launcher.display.points import Points, smooth, thin


def rows_of(steps: int, *, val_every: int = 0, accuracy: bool = True) -> list[dict[str, Any]]:
    """Rows of a run that learns, noisily, with two parameter groups; a validation ends an epoch."""
    draw = random.Random(0)
    rows = []
    for step in range(1, steps + 1):
        done = step / steps
        row: dict[str, Any] = {
            "step": step,
            "epoch": (step - 1) // val_every if val_every else 0,
            "samples": 64 * step,
            "train/loss": 2.3 * math.exp(-3 * done) * draw.uniform(0.8, 1.2),
            "lr/0": 0.05 * (1 - done),
            "lr/1": 0.01,
        }
        if accuracy:
            row["train/accuracy"] = done * draw.uniform(0.9, 1.0)
        if val_every and step % val_every == 0:
            row |= {"val/loss": 2.4 * math.exp(-2.5 * done)} | ({"val/accuracy": 0.9 * done} if accuracy else {})
        rows.append(row)
    return rows


def figure_of(rows: list[dict[str, Any]]) -> Figure:
    """The figure itself, for what a PNG does not tell."""
    figure = Figure()
    curves._draw_panels(figure, rows)
    return figure


def matrix_figure(values: list[list[int]], classes: list[str]) -> Figure:
    figure = Figure()
    matrices._draw_table(figure, values, classes, "val-confusion")
    return figure


def pixels_of(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png))


class TestCurves:
    """Warnings are errors here, so that every drawing also proves to be silent."""

    @pytest.mark.parametrize(
        "rows",
        [
            [],
            rows_of(1),
            rows_of(2, val_every=1),
            rows_of(60),
            rows_of(220, val_every=22),
            rows_of(220, val_every=22, accuracy=False),
            [{"step": 5, "epoch": 0, "val/loss": 1.0}],
            [{"step": 5, "lr/0": 0.1}],
            [{"step": 5}],
            [{"step": step, "epoch": 0, "train/loss": math.nan, "val/loss": None} for step in range(1, 50)],
            [{"step": 1, "epoch": 0, "train/loss": -1e308}, {"step": 2, "epoch": 0, "train/loss": 1.7e308}],
            [{"step": 1, "epoch": 0, "train/loss": 1e299}, {"step": 2, "epoch": 0, "train/loss": math.inf}],
            [{"step": step, "epoch": 0, "train/loss": 0.0} for step in range(1, 50)],
            [{"step": step, **{f"lr/{group}": 0.1 / (group + 1) for group in range(12)}} for step in (1, 2)],
        ],
        ids=[
            "none", "one", "two", "no val", "usual", "regression", "only val", "only lr", "no values", "all nan",
            "overflow", "inf", "zero", "many groups",
        ],
    )  # fmt: skip
    def test_draws_any_rows(self, rows: list[dict[str, Any]]) -> None:
        pixels = pixels_of(draw_curves(rows, "digits"))
        assert pixels.shape == (900, 1200, 4)
        assert np.ptp(pixels[..., 0]) == 1  # not a blank page

    def test_the_same_rows_give_the_same_bytes_in_any_order(self) -> None:
        rows = rows_of(30, val_every=10)
        assert draw_curves(rows, "digits") == draw_curves(reversed(rows), "digits")

    @pytest.mark.parametrize("title", ["$x_$", "ünïcode", "日本 🚀", "x" * 300, ""])
    def test_any_title(self, title: str) -> None:
        assert draw_curves([], title)

    def test_panels(self) -> None:
        panels = figure_of(rows_of(220, val_every=22)).axes
        assert [axes.get_ylabel() for axes in panels] == ["loss", "accuracy (fraction)", "learning rate"]
        assert panels[-1].get_xlabel() == "step (optimizer steps)"
        assert [axes.get_ylabel() for axes in figure_of(rows_of(9, accuracy=False)).axes] == ["loss", "learning rate"]
        assert figure_of([]).axes == []

    def test_declared_metrics_have_small_panels(self) -> None:
        rows = rows_of(220, val_every=22)
        for row in rows[21::22]:
            row |= {"val/f1": row["step"] / 220, "val/top5": math.nan, **{f"val/recall/{k}": 0.5 for k in range(100)}}
        panels = figure_of(rows).axes
        labels = [axes.get_legend_handles_labels()[1] for axes in panels[2:4]]
        assert labels == [["val/f1 (last 1.000)"], ["val/top5"]]
        assert len(panels) == 5
        assert pixels_of(draw_curves(rows, "digits")).shape == (1200, 1200, 4)

    def test_the_best_validation_is_named(self) -> None:
        rows = [{"step": step, "val/loss": loss} for step, loss in [(10, 0.5), (20, 0.25), (30, 0.25), (40, math.nan)]]
        labels = figure_of(rows).axes[0].get_legend_handles_labels()[1]
        assert labels == ["val (best 0.2500 at step 20)"]

    def test_a_loss_that_breaks_is_marked(self) -> None:
        rows = rows_of(100)
        for row in rows[59:]:
            row["train/loss"] = math.nan
        axes = figure_of(rows).axes[0]
        assert axes.get_legend_handles_labels()[1] == ["train (smoothed)", "not finite, first at step 60"]
        smoothed = next(line for line in axes.lines if line.get_label() == "train (smoothed)")
        assert np.isnan(np.asarray(smoothed.get_ydata(), float)[59:]).all()

    def test_loss_over_decades_is_logarithmic(self) -> None:
        def scale_of(losses: list[float]) -> str:
            rows = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses, 1)]
            return figure_of(rows).axes[0].get_yscale()

        assert scale_of([10 ** (-step / 20) for step in range(100)]) == "log"
        assert scale_of([2.0, 1.0, 0.5]) == "linear"
        assert scale_of([1000.0, 1.0, -1.0]) == "linear"
        assert scale_of([1.0] * 50 + [1e-6] + [1.0] * 50) == "linear"  # one lucky batch

    def test_groups_of_one_course_share_a_line(self) -> None:
        rows = [
            {"step": step, "lr/0": 0.1 / step, "lr/1": 0.5, "lr/2": 0.1 / step} | ({"lr/10": 0.3} if step > 5 else {})
            for step in range(1, 11)
        ]
        lines = figure_of(rows).axes[0].lines
        assert [line.get_label() for line in lines] == ["groups 0, 2", "group 1", "group 10"]
        assert [np.asarray(line.get_xdata()).size for line in lines] == [10, 10, 5]

    def test_epochs_stand_above(self) -> None:
        figure = figure_of(rows_of(220, val_every=22))
        figure.draw_without_rendering()
        axes = figure.axes[0]
        [epochs] = axes.child_axes
        low, high = axes.get_xlim()
        assert epochs.get_xlim() == pytest.approx((low / 22, high / 22))

    def test_a_long_run_keeps_its_spikes(self) -> None:
        points: Points = [(step, 1.0) for step in range(100_000)]
        points[51_234] = (51_234, 9.0)
        points[51_235] = (51_235, -9.0)
        thinned = thin(points)
        assert len(thinned) <= 2000
        assert thinned == sorted(thinned)
        assert {(51_234, 9.0), (51_235, -9.0)} <= set(thinned)

    def test_thinning_keeps_gaps(self) -> None:
        points: Points = [(step, math.nan if step >= 5000 else 1.0) for step in range(10_000)]
        thinned = thin(points)
        assert all(math.isnan(value) == (step >= 5000) for step, value in thinned)
        assert thinned[-1][0] > 9900

    def test_smoothing_neither_lags_nor_hides_the_start(self) -> None:
        line: Points = [(step, 3.0 * step) for step in range(400)]
        smoothed = smooth(line)
        assert smoothed[0] == line[0]
        assert smoothed[200] == pytest.approx(line[200])


class TestMatrix:
    @pytest.mark.parametrize("count", [1, 20, 50, 300])
    def test_draws_any_number_of_classes(self, count: int) -> None:
        values = np.random.default_rng(0).integers(0, 20_000, (count, count)).tolist()
        pixels = pixels_of(draw_matrix(values, [f"class {number}" for number in range(count)], "val-confusion"))
        assert 700 < min(pixels.shape[:2]) <= max(pixels.shape[:2]) < 2000
        assert np.ptp(pixels[..., 0]) > 0.9

    @pytest.mark.parametrize(
        "values",
        [[[0, 0], [0, 0]], [[None, 1.0], [None, None]], [[0.25, 0.75], [1e-9, 1.0]], [[-1.0, 1.0], [1e300, 1e300]]],
        ids=["zeros", "not finite", "shares", "no shares"],
    )
    def test_draws_any_values(self, values: list[list[float | None]]) -> None:
        assert draw_matrix(values, ["日本", "$x_$" * 20], "a" * 300)

    def test_the_same_matrix_gives_the_same_bytes(self) -> None:
        values, classes = [[5, 1], [0, 7]], ["cat", "dog"]
        assert draw_matrix(values, classes, "digits") == draw_matrix(values, classes, "digits")

    def test_rows_are_true_and_columns_predicted(self) -> None:
        """Two of three of class 0 are taken for class 1: that cell, on the upper right, is the darkest of its row."""
        figure = matrix_figure([[1, 2, 0], [0, 4, 0], [0, 0, 40_000]], ["a", "b", "c"])
        axes = figure.axes[0]
        shares = np.asarray(axes.images[0].get_array())
        assert shares[0].tolist() == pytest.approx([1 / 3, 2 / 3, 0])
        assert shares[2].tolist() == [0, 0, 1]
        assert {(*text.get_position(), text.get_text()) for text in axes.texts} >= {(1, 0, "2"), (2, 2, "40k")}
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
        assert axes.yaxis_inverted()
        for axis in (axes.xaxis, axes.yaxis):
            assert [label.get_text() for label in axis.get_ticklabels()] == ["a", "b", "c"]

    @pytest.mark.parametrize(("count", "written", "named"), [(20, True, True), (21, False, True), (51, False, False)])
    def test_what_does_not_fit_is_left_out(self, count: int, written: bool, named: bool) -> None:
        axes = matrix_figure(np.eye(count, dtype=int).tolist(), [f"class {number}" for number in range(count)]).axes[0]
        assert (len(axes.texts) == count * count) == written
        axes.figure.draw_without_rendering()
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert ("class 7" in labels) == named
        assert len(labels) <= 50


def test_every_picture_of_a_run() -> None:
    matrix = {"step": 9, "classes": ["cat", "dog"], "values": [[5, 1], [0, 7]]}

    drawn = draw([], {"val-confusion": matrix}, "digits")

    assert drawn == {
        "curves": draw_curves([], "digits"),
        "val-confusion": draw_matrix([[5, 1], [0, 7]], ["cat", "dog"], "digits: val-confusion at step 9"),
    }
