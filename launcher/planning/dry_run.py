"""The dry run: builds the components of a description and trains on one real micro-batch, on a worker's device.

It runs in a process of its own, in the place of a worker. That process imports torch and the user's code, so that what
they print, leak or crash stays there.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from cluster.errors import CheckpointError, DescriptionError, StorageError, nearest, one_line
from cluster.process.orders import Task
from jobs.checkpoint.layout import lay_out
from jobs.checkpoint.warm_start import load_weights, match_weights, read_weights
from jobs.components.build import Components, build_parts, worker_device
from jobs.components.optimizers import set_trainable
from jobs.data.loader import KeyedDataset, seed_draws, shape_of, to_device
from jobs.environment import code_digests
from jobs.sampling import draw_key
from jobs.spec import InitSpec, JobSpec, watched_metrics
from jobs.training.failure_causes import cause_of
from launcher.planning.loss_checks import MicroBatch, check_fit, check_mean
from launcher.planning.plan import DryRunResult, GroupPlan, InitPlan

_MAX_ERROR_CHARACTERS = 300
"""torch's texts about shapes can fill a screen."""
_MAX_SAMPLES_ON_CPU = 32
"""A larger micro-batch takes long on a CPU and finds no more mistakes."""


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
        return _try_components(spec, build_parts(spec, device), max_samples, task.import_paths, launcher_modules)
    except (DescriptionError, RuntimeError) as error:
        original = error.__cause__ or error
        if cause_of(original) != "gpu_out_of_memory":
            raise
        raise DescriptionError(
            f"train.global_batch: a micro-batch of {spec.train.micro_batch} samples, 1 of {spec.train.shards} shards, "
            f"does not fit into the GPU: {_in_short(original)}; lower train.global_batch, raise train.shards, or take "
            "GPUs with more memory"
        ) from error


def _try_components(
    spec: JobSpec, parts: Components, max_samples: int, import_paths: tuple[str, ...], launcher_modules: set[str]
) -> DryRunResult:
    """Train on at most ``max_samples`` samples; ``launcher_modules`` are the loaded modules that are not the user's."""
    data_fingerprint = parts.data_fingerprint()  # before any sample is read, as in workers
    init_from = None if spec.init_from is None else _load_init_weights(spec.init_from, parts)
    # Unfreeze every group: those that are frozen at first must get gradients, too.
    set_trainable(parts.model, parts.groups, step=parts.steps.total_steps)
    numbers = parts.steps.samples(spec.seed, 0, 0)[:max_samples].tolist()
    loss, measured = _train_on(parts, spec, numbers)
    if parts.val_set is not None:
        measured |= _forward(parts, spec, "data.val", list(range(min(max_samples, len(parts.val_set)))))[2]
    _check_watched(spec, measured)
    try:
        checkpoint_bytes = lay_out(parts.state()).size
    except CheckpointError as error:
        raise DescriptionError(f"{error}") from error
    return DryRunResult(
        steps=parts.steps,
        num_val_samples=0 if parts.val_set is None else len(parts.val_set),
        gpus_here=torch.cuda.device_count(),
        accelerator_here=_accelerator_here(spec),
        groups=_group_plans(parts),
        parameters=sum(parameter.numel() for parameter in parts.model.parameters()),
        checkpoint_bytes=checkpoint_bytes,
        trial_samples=len(numbers),
        trial_loss=loss,
        data_fingerprint=data_fingerprint,
        modules=tuple(sorted(code_digests(import_paths).keys() - launcher_modules)),
        rates=parts.schedule.preview(parts.steps),
        init_from=init_from,
    )


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


