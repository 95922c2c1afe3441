"""The dry run: builds the components of a description, checks them and rehearses a worker, on a worker's device.

It runs in a process of its own, in the place of a worker. That process imports torch and the user's code, so that what
they print, leak or crash stays there.
"""

import os
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cluster.errors import CheckpointError, DescriptionError, StorageError, in_short, nearest
from cluster.process.orders import Task
from jobs.checkpoint.warm_start import load_weights, match_weights, read_weights
from jobs.components.build import Components, build_parts, worker_device
from jobs.components.optimizers import set_trainable
from jobs.data.loader import seed_draws, shape_of, to_device
from jobs.environment import code_digests
from jobs.sampling import draw_key
from jobs.spec import InitSpec, JobSpec, watched_metrics
from jobs.training.failure_causes import cause_of
from launcher.planning.loss_checks import check_fit, check_mean
from launcher.planning.micro_batch import MicroBatch, shortened
from launcher.planning.plan import DryRunResult, GroupPlan, InitPlan
from launcher.planning.rehearsal import rehearse_training, rehearse_validation
from launcher.planning.sample_checks import check_read_again, read_samples, stack

_MAX_SAMPLES_ON_CPU = 32
"""A larger micro-batch takes long on a CPU and finds no more mistakes."""
_MOST_REHEARSED_ON_CPU = 4
"""A rehearsal repeats on a few of the samples what was checked on all of them."""
_MOST_THREADS = 4


def try_out(task: Task) -> DryRunResult:
    """Build every component and train on one micro-batch: a whole one on a GPU, at most 32 samples of it on a CPU.

    Args:
        task: Its content is the job spec; this process was started for it.

    Raises:
        DescriptionError: A component cannot be built, does not fit the others or the GPU, or gets no gradient.
        ClusterError: torch does not see the GPU.
    """
    launcher_modules = set(sys.modules)
    spec: JobSpec = task.content
    device = worker_device(on_gpu=task.on_gpu)
    max_samples = spec.train.micro_batch if task.on_gpu else _MAX_SAMPLES_ON_CPU
    try:
        parts = build_parts(spec, device)
        # The bits of a dry run are nobody's, and it lasts seconds, so it may use more threads than a worker.
        torch.set_num_threads(max(spec.train.threads, min(_MOST_THREADS, os.cpu_count() or 1)))
        return _try_components(spec, parts, max_samples, task.import_paths, launcher_modules)
    except (DescriptionError, RuntimeError) as error:
        original = error.__cause__ or error
        if cause_of(original) != "gpu_out_of_memory":
            raise
        raise DescriptionError(
            f"train.global_batch: a micro-batch of {spec.train.micro_batch} samples, 1 of {spec.train.shards} shards, "
            f"does not fit into the GPU: {in_short(original)}; lower train.global_batch, raise train.shards, or take "
            "GPUs with more memory"
        ) from error


def _try_components(
    spec: JobSpec, parts: Components, max_samples: int, import_paths: tuple[str, ...], launcher_modules: set[str]
) -> DryRunResult:
    """Train on at most ``max_samples`` samples; ``launcher_modules`` are the loaded modules that are not the user's."""
    data_fingerprint = parts.data_fingerprint()  # before any sample is read, as in workers
    init_from = None if spec.init_from is None else _load_init_weights(spec.init_from, parts)
    groups, rates = _group_plans(parts), parts.schedule.preview(parts.steps)  # before a step advances them
    # Unfreeze every group: those that are frozen at first must get gradients, too.
    set_trainable(parts.model, parts.groups, step=parts.steps.total_steps)
    train = _read(parts, spec, "data.train", parts.steps.samples(spec.seed, 0, 0)[:max_samples].tolist())
    loss, measured = _compute_gradients(parts, spec, train)
    parts.optimizer.zero_grad(set_to_none=True)
    measured |= _check_validation(parts, spec, max_samples)
    _check_watched(spec, measured)
    checkpoint_bytes = rehearse_training(spec, parts, _rehearsed(parts, train))
    return DryRunResult(
        steps=parts.steps,
        num_val_samples=0 if parts.val_set is None else len(parts.val_set),
        gpus_here=torch.cuda.device_count(),
        accelerator_here=_accelerator_here(spec),
        groups=groups,
        parameters=sum(parameter.numel() for parameter in parts.model.parameters()),
        checkpoint_bytes=checkpoint_bytes,
        trial_samples=len(train.numbers),
        trial_loss=loss,
        data_fingerprint=data_fingerprint,
        modules=tuple(sorted(code_digests(import_paths).keys() - launcher_modules)),
        rates=rates,
        init_from=init_from,
    )


