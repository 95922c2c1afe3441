"""What a person reads of a run: curves, a summary, tables.

Pure functions from rows and documents to pictures and text. Nothing here reads a store, asks a
cluster or prints; matplotlib stays in this file, and is imported only when a picture is drawn.
"""

import math
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from jobs.spec import JobSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from launcher.plan import InitPlan, Plan

Points = list[tuple[float, float]]
"""(step, value) in order of step; a value that is not finite is NaN, which matplotlib draws as a gap."""

_TRAIN, _VAL = "#0072b2", "#d55e00"  # Okabe and Ito: told apart by colour-blind eyes, and in grey
_MUTED = "#666666"
_BEST = {"loss": min, "accuracy": max}

# Text ------------------------------------------------------------------------


def number(value: float, digits: int = 4) -> str:
    """A number for people: ``1,240`` for whole numbers, else ``digits`` significant digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:#.{digits}g}".rstrip(".")


def duration(seconds: float) -> str:
    """Seconds as ``0:12``, ``1:02:03`` or ``2d 1:02:03``."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], align: str = "") -> str:
    """Columns of plain text, two spaces apart.

    Args:
        headers: One per column.
        rows: Cells; numbers are written by :func:`number`, ``None`` is an empty cell.
        align: ``<`` or ``>`` per column; without it, columns of numbers stand right and text left.
    """
    rows = [tuple(row) for row in rows]
    columns = list(zip(*rows)) or [()] * len(headers)
    align = align or "".join(">" if _is_numeric(column) else "<" for column in columns)
    lines = [tuple(headers), *(tuple(map(_cell, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths)).rstrip() for line in lines
    )


def summary(result: Mapping[str, Any]) -> str:
    """The last words about a run, for a person: how it stands, and the next command to type.

    Args:
        result: The document of ``--json``; only ``run`` and ``status`` must be there.
    """
    run, status = result["run"], result["status"]
    facts: list[tuple[str, str | None]] = [
        *((name, _cell(value)) for name, value in _metrics(result).items() if not name.startswith("lr/")),
        ("best", _best(result)),
        ("workers", _counted(result, "workers")),
        ("attempts", _counted(result, "attempts")),
        ("time", _spent(result)),
        ("state", result.get("state_sha256") and f"sha256 {result['state_sha256']}"),
    ]
    blocks = [
        f"{run} {'is running' if status == 'running' else status}{_position(result)}",
        _aligned("  ", [(name, text) for name, text in facts if text]),
        result.get("error"),
        _aligned("next: ", _next_commands(status, shlex.quote(run))),
    ]
    return "\n\n".join(str(block).strip("\n") for block in blocks if block)


def runs_table(results: Iterable[Mapping[str, Any]], now: float | None = None) -> str:
    """The runs of a store, one line each.

    Args:
        results: Documents as :func:`summary` takes them; ``updated``, in Unix seconds, gives the age.
        now: The present, in Unix seconds; by default the clock's.
    """
    results = list(results)
    if not results:
        return "no runs"
    now = time.time() if now is None else now
    measured = dict.fromkeys(name for result in results for name in _metrics(result) if _is_val(name))
    return table(
        ["name", "status", "step", "epoch", *measured, "best", "updated"],
        [
            (
                result["run"].rstrip("/").rsplit("/", 1)[-1],
                result["status"],
                result.get("step"),
                result.get("epoch"),
                *(_metrics(result).get(name) for name in measured),
                _best(result),
                _age(result, now),
            )
            for result in results
        ],
    )


def plan_text(spec: JobSpec, plan: "Plan") -> str:
    """Everything a plan has decided, for a person."""
    workers = ", ".join(f"{count} shard{'s' * (count > 1)}" for count in plan.shards_by_worker)
    limit = f"; train.max_steps ends it at {plan.end_step:,}" if plan.end_step < plan.total_steps else ""
    unused = f"; {plan.unused_per_epoch:,} others each epoch wait for the next" if plan.unused_per_epoch else ""
    validation = f"{plan.num_val_samples:,} samples" if plan.num_val_samples else "none"
    sum_order = "one order for any number of workers" if spec.train.exact else "the backend's own order"
    facts = [
        ("run", f"{plan.run} (the store was written, read and cleaned)"),
        ("model", f"{plan.parameters:,} parameters"),
        *_init_facts(plan.init_from),
        ("data", f"{plan.num_samples:,} samples{unused}"),
        ("validation", validation),
        ("batch", f"{spec.train.global_batch:,} = {spec.train.shards} shards of {plan.micro_batch:,}"),
        ("steps", f"{plan.steps_per_epoch:,} an epoch, {plan.total_steps:,} in all{limit}"),
        ("workers", f"{spec.workers.num} on {'GPU with NCCL' if plan.gpus else 'CPU with gloo'}: {workers}"),
        ("gradients", f"summed in {sum_order}"),
        ("loss", spec.loss.factory.path),
        ("optimizer", spec.optimizer.factory.path),
        ("schedule", f"{spec.scheduler.factory.path}, every {spec.scheduler.interval}" if spec.scheduler else "none"),
        ("checkpoint", f"about {plan.checkpoint_bytes / 2**20:,.1f} MiB, the newest {spec.checkpoint.keep} kept"),
        ("trial", f"{plan.trial_samples} samples through model, loss and backward: loss {number(plan.trial_loss)}"),
    ]
    groups = table(
        ["group", "tensors", "parameters", "lr", "weight decay", "trains from"],
        [
            (group.pattern, group.tensors, group.parameters, group.lr, group.weight_decay, f"epoch {group.from_epoch}")
            for group in plan.groups
        ],
    )
    return f"{_aligned('', facts)}\n\n{groups}"


def _init_facts(init: "InitPlan | None") -> list[tuple[str, str]]:
    """What a run begins with, for its plan; ``--json`` has every name."""
    if init is None:
        return []
    listed = [("not loaded", init.kept), ("unused there", init.unused)]
    return [
        ("init_from", init.url),
        *(("passed over", defect) for defect in init.passed_over),
        ("loaded", f"{len(init.loaded):,} of {len(init.loaded) + len(init.kept):,} tensors: {_some(init.loaded)}"),
        *((name, _some(tensors)) for name, tensors in listed if tensors),
    ]


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def checkpoints_table(documents: Sequence[Mapping[str, Any]]) -> str:
    """The checkpoints of a run, one line each, as ``launcher.status`` verified them; then what is wrong with any."""
    if not documents:
        return "no checkpoints"
    measured = dict.fromkeys(name for document in documents for name in document.get("metrics", ()) if _is_val(name))
    lines = table(
        ["step", "whole", "MiB", *measured, "state sha256", "created"],
        [
            (
                document["step"],
                "yes" if document["good"] else "no",
                document["bytes"] / 2**20 if document["good"] else None,
                *(document.get("metrics", {}).get(name) for name in measured),
                document.get("state_sha256", "")[:16],
                document.get("created"),
            )
            for document in documents
        ],
    )
    return "\n".join([lines, *(document["defect"] for document in documents if not document["good"])])


def _is_val(name: str) -> bool:
    return name.startswith("val/")


def _metrics(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Validation first: it is what a run is judged by."""
    metrics = result.get("metrics") or {}
    return dict(sorted(metrics.items(), key=lambda item: not _is_val(item[0])))


def _is_numeric(column: Sequence[Any]) -> bool:
    cells = [cell for cell in column if cell is not None]
    return bool(cells) and all(isinstance(cell, (int, float)) for cell in cells)


def _cell(value: Any) -> str:
    if value is None:  # also what a strict JSON writer makes of NaN
        return ""
    return number(value) if isinstance(value, (int, float)) else str(value)


def _aligned(margin: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Two columns; the margin stands before the first line, and its width before the others."""
    width = max((len(left) for left, _ in pairs), default=0)
    margins = [margin, *[" " * len(margin)] * len(pairs)]
    return "\n".join(f"{margin}{left:<{width}}  {right}" for margin, (left, right) in zip(margins, pairs))


def _position(result: Mapping[str, Any]) -> str:
    counts = {"step": result.get("step"), "epoch": result.get("epoch")}
    parts = [f"{name} {count:,}" for name, count in counts.items() if count is not None]
    if result.get("samples") is not None:
        parts.append(f"{result['samples']:,} samples")
    return f" at {', '.join(parts)}" if parts else ""


def _best(result: Mapping[str, Any]) -> str | None:
    best = result.get("best")
    if best is None or best["value"] is None:
        return None
    return f"{best['metric']} {number(best['value'])} at step {best['step']:,}"


def _counted(result: Mapping[str, Any], name: str) -> str | None:
    return None if result.get(name) is None else number(result[name])


def _spent(result: Mapping[str, Any]) -> str | None:
    if result.get("seconds") is None:
        return None
    rate = result.get("images_per_second")
    return duration(result["seconds"]) + (f", {rate:,.0f} images/s" if rate else "")


def _next_commands(status: str, run: str) -> list[tuple[str, str]]:
    if status == "completed":
        return [(f"launcher plot {run}", "draw the curves"), (f"launcher checkpoints {run}", "see what was saved")]
    if status == "running":
        return [(f"launcher logs {run} --follow", "see what the workers write")]
    resume = (f"launcher resume {run}", "go on from the newest good checkpoint")
    return [resume, (f"launcher logs {run}", "read what the workers wrote")] if status == "failed" else [resume]


def _age(result: Mapping[str, Any], now: float) -> str | None:
    if result.get("updated") is None:
        return None
    seconds = max(0.0, now - result["updated"])
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


# Curves ----------------------------------------------------------------------


def draw_curves(rows: Iterable[Mapping[str, Any]], title: str) -> bytes:
    """Loss, accuracy and learning rate over the steps, as a PNG of 1200 by 900 pixels.

    The same rows give the same bytes. A long run is thinned: every bin of steps keeps its lowest
    and its highest value, so a spike of a single step is still seen.

    Args:
        rows: Metrics rows, as in ``metrics.jsonl``. A panel without values is left out.
        title: The run's name.
    """
    # Figure without pyplot: no backend is chosen, no figure is registered, any thread may draw.
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row["step"])
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    figure.suptitle(_drawable(title), fontsize=13, fontweight="bold", parse_math=False)
    _draw_panels(figure, rows)
    png = BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _draw_panels(figure: "Figure", rows: Sequence[Mapping[str, Any]]) -> None:
    metrics = [name for name in _BEST if any(f"train/{name}" in row or f"val/{name}" in row for row in rows)]
    rates = _rates(rows)
    heights = [3.0] * len(metrics) + [1.5] * bool(rates)
    if not heights:
        figure.text(0.5, 0.5, "no rows yet", ha="center", va="center", fontsize=14, color=_MUTED)
        return
    panels: list[Axes] = list(figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for axes, name in zip(panels, metrics):
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
    finite = [(value, -step) for step, value in val if not math.isnan(value)]
    if not finite:
        return "val"
    best = _BEST[name](value for value, _ in finite)
    step = min(step for step, value in val if value == best)
    return f"val (best {number(best)} at step {number(int(step))})"


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


def _drawable(text: str, longest: int = 80) -> str:
    """Text that the font can draw, in one line: a missing glyph would be a warning for every drawing."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties(weight="bold"))).get_charmap()
    text = "".join(letter if ord(letter) in glyphs else "?" for letter in text)
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-longest // 2 :]}"
