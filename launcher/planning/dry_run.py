"""The dry run: builds the components of a description, checks them and rehearses a worker, on a worker's device.

It runs in a process of its own, in the place of a worker. That process imports torch and the user's code, so that what
they print, leak or crash stays there.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from cluster.errors import ClusterError, DescriptionError, in_short, nearest
from cluster.process.fork_server import tell_caller
from cluster.process.orders import Task
from jobs.checkpoint.saver import COPY_SLACK_BYTES
from jobs.components.build import Components, build_parts, worker_device
from jobs.data.device_copies import to_device
from jobs.data.loader import seed_draws, shape_of
from jobs.environment import code_digests
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from jobs.sampling import draw_key
from jobs.spec import JobSpec, watched_metrics
from jobs.training.evaluation import evaluation_mode
from launcher.planning.built_index import built_indexes
from launcher.planning.gpu_failures import LOOK_AT_GPU, failure_on_gpu
from launcher.planning.initial_weights import load_init_weights
from launcher.planning.loss_checks import check_fit, check_mean
from launcher.planning.memory import StateBytes, plan_memory
from launcher.planning.micro_batch import MicroBatch
from launcher.planning.operator_watch import OperatorWatch
from launcher.planning.plan import DryRunResult, GroupPlan
from launcher.planning.rehearsal import Snapshot, rehearse
from launcher.planning.same_bits import has_same_bits
from launcher.planning.sample_checks import read_samples, stack
from launcher.planning.shuffle_cost import plan_shuffle
from launcher.planning.state_bytes import measure_state

_MAX_SAMPLES_ON_CPU = 32
"""A larger micro-batch takes long on a CPU and finds no more mistakes."""
_FEW_SAMPLES = 2
"""On a CPU, a rehearsal begins with so few; batch norm needs two."""


def try_out(task: Task) -> DryRunResult:
    """Build every component and train on one micro-batch: a whole one on a GPU, at most 32 samples of it on a CPU.

    Args:
        task: Its content is the job spec; this process was started for it.

    Raises:
        DescriptionError: A component cannot be built, does not fit the others or the GPU, gets no gradient, or has no
            deterministic implementation.
        StorageError: The store of the data does not answer.
        ClusterError: torch cannot use the GPU, or the GPU failed.
    """
    launcher_modules = set(sys.modules)
    spec: JobSpec = task.content
    gpus_here = _gpus_here(spec)  # before this process hides them
    try:
        device = worker_device(on_gpu=task.on_gpu)
    except ClusterError as error:
        if error.cause != "gpu_lost":
            raise
        raise ClusterError(f"{error}; {LOOK_AT_GPU}", cause="gpu_lost", step=0) from error
    max_samples = spec.train.micro_batch if task.on_gpu else _MAX_SAMPLES_ON_CPU
    watch, files = OperatorWatch(spec.train, device), IndexFiles(tell=tell_caller)
    use_index_files(files)
    try:
        parts = build_parts(spec, device)
        tried = _try_components(spec, parts, watch, max_samples, task.import_paths, launcher_modules, gpus_here)
        return replace(tried, indexes=built_indexes(files.opened))
    except (DescriptionError, RuntimeError) as error:
        if told := failure_on_gpu(error, spec, watch):
            raise told from error
        raise


def _try_components(
    spec: JobSpec,
    parts: Components,
    watch: OperatorWatch,
    max_samples: int,
    import_paths: tuple[str, ...],
    launcher_modules: set[str],
    gpus_here: tuple[int, str | None],
) -> DryRunResult:
    """Train on at most ``max_samples`` samples.

    Args:
        spec: The description.
        parts: What was built from it.
        watch: Finds operators without a deterministic implementation on GPUs.
        max_samples: The limit.
        import_paths: Folders of user modules.
        launcher_modules: The loaded modules that are not the user's.
        gpus_here: The number of this machine's GPUs and their type, see ``_gpus_here``.
    """
    data_fingerprint = parts.data_fingerprint()  # before any sample is read, as in workers
    init_from = None if spec.init_from is None else load_init_weights(spec.init_from, parts)
    groups, rates = _group_plans(parts), parts.schedule.preview(parts.steps)  # before a step advances them
    before = Snapshot(parts)
    numbers = parts.steps.samples(spec.seed, 0, 0)[:max_samples].tolist()
    train, few = _read(parts, spec, "data.train", [numbers, numbers[:_FEW_SAMPLES]])
    loss, counts, measured = _check_training(parts, spec, train, before, watch)
    measured |= _check_validation(parts, spec, max_samples, watch)
    _check_watched(spec, measured)
    state = measure_state(parts, before.size, activations=None)
    if counts:
        on_gpu = parts.device.type == "cuda"  # its memory must have room for all samples
        state = _rehearse(parts, spec, before, [train] if on_gpu else [few, train], watch)
    return DryRunResult(
        steps=parts.steps,
        num_val_samples=0 if parts.val_set is None else len(parts.val_set),
        gpus_here=gpus_here[0],
        accelerator_here=gpus_here[1],
        groups=groups,
        parameters=sum(parameter.numel() for parameter in parts.model.parameters()),
        checkpoint_bytes=state.checkpoint,
        memory=plan_memory(state, spec, COPY_SLACK_BYTES),
        trial_samples=len(train.numbers),
        trial_loss=loss,
        data_fingerprint=data_fingerprint,
        modules=tuple(sorted(code_digests(import_paths).keys() - launcher_modules)),
        rates=rates,
        init_from=init_from,
        would_raise_on_gpu=() if on_gpu else watch.found(),
        could_fuse=_could_fuse(parts),
        shuffle=plan_shuffle(parts.train_set, parts.steps, spec),
    )


def _read(parts: Components, spec: JobSpec, key: str, batches: list[list[int]]) -> list[MicroBatch]:
    """Read the samples of some batches, each once."""
    dataset = parts.train_set if key == "data.train" else parts.val_set
    numbers = list(dict.fromkeys(number for batch in batches for number in batch))
    samples = read_samples(dataset, numbers, key, spec)
    read = []
    for batch in batches:
        of_batch = [samples[number] for number in batch if number in samples] or list(samples.values())
        inputs, target = to_device(stack([each.sample for each in of_batch], key), parts.device)
        read.append(MicroBatch(key, dataset, [each.number for each in of_batch], inputs, target))
    return read


def _check_validation(parts: Components, spec: JobSpec, max_samples: int, watch: OperatorWatch) -> set[str]:
    """Check the first and the last batch of ``data.val``; return the names of what is measured."""
    if parts.val_set is None:
        return set()
    length, size = len(parts.val_set), parts.steps.micro_batch
    begin_of_last = (length - 1) // size * size  # the last batch may be shorter than the others
    numbers = [list(range(min(size, length, max_samples))), list(range(begin_of_last, length))[:max_samples]]
    first, last, few_of_last = _read(parts, spec, "data.val", [*numbers, numbers[1][:_FEW_SAMPLES]])
    measured = _forward(parts, spec, first, watch)[2]
    if begin_of_last:
        _check_last(parts, spec, few_of_last, last, watch)
    return measured


def _check_last(parts: Components, spec: JobSpec, few: MicroBatch, whole: MicroBatch, watch: OperatorWatch) -> None:
    """Check the last validation batch on a few of its samples or, if they fail, on all."""
    with suppress(DescriptionError):
        _forward(parts, spec, few, watch)
        return
    try:
        _forward(parts, spec, whole, watch)
    except DescriptionError as error:
        samples = f"{len(whole.numbers)} sample{'s' * (len(whole.numbers) > 1)}"
        raise DescriptionError(f"the last batch of data.val, of {samples}: {error}") from error


def _rehearse(
    parts: Components, spec: JobSpec, before: Snapshot, batches: list[MicroBatch], watch: OperatorWatch
) -> StateBytes:
    """Rehearse on the first of the batches on which no part fails: some losses fail on a few samples.

    Raises:
        DescriptionError: See ``rehearse``, of the last batch.
    """
    *earlier, last = batches
    for batch in earlier:
        try:
            with watch.over(_modules(parts)):
                return rehearse(spec, parts, before, (batch.inputs, batch.target))
        except DescriptionError:
            parts = build_parts(spec, parts.device)  # DDP has left hooks on parameters whose gradient it waited for
    with watch.over(_modules(parts)):
        return rehearse(spec, parts, before, (last.inputs, last.target))


def _gpus_here(spec: JobSpec) -> tuple[int, str | None]:
    """Return the number of GPUs that this process sees and, if the description asks for one, their type by Ray."""
    num_gpus = torch.cuda.device_count()  # asks the driver's library, unlike is_available, which begins to use the GPU
    if spec.workers.accelerator is None or not num_gpus:
        return num_gpus, None
    from cluster.ray.private_core import accelerator_here  # imports Ray, which names accelerators

    return num_gpus, accelerator_here()


def _check_training(
    parts: Components, spec: JobSpec, batch: MicroBatch, before: Snapshot, watch: OperatorWatch
) -> tuple[float, bool, set[str]]:
    """Check the loss of some samples, and that it leaves the parameters as they are.

    Args:
        parts: The components; their forward pass has not run yet.
        spec: The description.
        batch: The samples.
        before: The state of the components.
        watch: See ``_forward``.

    Returns:
        The loss, whether any target counts, and the names of the metrics of a step.
    """
    initial = dict(parts.model.named_parameters())
    numerator, denominator, measured = _forward(parts, spec, batch, watch)
    if not numerator.isfinite():
        raise DescriptionError(
            f"loss: {spec.loss.factory.path} of the first micro-batch is {numerator.item()}; "
            "look at the scale of data.train"
        )
    for name, parameter in parts.model.named_parameters():
        if initial.get(name) is not parameter:
            raise DescriptionError(
                f"model: forward makes the parameter {name}, and the optimizer already has its parameters; make it in "
                "__init__"
            )
        weight = before.weight(name)
        if weight is not None and not has_same_bits(parameter.detach().cpu(), weight):
            raise DescriptionError(
                f"model: forward changes the parameter {name}, on each worker by its own samples; change weights "
                "before the model is returned, or in the optimizer"
            )
    mean = numerator.item() / denominator if denominator else 0.0
    return mean, denominator > 0, measured


def _forward(
    parts: Components, spec: JobSpec, batch: MicroBatch, watch: OperatorWatch
) -> tuple[Tensor, float, set[str]]:
    """Return numerator and denominator of the loss over some samples, and the names of their metrics.

    Training samples go through the model in the modes that its modules were built with, and others through the model
    that validation takes, in evaluation mode. ``watch`` sees what a worker runs.

    Shapes: numerator [], with a graph if the samples are of ``data.train``.
    """
    train, inputs, target = batch.key == "data.train", batch.inputs, batch.target
    model = parts.model if train else parts.validated_model
    seed_draws(draw_key("step", spec.seed, 0, 0), parts.device)
    with parts.autocast(), torch.set_grad_enabled(train), nullcontext() if train else evaluation_mode(model):
        try:
            with watch.over(_modules(parts)):
                output = model(parts.in_memory_order(inputs))
        except Exception as error:  # the model is the user's own code
            shape = f" of shape {list(inputs.shape)}" if isinstance(inputs, Tensor) else ""
            raise DescriptionError(
                f"model: forward on inputs{shape} raised {type(error).__name__}: {in_short(error)}; "
                f"make model and {batch.key} fit"
            ) from error
        check_fit(parts.loss, replace(batch, output=output), model)
        try:
            with _any_implementation():
                as_written = parts.loss.as_written(output, target)
            if as_written is not None:
                as_written = as_written.detach()  # drop its graph: training does not need memory for it
            with watch.over(_modules(parts), "loss"):
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
        seen = parts.loss.measured(output, target)
        measured |= parts.metrics.try_out(*seen)
        with watch.over(_modules(parts), "metrics"):  # without their results, which a worker computes on the CPU
            parts.metrics.update(*seen)
        parts.metrics.share()
    weigh = parts.loss.target_weights()
    denominator = parts.loss.denominator(own if weigh is None else weigh(target))
    check_mean(parts.loss, as_written, numerator, denominator)
    return numerator, denominator, measured


def _modules(parts: Components) -> list[tuple[str, nn.Module]]:
    return [("model", parts.model), ("model", parts.validated_model), *parts.loss.modules().items()]


@contextmanager
def _any_implementation() -> Iterator[None]:
    """Let torch run what has no deterministic implementation: no worker runs it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _could_fuse(parts: Components) -> bool:
    """Return whether a gradient scaler waits for the GPU in every step because the optimizer is not fused."""
    is_told = getattr(parts.optimizer, "_step_supports_amp_scaling", False)  # torch.amp.GradScaler.step asks for it
    return parts.scaler is not None and not is_told and "fused" in inspect.signature(type(parts.optimizer)).parameters


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