def _read(parts: Components, spec: JobSpec, key: str, numbers: list[int]) -> MicroBatch:
    dataset = parts.train_set if key == "data.train" else parts.val_set
    samples = read_samples(dataset, numbers, key, spec.seed)
    check_read_again(dataset, samples[:_MAX_SAMPLES_ON_CPU], numbers, key, spec)
    inputs, target = to_device(stack(samples, key), parts.device)
    return MicroBatch(key, dataset, numbers, inputs, target)


def _check_validation(parts: Components, spec: JobSpec, max_samples: int) -> set[str]:
    """Check and validate the first and the last batch of ``data.val``; return the names of what is measured."""
    if parts.val_set is None:
        return set()
    length, size = len(parts.val_set), parts.steps.micro_batch
    first = _read(parts, spec, "data.val", list(range(min(size, length, max_samples))))
    measured = _forward(parts, spec, first)[2]
    batches = _rehearsed(parts, first)[:1]
    begin_of_last = (length - 1) // size * size
    if begin_of_last:  # it may be shorter than the others
        last = _read(parts, spec, "data.val", list(range(begin_of_last, length))[:_MOST_REHEARSED_ON_CPU])
        try:
            _forward(parts, spec, last)
        except DescriptionError as error:
            samples = f"{len(last.numbers)} sample{'s' * (len(last.numbers) > 1)}"
            raise DescriptionError(f"the last batch of data.val, of {samples}: {error}") from error
        batches.append((last.inputs, last.target))
    rehearse_validation(spec, parts, batches)
    return measured


def _rehearsed(parts: Components, batch: MicroBatch) -> list[tuple[Any, Any]]:
    """Return what to rehearse with: the batch on a GPU, whose memory it must fit into; else a few samples first."""
    whole = (batch.inputs, batch.target)
    if parts.device.type == "cuda" or len(batch.numbers) <= _MOST_REHEARSED_ON_CPU:
        return [whole]
    return [shortened(whole, _MOST_REHEARSED_ON_CPU), whole]


def _accelerator_here(spec: JobSpec) -> str | None:
    if spec.workers.accelerator is None or not torch.cuda.is_available():
        return None
    from cluster.ray.private_core import accelerator_here  # imports Ray, which names accelerators

    return accelerator_here()


def _load_init_weights(spec: InitSpec, parts: Components) -> InitPlan:
    """Load the weights of ``init_from`` into the model."""
    try:
        weights = read_weights(spec)
    except (StorageError, CheckpointError) as error:
        raise DescriptionError(f"init_from.url: {error}") from error
    report = match_weights(parts.model, spec, weights)
    load_weights(parts.model, parts.ema, weights, report)
    return InitPlan(
        url=report.source.url,
        sha256=report.source.sha256,
        loaded=report.loaded,
        kept=report.kept,
        unused=report.unused,
        passed_over=report.passed_over,
    )


