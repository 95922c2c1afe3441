"""The texts of runs, plans and checkpoints for people: summaries and tables.

Pure functions from documents to text. Nothing here reads a store, asks a cluster or prints.
"""

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from textwrap import indent
from typing import TYPE_CHECKING, Any

from cluster.errors import listed
from jobs.spec import JobSpec, LossSpec
from launcher.config.cluster_addresses import cluster_option
from launcher.display.data_facts import data_facts

if TYPE_CHECKING:
    from launcher.planning.plan import GroupPlan, InitPlan, Plan


def number(value: float, digits: int = 4) -> str:
    """Format a number: ``1,240`` for whole numbers, else ``digits`` significant digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:#.{digits}g}".rstrip(".")


def duration(seconds: float) -> str:
    """Format seconds as ``0:00:12``, ``1:02:03`` or ``2 days, 1:02:03``."""
    return str(timedelta(seconds=max(0, round(seconds))))


def is_headline(name: str) -> bool:
    """Return whether a metric belongs in a summary: ``val/recall`` does, ``val/recall/cat`` of one class does not."""
    return name.startswith(("train/", "val/")) and name.count("/") == 1


def table(lines: Iterable[Sequence[Any]]) -> str:
    """Format columns of plain text, two spaces apart: columns with numbers are right-aligned, text left-aligned.

    No line is cut or wrapped, so that piped output is complete and a command can be copied from a narrow terminal.

    Args:
        lines: Rows of cells. Numbers are formatted by :func:`number`; ``None``, which stands for NaN in JSON, is empty.
    """
    columns = []
    for cells in zip(*lines):
        side = ">" if any(isinstance(cell, (int, float)) for cell in cells) else "<"
        texts = [number(cell) if isinstance(cell, (int, float)) else str(cell or "") for cell in cells]
        columns.append([f"{text:{side}{max(map(len, texts))}}" for text in texts])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


def summary(result: Mapping[str, Any]) -> str:
    """Return the summary of a run: its status, the facts known about it, and the next command to type.

    Args:
        result: The ``--json`` document; only ``run`` and ``status`` are required.
    """
    run, status = result["run"], result["status"]
    blocks = [
        f"{run} {f'is {status}' if status in ('running', 'submitted', 'requeued') else status}{_position(result)}",
        _requeued(result) if status == "requeued" else None,
        table(("", *fact) for fact in _facts(result)),
        result.get("error"),
        f"next: {indent(table(_next_commands(result)), ' ' * len('next: ')).lstrip()}",
    ]
    return "\n\n".join(block.strip("\n") for block in blocks if block)


def _facts(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every known fact in a summary."""
    known = {name: value for name, value in result.items() if value is not None}
    if "saved_step" in known:
        yield "checkpoint", f"step {known['saved_step']:,}"
    elif "saved_step" in result and result["status"] in ("stopped", "requeued", "failed"):
        yield "checkpoint", "none yet, so resume begins at step 0"
    yield from ((name, number(value)) for name, value in _metrics(result).items() if value is not None)
    if best := _best(result):
        yield "best", best
    if "workers" in known:
        yield "workers", number(known["workers"])
    if known.get("waits_for") and known["status"] in ("running", "submitted"):
        yield "waits for", f"workers: {known['waits_for']}" if known["status"] == "running" else known["waits_for"]
    if "attempts" in known:
        yield "attempts", number(known["attempts"])
    if "seconds" in known:
        rate = known.get("images_per_second")
        yield "time", duration(known["seconds"]) + (f", {rate:,.0f} images/s" if rate else "")
    if "goodput" in known:
        yield "goodput", f"{known['goodput']:.0%}: {_time_spent(known['time'])}"
    if (skipped := known.get("skipped_samples")) and skipped["count"]:
        bad = f"{number(skipped['count'])} bad sample{'s' * (skipped['count'] != 1)} skipped"
        yield "data", f"{bad}, first: {skipped['first'][0]['reason']}"
    if "failure" in known:
        yield "last failure", _failure(known["failure"])
    if job := _job(result):
        yield "job", job
    if "user" in known:
        at = f", {datetime.fromtimestamp(known['submitted_at'], UTC):%F %T} UTC" if "submitted_at" in known else ""
        yield "submitted", f"by {known['user']} from {known['host']}{at}"
    if known.get("state_sha256"):
        yield "state", f"sha256 {known['state_sha256']}"


def _requeued(result: Mapping[str, Any]) -> str:
    """Return where a run stands whose scheduler starts it again."""
    saved = result.get("saved_step")
    where = "nothing saved yet" if saved is None else f"saved at step {saved:,}"
    return f"{where} {result.get('requeued') or ''}".rstrip() + "; its scheduler starts it again"