def _read_batch(dataset: Any, numbers: list[int], key: str, seed: int) -> Any:
    keyed = KeyedDataset(dataset, seed)
    samples = []
    for number in numbers:
        try:
            samples.append(keyed[0, number])
        except Exception as error:  # the dataset is the user's own code
            raise DescriptionError(
                f"{key}: sample {number} raised {type(error).__name__}: {_in_short(error)}"
            ) from error
        if not (isinstance(samples[-1], (tuple, list)) and len(samples[-1]) == 2):
            raise DescriptionError(
                f"{key}: sample {number} must be a pair (input, target), got {type(samples[-1]).__name__}"
            )
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        raise DescriptionError(
            f"{key}: samples cannot be stacked to a batch: {_in_short(error)}; give all the same shape"
        ) from error


def _train_on(parts: Components, spec: JobSpec, numbers: list[int]) -> tuple[float, set[str]]:
    """Take one optimizer step on some samples; return their loss and the names of the metrics of a step."""
    numerator, denominator, measured = _forward(parts, spec, "data.train", numbers)
    if not numerator.isfinite():
        raise DescriptionError(
            f"loss: {spec.loss.factory.path} of the first micro-batch is {numerator.item()}; "
            "look at the scale of data.train"
        )
    try:
        # Differentiate the mean, as training does: gradients of a sum over many samples overflow 16 bits.
        (numerator / denominator if denominator else numerator).backward()
    except RuntimeError as error:
        raise DescriptionError(f"loss: backward raised RuntimeError: {_in_short(error)}") from error
    without = [name for name, p in parts.model.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        raise DescriptionError(
            f"model: {without[0]} gets no gradient from the loss"
            + (f", nor do {len(without) - 1} more" if len(without) > 1 else "")
            + "; use it in forward, or set its requires_grad to False in the model"
        )
    _step(parts, "step")
    if any(group.from_step for group in parts.groups):
        set_trainable(parts.model, parts.groups, step=0)
        for parameter in parts.model.parameters():
            parameter.grad = parameter.grad if parameter.requires_grad else None
        _step(parts, "step with a frozen group, whose gradients are None,")
    return numerator.item() / denominator if denominator else 0.0, measured  # 0: no target of this micro-batch counts


def _step(parts: Components, what: str) -> None:
    try:
        parts.optimizer.step()
    except Exception as error:  # the optimizer may be the user's own
        raise DescriptionError(f"optimizer: {what} raised {type(error).__name__}: {_in_short(error)}") from error


def _forward(parts: Components, spec: JobSpec, key: str, numbers: list[int]) -> tuple[Tensor, float, set[str]]:
    """Return numerator and denominator of the loss over some samples, and the names of their metrics.

    Shapes: numerator [], with a graph if ``key`` is ``data.train``.
    """
    train = key == "data.train"
    dataset = parts.train_set if train else parts.val_set
    inputs, target = to_device(_read_batch(dataset, numbers, key, spec.seed), parts.device)
    parts.model.train(train)
    seed_draws(draw_key("step", spec.seed, 0, 0), parts.device)
    with parts.autocast(), torch.set_grad_enabled(train):
        try:
            output = parts.model(parts.in_memory_order(inputs))
        except Exception as error:  # the model is the user's own code
            shape = f" of shape {list(inputs.shape)}" if isinstance(inputs, Tensor) else ""
            raise DescriptionError(
                f"model: forward on inputs{shape} raised {type(error).__name__}: {_in_short(error)}; "
                f"make model and {key} fit"
            ) from error
        check_fit(parts.loss, MicroBatch(key, dataset, numbers, inputs, target, output), parts.model)
        try:
            as_written = parts.loss.as_written(output, target)
            if as_written is not None:
                as_written = as_written.detach()  # drop its graph: training does not need memory for it
            numerator, own = parts.loss.numerator(output, target)
        except Exception as error:  # the loss may be the user's own; torch raises several kinds
            raise DescriptionError(
                f"loss: {spec.loss.factory.path} of output {shape_of(output)} and target {shape_of(target)} raised "
                f"{type(error).__name__}: {_in_short(error)}; make model, loss and data fit"
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


def _in_short(error: BaseException) -> str:
    return one_line(error)[:_MAX_ERROR_CHARACTERS]