def _compute_gradients(parts: Components, spec: JobSpec, batch: MicroBatch) -> tuple[float, set[str]]:
    """Compute gradients on some samples; return their loss and the names of the metrics of a step."""
    numerator, denominator, measured = _forward(parts, spec, batch)
    if not numerator.isfinite():
        raise DescriptionError(
            f"loss: {spec.loss.factory.path} of the first micro-batch is {numerator.item()}; "
            "look at the scale of data.train"
        )
    try:
        # Differentiate the mean, as training does: gradients of a sum over many samples overflow 16 bits.
        (numerator / denominator if denominator else numerator).backward()
    except RuntimeError as error:
        raise DescriptionError(f"loss: backward raised RuntimeError: {in_short(error)}") from error
    trained = [(name, parameter) for name, parameter in parts.model.named_parameters() if parameter.requires_grad]
    without = [name for name, parameter in trained if parameter.grad is None]
    if without:
        raise DescriptionError(
            f"model: {without[0]} gets no gradient from the loss"
            + (f", nor do {len(without) - 1} more" if len(without) > 1 else "")
            + "; use it in forward, or set its requires_grad to False in the model"
        )
    sparse = [name for name, parameter in trained if parameter.grad is not None and parameter.grad.is_sparse]
    if sparse:
        raise DescriptionError(
            f"model: {sparse[0]} gets a sparse gradient, which workers cannot sum in one order; write sparse=False in "
            "its layer"
        )
    return numerator.item() / denominator if denominator else 0.0, measured  # 0: no target of this micro-batch counts


def _forward(parts: Components, spec: JobSpec, batch: MicroBatch) -> tuple[Tensor, float, set[str]]:
    """Return numerator and denominator of the loss over some samples, and the names of their metrics.

    Shapes: numerator [], with a graph if the samples are of ``data.train``.
    """
    train, inputs, target = batch.key == "data.train", batch.inputs, batch.target
    parts.model.train(train)
    seed_draws(draw_key("step", spec.seed, 0, 0), parts.device)
    with parts.autocast(), torch.set_grad_enabled(train):
        try:
            output = parts.model(parts.in_memory_order(inputs))
        except Exception as error:  # the model is the user's own code
            shape = f" of shape {list(inputs.shape)}" if isinstance(inputs, Tensor) else ""
            raise DescriptionError(
                f"model: forward on inputs{shape} raised {type(error).__name__}: {in_short(error)}; "
                f"make model and {batch.key} fit"
            ) from error
        check_fit(parts.loss, replace(batch, output=output), parts.model)
        try:
            as_written = parts.loss.as_written(output, target)
            if as_written is not None:
                as_written = as_written.detach()  # drop its graph: training does not need memory for it
            numerator, own = parts.loss.numerator(output, target)
        except Exception as error:  # the loss may be the user's own; torch raises several kinds
            raise DescriptionError(
                f"loss: {spec.loss.factory.path} of output {shape_of(output)} and target {shape_of(target)} raised "
                f"{type(error).__name__}: {in_short(error)}; make model, loss and data fit"
            ) from error
    kind = "train" if train else "val"
    measured = {f"{kind}/loss"}
    if parts.loss.tally(output, target, numerator)[2] > 0:
        measured.add(f"{kind}/accuracy")
    if parts.metrics is not None and not train:
        measured |= parts.metrics.try_out(*parts.loss.measured(output, target))
    denominator = parts.loss.denominator(parts.loss.weight(target, numerator, own).item())
    check_mean(parts.loss, as_written, numerator, denominator)
    return numerator, denominator, measured


def _check_watched(spec: JobSpec, measured: set[str]) -> None:
    """Raise if the description watches a metric that is never measured."""
    for key, metric in watched_metrics(spec).items():
        kind, _, name = metric.partition("/")
        if name == "accuracy" and metric not in measured:
            raise DescriptionError(f"{key} {metric} needs targets that are class numbers; write {kind}/loss")
        if metric not in measured:
            raise DescriptionError(
                f"{key} must be one number that is measured, got {metric!r}{nearest(metric, measured)}; "
                f"write for example {min(measured)}"
            )


def _group_plans(parts: Components) -> list[GroupPlan]:
    sizes = {name: parameter.numel() for name, parameter in parts.model.named_parameters()}
    return [
        GroupPlan(
            pattern=group.pattern,
            tensors=len(group.names),
            parameters=sum(sizes[name] for name in group.names),
            lr=float(of_torch.get("initial_lr", of_torch["lr"])),
            weight_decay=float(of_torch.get("weight_decay", 0.0)),
            from_epoch=group.from_step // parts.steps.steps_per_epoch,
            from_step=group.from_step,
        )
        for group, of_torch in zip(parts.groups, parts.optimizer.param_groups)
    ]