def runs_table(results: Iterable[Mapping[str, Any]], now: float | None = None) -> str:
    """Return the table of the runs of a store, one line each.

    Args:
        results: Documents as for :func:`summary`; ``updated``, in Unix seconds, gives the age.
        now: The present in Unix seconds; by default the system clock's.
    """
    results = list(results)
    if not results:
        return "no runs"
    now = time.time() if now is None else now
    measured = dict.fromkeys(name for result in results for name in _metrics(result) if _is_val(name))
    job = ["job"] if any(result.get("job_status") for result in results) else []
    rows = (
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
    )
    return table([("name", "status", "step", "epoch", *measured, "best", "updated", *job), *rows])


def plan_text(spec: JobSpec, plan: "Plan") -> str:
    """Return everything that a plan decides, as text."""
    at_most = "at most " if spec.train.shards % plan.num_workers else ""
    shards = f"{at_most}{plan.most_shards} shard{'s' * (plan.most_shards > 1)} each"
    bounds = "" if spec.workers.least == spec.workers.most else f" of {spec.workers.least} to {spec.workers.most}"
    limit = f"; train.max_steps ends it at {plan.end_step:,}" if plan.end_step < plan.total_steps else ""
    unused = f"; {plan.unused_per_epoch:,} others each epoch wait for the next" if plan.unused_per_epoch else ""
    validation = f"{plan.num_val_samples:,} samples" if plan.num_val_samples else "none"
    sum_order = "one order for any number of workers" if spec.train.exact else "the backend's own order"
    if_any = [("nodes", plan.job_nodes), ("no GPU", plan.why_cpu), ("wait", plan.why_wait), ("hint", plan.hint)]
    facts = [
        ("run", f"{plan.run} (the store was written, read and cleaned)"),
        ("model", f"{plan.parameters:,} parameters"),
        *(_init_facts(plan.init_from) if plan.init_from else ()),
        ("data", f"{plan.num_samples:,} samples{unused}"),
        ("validation", validation),
        *data_facts(plan, spec.data.shuffle),
        ("batch", f"{spec.train.global_batch:,} = {spec.train.shards} shards of {plan.micro_batch:,}"),
        ("steps", f"{plan.steps_per_epoch:,} an epoch, {plan.total_steps:,} in all{limit}"),
        ("workers", f"{plan.num_workers}{bounds} on {'GPU with NCCL' if plan.gpus else 'CPU with gloo'}: {shards}"),
        *(fact for fact in if_any if fact[1]),
        *([("placement", "spread over as many nodes as there is room on")] if spec.workers.placement != "pack" else []),
        ("gradients", f"summed in {sum_order}"),
        ("loss", _loss(spec.loss)),
        ("optimizer", spec.optimizer.factory.path),
        ("schedule", _schedule(spec, plan)),
        ("checkpoint", f"about {_mib(plan.checkpoint_bytes)}, the newest {spec.checkpoint.keep} kept"),
        ("memory", _memory(plan)),
        ("trial", f"{plan.trial_samples} samples through model, loss and backward: loss {number(plan.trial_loss)}"),
    ]
    groups = [
        (group.pattern, group.tensors, group.parameters, group.lr, group.weight_decay, _beginning(group, plan))
        for group in plan.groups
    ]
    headers = ("group", "tensors", "parameters", "lr", "weight decay", "trains from")
    return f"{table(facts)}\n\n{table([headers, *groups])}"


def _memory(plan: "Plan") -> str:
    """Return what a worker needs of its GPU and of its host, in MiB."""
    memory, number_of = plan.memory, plan.memory.num_workers
    named = {
        "weights": memory.weights,
        "buffers": memory.buffers,
        "gradients": memory.gradients,
        "aligned gradients": memory.aligned,
        "optimizer": memory.optimizer,
        "average": memory.average,
        "set aside": memory.set_aside,
        "exchange": memory.exchange,
        "activations": memory.activations,
    }
    total, host = memory.total, f", and {_mib(memory.copy)} of its host for a copy of its share of a checkpoint"
    if not plan.gpus:
        total, host, named["copy for a checkpoint"] = total + memory.copy, "", memory.copy
    taken = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in named.items() if size)
    workers = "the only worker" if number_of == 1 else f"each of {number_of} workers"
    rest = "; activations come on top" if memory.activations is None else ""
    return f"{_mib(total)}{' of its GPU' if plan.gpus else ''} for {workers}: {taken}{host}{rest}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _loss(loss: LossSpec) -> str:
    output = "" if loss.output == "identity" else f" of the {loss.output} of the output"
    target = "" if loss.target is None else f" with targets as {loss.target}"
    return f"{loss.factory.path}{output}{target}"


def _schedule(spec: JobSpec, plan: "Plan") -> str:
    if spec.scheduler is None:
        return "none"
    course = ", ".join(f"{number(rate)} at step {step:,}" for step, rate in plan.rates)
    return f"{spec.scheduler.factory.path}, every {spec.scheduler.interval}" + (f": lr {course}" if course else "")


def _beginning(group: "GroupPlan", plan: "Plan") -> str:
    """Return when a parameter group begins to train."""
    if group.from_step >= plan.total_steps:
        return "never"
    return f"step {group.from_step:,}" if group.from_step % plan.steps_per_epoch else f"epoch {group.from_epoch}"


