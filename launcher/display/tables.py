"""What a person reads of a run: a summary, tables.

Pure functions from documents to text. Nothing here reads a store, asks a cluster or prints.
"""

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cluster.errors import listed
from jobs.spec import JobSpec, LossSpec

if TYPE_CHECKING:
    from launcher.planning.plan import GroupPlan, InitPlan, Plan


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


def is_headline(name: str) -> bool:
    """Whether a metric is for people who glance: one number, not one of a thousand such as ``val/recall/cat``."""
    return name.startswith(("train/", "val/")) and name.count("/") == 1


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
        *((name, _cell(value)) for name, value in _metrics(result).items()),
        ("best", _best(result)),
        ("workers", _counted(result, "workers")),
        ("waits for", _waits_for(result)),
        ("attempts", _counted(result, "attempts")),
        ("time", _spent(result)),
        ("goodput", _goodput(result)),
        ("last failure", _failure(result)),
        ("job", _job(result)),
        ("submitted", _submitted(result)),
        ("state", result.get("state_sha256") and f"sha256 {result['state_sha256']}"),
    ]
    blocks = [
        f"{run} {f'is {status}' if status in ('running', 'submitted') else status}{_position(result)}",
        _aligned("  ", [(name, text) for name, text in facts if text]),
        result.get("error"),
        _aligned("next: ", _next_commands(result)),
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
    job = ["job"] if any(result.get("job_status") for result in results) else []
    return table(
        ["name", "status", "step", "epoch", *measured, "best", "updated", *job],
        [
            (
                result["run"].rstrip("/").rsplit("/", 1)[-1],
                result["status"],
                result.get("step"),
                result.get("epoch"),
                *(_metrics(result).get(name) for name in measured),
                _best(result),
                _age(result, now),
                *([_job(result)] if job else []),
            )
            for result in results
        ],
    )


def plan_text(spec: JobSpec, plan: "Plan") -> str:
    """Everything a plan has decided, for a person."""
    workers = ", ".join(f"{count} shard{'s' * (count > 1)}" for count in plan.shards_by_worker)
    bounds = "" if spec.workers.least == spec.workers.most else f" of {spec.workers.least} to {spec.workers.most}"
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
        ("workers", f"{plan.num_workers}{bounds} on {'GPU with NCCL' if plan.gpus else 'CPU with gloo'}: {workers}"),
        *([("no GPU", plan.why_cpu)] if plan.why_cpu else []),
        *([("wait", plan.why_wait)] if plan.why_wait else []),
        *([("placement", "spread over as many nodes as there is room on")] if spec.workers.placement != "pack" else []),
        ("gradients", f"summed in {sum_order}"),
        ("loss", _loss(spec.loss)),
        ("optimizer", spec.optimizer.factory.path),
        ("schedule", _schedule(spec, plan)),
        ("checkpoint", f"about {plan.checkpoint_bytes / 2**20:,.1f} MiB, the newest {spec.checkpoint.keep} kept"),
        ("trial", f"{plan.trial_samples} samples through model, loss and backward: loss {number(plan.trial_loss)}"),
    ]
    groups = table(
        ["group", "tensors", "parameters", "lr", "weight decay", "trains from"],
        [
            (group.pattern, group.tensors, group.parameters, group.lr, group.weight_decay, _beginning(group, plan))
            for group in plan.groups
        ],
    )
    return f"{_aligned('', facts)}\n\n{groups}"


def _loss(loss: LossSpec) -> str:
    parts = [loss.factory.path]
    if loss.output != "identity":
        parts.append(f"of the {loss.output} of the output")
    if loss.target is not None:
        parts.append(f"with targets as {loss.target}")
    return " ".join(parts)


def _schedule(spec: JobSpec, plan: "Plan") -> str:
    if spec.scheduler is None:
        return "none"
    course = ", ".join(f"{number(rate)} at step {step:,}" for step, rate in plan.rates)
    return f"{spec.scheduler.factory.path}, every {spec.scheduler.interval}" + (f": lr {course}" if course else "")


def _beginning(group: "GroupPlan", plan: "Plan") -> str:
    """When a group begins to train."""
    if group.from_step >= plan.total_steps:
        return "never"
    return f"step {group.from_step:,}" if group.from_step % plan.steps_per_epoch else f"epoch {group.from_epoch}"


def _init_facts(init: "InitPlan | None") -> list[tuple[str, str]]:
    """What a run begins with, for its plan; ``--json`` has every name."""
    if init is None:
        return []
    others = [("not loaded", init.kept), ("unused there", init.unused)]
    return [
        ("init_from", init.url),
        *(("passed over", defect) for defect in init.passed_over),
        ("loaded", f"{len(init.loaded):,} of {len(init.loaded) + len(init.kept):,} tensors: {listed(init.loaded)}"),
        *((name, listed(tensors)) for name, tensors in others if tensors),
    ]


