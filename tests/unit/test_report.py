"""Pictures and texts of a run, from rows and documents made by hand."""

import io
import math
import random
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from launcher import report
from launcher.report import checkpoints_table, draw_curves, duration, number, runs_table, summary, table

RESULT: dict[str, Any] = {
    "run": "s3://bucket/runs/digits",
    "status": "completed",
    "step": 220,
    "epoch": 10,
    "samples": 14080,
    "metrics": {"train/loss": 0.412, "lr/0": 0.05, "val/loss": 0.31, "val/accuracy": 0.94},
    "best": {"metric": "val/accuracy", "value": 0.951, "step": 198},
    "workers": 2,
    "attempts": 1,
    "state_sha256": "3f2a",
    "seconds": 83.2,
    "images_per_second": 1240.3,
    "error": None,
}


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
    report._draw_panels(figure, rows)
    return figure


class TestText:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (1240, "1,240"),
            (0.4, "0.4000"),
            (12.3456, "12.35"),
            (1234.5, "1234"),
            (3.2e-5, "3.200e-05"),
            (0.0, "0.000"),
            (math.nan, "nan"),
            (-math.inf, "-inf"),
        ],
    )
    def test_number(self, value: float, text: str) -> None:
        assert number(value) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(-1, "0:00"), (12.4, "0:12"), (59.6, "1:00"), (3723, "1:02:03"), (2 * 86400 + 3723, "2d 1:02:03")],
    )
    def test_duration(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text

    def test_table_sets_numbers_right_and_text_left(self) -> None:
        text = table(["group", "tensors", "lr"], [("*.bias", 12, 0.05), ("everything else", 1240, None)])
        assert text.splitlines() == [
            "group            tensors       lr",
            "*.bias                12  0.05000",
            "everything else    1,240",
        ]

    def test_table_takes_an_alignment(self) -> None:
        assert table(["a", "b"], [("x", 1), ("yyy", 20)], "><").splitlines() == ["  a  b", "  x  1", "yyy  20"]

    def test_table_without_rows_is_its_headers(self) -> None:
        assert table(["name", "step"], []) == "name  step"


class TestSummary:
    def test_a_completed_run(self) -> None:
        assert summary(RESULT).splitlines() == [
            "s3://bucket/runs/digits completed at step 220, epoch 10, 14,080 samples",
            "",
            "  val/loss      0.3100",
            "  val/accuracy  0.9400",
            "  train/loss    0.4120",
            "  best          val/accuracy 0.9510 at step 198",
            "  workers       2",
            "  attempts      1",
            "  time          1:23, 1,240 images/s",
            "  state         sha256 3f2a",
            "",
            "next: launcher plot s3://bucket/runs/digits         draw the curves",
            "      launcher checkpoints s3://bucket/runs/digits  see what was saved",
        ]

    @pytest.mark.parametrize(
        ("status", "command"),
        [("stopped", "resume"), ("failed", "resume"), ("running", "logs"), ("completed", "plot")],
    )
    def test_it_ends_with_the_next_command(self, status: str, command: str) -> None:
        end = summary(RESULT | {"status": status, "run": "/runs/my run"}).rsplit("\n\n", 1)[1]
        assert end.startswith(f"next: launcher {command} '/runs/my run' ")

    def test_a_failure_says_why(self) -> None:
        error = "digits.yaml: model raised\nTraceback ..."
        assert f"\n\n{error}\n\nnext: " in summary(RESULT | {"status": "failed", "error": error})

    def test_what_is_not_known_is_left_out(self) -> None:
        assert summary({"run": "runs/a", "status": "failed"}) == (
            "runs/a failed\n\n"
            "next: launcher resume runs/a  go on from the newest good checkpoint\n"
            "      launcher logs runs/a    read what the workers wrote"
        )

    def test_null_is_no_value(self) -> None:
        best = {"metric": "val/loss", "value": None, "step": 3}
        text = summary(RESULT | {"metrics": {"val/loss": None, "train/loss": 0.5}, "best": best})
        assert "val/loss" not in text
        assert "  train/loss  0.5000" in text


class TestRunsTable:
    def test_runs_of_different_metrics(self) -> None:
        young = {"run": "runs/regression/", "status": "running", "metrics": {"val/loss": 0.5}, "updated": 995.0}
        fresh = {"run": "runs/fresh", "status": "failed", "step": 0, "epoch": 0, "metrics": {}, "best": None}
        lines = runs_table([RESULT | {"updated": 0.0}, young, fresh], now=1000.0).splitlines()
        assert lines == [
            "name        status     step  epoch  val/loss  val/accuracy  best                             updated",
            "digits      completed   220     10    0.3100        0.9400  val/accuracy 0.9510 at step 198  16 min ago",
            "regression  running                   0.5000                                                 5 s ago",
            "fresh       failed        0      0",
        ]

    @pytest.mark.parametrize(
        ("seconds", "age"), [(-3, "0 s"), (119, "119 s"), (121, "2 min"), (7300, "2 h"), (86400 * 9.5, "9 d")]
    )
    def test_age(self, seconds: float, age: str) -> None:
        text = runs_table([{"run": "a", "status": "stopped", "updated": 0.0}], now=seconds)
        assert text.endswith(f"  {age} ago")

    def test_an_empty_store(self) -> None:
        assert runs_table([]) == "no runs"


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
        pixels = matplotlib.image.imread(io.BytesIO(draw_curves(rows, "digits")))
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
        points: report.Points = [(step, 1.0) for step in range(100_000)]
        points[51_234] = (51_234, 9.0)
        points[51_235] = (51_235, -9.0)
        thinned = report._thin(points)
        assert len(thinned) <= 2000
        assert thinned == sorted(thinned)
        assert {(51_234, 9.0), (51_235, -9.0)} <= set(thinned)

    def test_thinning_keeps_gaps(self) -> None:
        points: report.Points = [(step, math.nan if step >= 5000 else 1.0) for step in range(10_000)]
        thinned = report._thin(points)
        assert all(math.isnan(value) == (step >= 5000) for step, value in thinned)
        assert thinned[-1][0] > 9900

    def test_smoothing_neither_lags_nor_hides_the_start(self) -> None:
        line: report.Points = [(step, 3.0 * step) for step in range(400)]
        smoothed = report._smooth(line)
        assert smoothed[0] == line[0]
        assert smoothed[200] == pytest.approx(line[200])


class TestCheckpointsTable:
    def test_a_defect_stands_below(self) -> None:
        good = {"step": 5, "good": True, "bytes": 2**21, "created": "2026-01-01T00:00:00Z", "state_sha256": "ab" * 32}
        bad = {"step": 9, "good": False, "defect": "runs/a/checkpoints/step-00000009: model.safetensors is missing"}
        assert checkpoints_table([good | {"metrics": {"val/loss": 0.5}}, bad]).splitlines() == [
            "step  whole    MiB  val/loss  state sha256      created",
            "   5  yes    2.000    0.5000  abababababababab  2026-01-01T00:00:00Z",
            "   9  no",
            "runs/a/checkpoints/step-00000009: model.safetensors is missing",
        ]

    def test_none(self) -> None:
        assert checkpoints_table([]) == "no checkpoints"