def _init_facts(init: "InitPlan") -> Iterator[tuple[str, str]]:
    """Yield the facts about initial weights; only ``--json`` lists every tensor."""
    yield "init_from", init.url
    yield from (("passed over", defect) for defect in init.passed_over)
    yield "loaded", f"{len(init.loaded):,} of {len(init.loaded) + len(init.kept):,} tensors: {listed(init.loaded)}"
    for name, tensors in (("not loaded", init.kept), ("unused there", init.unused)):
        if tensors:
            yield name, listed(tensors)


def checkpoints_table(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of ``checkpoint_documents``, one line each, followed by the defects of bad checkpoints."""
    if not documents:
        return "no checkpoints"
    measured = dict.fromkeys(name for document in documents for name in _metrics(document) if _is_val(name))
    rows = (
        (
            document["step"],
            {True: "yes", False: "no", None: "not read"}[document["good"]],
            document["bytes"] / 2**20 if "bytes" in document else None,
            *(document.get("metrics", {}).get(name) for name in measured),
            document.get("state_sha256", "")[:16],
            document.get("created"),
        )
        for document in documents
    )
    lines = table([("step", "whole", "MiB", *measured, "state sha256", "created"), *rows])
    return "\n".join([lines, *(document["defect"] for document in documents if "defect" in document)])


def repair_text(documents: Sequence[Mapping[str, Any]], orphans: Sequence[str]) -> str:
    """Return the table of checkpoints, and the orphans that were removed."""
    removed = [f"removed {name}, which no checkpoint needs" for name in orphans] or ["no orphans"]
    return "\n".join([checkpoints_table(documents), *removed])


def export_text(document: Mapping[str, Any]) -> str:
    """Return what ``launcher.runs.export`` wrote and how it was checked."""
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
    """Return the headline metrics, validation first, since a run is judged by it."""
    metrics = {name: value for name, value in (result.get("metrics") or {}).items() if is_headline(name)}
    return dict(sorted(metrics.items(), key=lambda item: not _is_val(item[0])))


def _position(result: Mapping[str, Any]) -> str:
    texts = {"step": "step {:,}", "epoch": "epoch {:,}", "samples": "{:,} samples"}
    parts = [text.format(result[name]) for name, text in texts.items() if result.get(name) is not None]
    return f" at {', '.join(parts)}" if parts else ""


def _best(result: Mapping[str, Any]) -> str | None:
    best = result.get("best")
    if best is None or best["value"] is None:
        return None
    return f"{best['metric']} {number(best['value'])} at step {best['step']:,}"


def _time_spent(time: Mapping[str, float]) -> str:
    """Return what the time of a run was spent on, longest first."""
    longest_first = sorted(time.items(), key=lambda part: part[1], reverse=True)
    return ", ".join(
        f"{name} {duration(seconds) if seconds >= 60 else f'{seconds:.1f} s'}"
        for name, seconds in longest_first
        if seconds >= 0.05
    )


def _failure(failure: Mapping[str, Any]) -> str:
    """Return the last failure of a worker; the run may have recovered since."""
    where = "" if failure["address"] is None else f" on node {failure['address']}"  # None: the worker never started
    who = "" if failure["rank"] is None else f"worker {failure['rank']}{where}: "
    return f"{failure['cause']} at step {failure['step']:,}: {who}{failure['message']}"


def _job(result: Mapping[str, Any]) -> str | None:
    """Return the job of a submitted run, with its cluster and state as far as they are known."""
    if result.get("job") is None:
        return None
    name = f"{result['job']} on {result['cluster']}" if result.get("cluster") else result["job"]
    state = [result[part] for part in ("job_status", "job_message") if result.get(part)]
    return ": ".join([name, *state])


def _next_commands(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    status, run = result["status"], shlex.quote(result["run"])
    on_cluster = cluster_option(result.get("cluster"))
    resume = (f"launcher resume {run}", "go on from the newest good checkpoint")
    logs = (f"launcher logs {run}", "read what the workers wrote")
    if result.get("job") is not None:
        logs = (f"launcher logs {run} {on_cluster}", "read what the workers and the driver wrote")
    waiting = [
        (f"launcher status {run} {on_cluster}", "see what the job waits for"),
        (f"launcher stop {run} {on_cluster}", "stop the job"),
    ]
    commands = {
        "completed": [
            (f"launcher plot {run}", "draw the curves"),
            (f"launcher checkpoints {run}", "see what was saved"),
        ],
        "running": [(f"launcher logs {run} --follow", "see what the workers write")],
        "submitted": waiting,
        "requeued": waiting,
        "failed": [resume, logs],
    }
    return commands.get(status, [resume])


def _age(result: Mapping[str, Any], now: float) -> str | None:
    return None if result.get("updated") is None else f"{duration(now - result['updated'])} ago"