def checkpoints_table(documents: Sequence[Mapping[str, Any]]) -> str:
    """The checkpoints of a run, one line each, from ``checkpoint_documents``; then what is wrong with any."""
    if not documents:
        return "no checkpoints"
    measured = dict.fromkeys(name for document in documents for name in _metrics(document) if _is_val(name))
    lines = table(
        ["step", "whole", "MiB", *measured, "state sha256", "created"],
        [
            (
                document["step"],
                {True: "yes", False: "no", None: "not read"}[document["good"]],
                document["bytes"] / 2**20 if "bytes" in document else None,
                *(document.get("metrics", {}).get(name) for name in measured),
                document.get("state_sha256", "")[:16],
                document.get("created"),
            )
            for document in documents
        ],
    )
    return "\n".join([lines, *(document["defect"] for document in documents if "defect" in document)])


def repair_text(documents: Sequence[Mapping[str, Any]], orphans: Sequence[str]) -> str:
    """The checkpoints of a run, and what was removed from beside them."""
    removed = [f"removed {name}, which no checkpoint needs" for name in orphans] or ["no orphans"]
    return "\n".join([checkpoints_table(documents), *removed])


def export_text(document: Mapping[str, Any]) -> str:
    """What ``launcher.runs.export`` wrote."""
    kind = "weights" if document["weights"] == "model" else "averaged weights"
    checked = "read back, bit for bit the checkpoint's"
    if "largest_difference" in document:
        checked = f"onnxruntime's outputs differ from torch's by {document['largest_difference']:.1e} of the largest"
    return (
        f"{document['to']}: the {kind} of step {document['step']:,}, {number(document['tensors'])} tensors, "
        f"{document['bytes'] / 2**20:,.1f} MiB; {checked}"
    )


def _is_val(name: str) -> bool:
    return name.startswith("val/")


def _metrics(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The headlines; validation first, for it is what a run is judged by."""
    metrics = {name: value for name, value in (result.get("metrics") or {}).items() if is_headline(name)}
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


def _goodput(result: Mapping[str, Any]) -> str | None:
    """The share of the time that went into training, and what all of it went into, the most first."""
    if result.get("goodput") is None:
        return None
    longest_first = sorted(result["time"].items(), key=lambda part: part[1], reverse=True)
    parts = [
        f"{name} {duration(seconds) if seconds >= 60 else f'{seconds:.1f} s'}"
        for name, seconds in longest_first
        if seconds >= 0.05
    ]
    return f"{result['goodput']:.0%}: {', '.join(parts)}"


def _failure(result: Mapping[str, Any]) -> str | None:
    """The last failure of a worker, also of a run that goes on again."""
    failure = result.get("failure")
    if failure is None:
        return None
    who = [] if failure["rank"] is None else [f"worker {failure['rank']}"]
    where = [f"on node {failure['address']}"] if failure["address"] is not None else []  # one that never came has none
    what = f"{' '.join(who + where)}: {failure['message']}" if who else failure["message"]
    return f"{failure['cause']} at step {failure['step']:,}: {what}"


def _waits_for(result: Mapping[str, Any]) -> str | None:
    """What a run waits for that goes on, or whose job has yet to begin it."""
    reason: str | None = result.get("waits_for") if result["status"] in ("running", "submitted") else None
    return f"workers: {reason}" if reason and result["status"] == "running" else reason


def _job(result: Mapping[str, Any]) -> str | None:
    """Of a run that was submitted, what the cluster calls it."""
    if result.get("job") is None:
        return None
    name = f"{result['job']} on {result['cluster']}" if result.get("cluster") else result["job"]
    state = [result[part] for part in ("job_status", "job_message") if result.get(part)]
    return ": ".join([name, *state])


def _submitted(result: Mapping[str, Any]) -> str | None:
    if result.get("user") is None:
        return None
    by = f"by {result['user']} from {result['host']}"
    if result.get("submitted_at") is None:
        return by
    return f"{by}, {datetime.fromtimestamp(result['submitted_at'], UTC):%Y-%m-%d %H:%M:%S} UTC"


def _next_commands(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    status, run = result["status"], shlex.quote(result["run"])
    on_cluster = f"--cluster {shlex.quote(result['cluster'])}" if result.get("cluster") else "--cluster CLUSTER"
    if status == "completed":
        return [(f"launcher plot {run}", "draw the curves"), (f"launcher checkpoints {run}", "see what was saved")]
    if status == "running":
        return [(f"launcher logs {run} --follow", "see what the workers write")]
    if status == "submitted":
        return [
            (f"launcher status {run} {on_cluster}", "see what the job waits for"),
            (f"launcher stop {run} {on_cluster}", "stop the job"),
        ]
    resume = (f"launcher resume {run}", "go on from the newest good checkpoint")
    if status != "failed":
        return [resume]
    if result.get("job") is not None:
        return [resume, (f"launcher logs {run} {on_cluster}", "read what the workers and the driver wrote")]
    return [resume, (f"launcher logs {run}", "read what the workers wrote")]


def _age(result: Mapping[str, Any], now: float) -> str | None:
    if result.get("updated") is None:
        return None
    seconds = max(0.0, now - result["updated"])
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
