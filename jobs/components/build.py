"""The components of a job, built from its description. The dry run tries them, a worker trains with them."""

import hashlib
import json
import os
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cluster.errors import CheckpointError, ClusterError, DescriptionError, one_line
from cluster.gpu_errors import gpu_error
from cluster.host.gpus import WITHOUT_GPUS
from jobs.components.averaging import MovingAverage
from jobs.components.buffers import MODEL, Buffers, UnsavedBuffers, copy_buffers
from jobs.components.losses import GlobalLoss, build_loss
from jobs.components.model_checks import check_model
from jobs.components.optimizers import ParameterGroup, build_optimizer, group_parameters, set_trainable
from jobs.components.schedules import Schedule, build_schedule, plan_value
from jobs.components.shadowing import check_imports
from jobs.components.targets import Builder
from jobs.data.loader import seed_draws
from jobs.images.splits import check_same_classes
from jobs.sampling import StepPlan, draw_key
from jobs.spec import JobSpec, OptimizerSpec, SchedulerSpec, Target

if TYPE_CHECKING:
    from jobs.components.metrics import MetricSet

_UNFIT_HOST = ("driver on your system is too old", "Found no NVIDIA driver", "not compiled with CUDA")
"""What torch says of a GPU that it cannot use because of what is installed on the host."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The objects that a worker trains with, on their device."""

    spec: JobSpec
    device: torch.device
    model: nn.Module
    ema: MovingAverage | None
    loss: GlobalLoss
    buffers: Buffers
    """Of the model and of the loss."""
    unsaved_buffers: UnsavedBuffers
    metrics: "MetricSet | None"
    groups: list[ParameterGroup]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    schedule: Schedule
    train_set: Any
    val_set: Any | None
    steps: StepPlan

    @property
    def validated_model(self) -> nn.Module:
        """The model to validate: the averaged one if the job keeps an average, else the trained one."""
        return self.model if self.ema is None else self.ema.module

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context of a forward pass: autocast to ``train.precision``, or nothing for fp32."""
        dtype = _AUTOCAST.get(self.spec.train.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def in_memory_order(self, inputs: Any) -> Any:
        """Returns inputs in the memory order of ``train.channels_last``.

        Shapes: a tensor [N, C, H, W] -> the same, NHWC in memory; other inputs stay as they are.
        """
        if self.spec.train.channels_last and isinstance(inputs, Tensor) and inputs.dim() == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    def state(self) -> dict[str, Any]:
        """Returns the state of the components for a checkpoint; its tensors are the live ones, not copies.

        Raises:
            CheckpointError: A buffer has another shape or type than it was built with.
        """
        try:
            buffers = self.unsaved_buffers.state_dict()
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "described": self._described(),
            **({"buffers": buffers} if buffers else {}),
        }

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Restores a state that ``state`` returned after ``step`` steps.

        The arguments of optimizer and schedule follow the description. If it has changed since, the optimizer keeps its
        moments and takes the new arguments, and the new schedule is advanced to ``step``.

        Raises:
            RuntimeError, ValueError, KeyError: The state belongs to another model, optimizer or schedule.
        """
        was, now = state["described"], self._described()
        for key, what in (("optimizer", "optimizer._target_"), ("parameters", "the parameters of optimizer.groups")):
            if was[key] != now[key]:
                raise ValueError(f"{what} changed, and moments belong to the old; begin a new run with init_from")
        self.unsaved_buffers.load_state_dict(state.get("buffers", {}), state["model"], self.device)
        self.model.load_state_dict(state["model"])
        if was == now:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["scheduler"])
        else:
            arguments = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": arguments})
            self.schedule.play_to(step, self.steps)
        if self.ema is not None:
            if state["ema"] is None:
                raise ValueError("train.ema_decay needs the average that the checkpoint keeps, and it keeps none")
            copy_buffers(self.model, self.ema.module)  # its state has those alone that are persistent
            self.ema.load_state_dict(state["ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def data_fingerprint(self) -> str:
        """Returns the SHA-256 of the datasets' lengths, class names and listed targets; reads no sample."""
        sha256 = hashlib.sha256()
        for dataset in (self.train_set, self.val_set):
            if dataset is not None:
                targets, classes = listed_targets(dataset), getattr(dataset, "classes", None)
                # Other objects may print their address, which differs between processes.
                has_names = isinstance(classes, (list, tuple)) and all(isinstance(each, (str, int)) for each in classes)
                sha256.update(f"{len(dataset)}:{classes if has_names else None}:".encode())
                sha256.update(b"" if targets is None else _bytes_of(targets))
        return sha256.hexdigest()

    def _described(self) -> dict[str, Any]:
        """Returns what the description says of optimizer and schedule, to compare it when a state is loaded."""
        return {
            "optimizer": self.spec.optimizer.factory.path,
            "parameters": [name for group in self.groups for name in group.names],
            "rates": rates_digest(self.spec.optimizer, self.spec.scheduler, self.steps),
        }


def _bytes_of(tensor: Tensor) -> bytes:
    """Returns the bytes of a tensor; numpy has no bfloat16."""
    content: bytes = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return content


def listed_targets(dataset: Any) -> Tensor | None:
    """Returns all targets if the dataset lists them in ``targets``, as torchvision's do.

    Shapes: [samples, ...].
    """
    targets = getattr(dataset, "targets", None)
    if targets is None:
        return None
    try:
        return torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        return None  # not a list of numbers


def rates_digest(optimizer: OptimizerSpec, scheduler: SchedulerSpec | None, steps: StepPlan) -> str:
    """Returns a digest of all that determines the learning rates; it does not depend on versions of Python or torch."""
    in_order = asdict(steps)
    del in_order["shuffle"]  # no rate depends on the order of samples
    determines = {
        "optimizer": asdict(optimizer),
        "scheduler": None if scheduler is None else asdict(scheduler),
        "steps": in_order,
    }
    text = json.dumps(determines, sort_keys=True)
    return f"v1-{hashlib.sha256(text.encode()).hexdigest()}"  # make it v2 if the text changes


def worker_device(*, on_gpu: bool) -> torch.device:
    """Returns the device of a worker: the CPU, or the one GPU that it sees, which becomes the current device.

    On the CPU, this process sees no GPU from then on; it must not have used any. On a GPU it runs a kernel, so that a
    broken or occupied GPU fails here and not in the middle of the user's code.

    Raises:
        ClusterError: The worker was given a GPU, but torch cannot use it.
    """
    if not on_gpu:
        os.environ.update(WITHOUT_GPUS)  # else code that asks whether there are any would use those of others
        return torch.device("cpu")
    device = torch.device("cuda", 0)
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device)
        torch.cuda.synchronize(device)
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        raise unusable_gpu(error) from error
    return device


def unusable_gpu(error: Exception) -> ClusterError:
    """Returns the error for a GPU that fails before anything has run on it."""
    said = re.split(" Search for `cuda| CUDA kernel errors might", one_line(error))[0]  # torch adds its advice
    found = gpu_error(str(error))
    is_unfit = any(sign in said for sign in _UNFIT_HOST) or (found is not None and found.cause == "environment")
    if is_unfit:
        return ClusterError(
            f"a worker has a GPU here, and torch {torch.__version__} cannot use it: {said}; give this host a driver "
            "and a torch that fit it, or write workers.gpus=0",
            cause="environment",
            step=0,
        )
    return ClusterError(f"the GPU cannot be used: {said}", cause="gpu_lost", step=0)


def build_parts(spec: JobSpec, device: torch.device) -> Components:
    """Builds all components; data sets and initial weights are drawn from the seed.

    Raises:
        DescriptionError: Something cannot be built as written.
    """
    numerics(spec, device)
    train_set = build_dataset(spec, spec.data.train, "data.train", device)
    val_set = None if spec.data.val is None else build_dataset(spec, spec.data.val, "data.val", device)
    steps = make_steps(spec, len(train_set))
    if val_set is not None and len(val_set) == 0:
        raise DescriptionError("data.val has no samples; point it at some, or leave data.val out")
    check_same_classes(train_set, val_set)
    builder = Builder(lambda value: plan_value(steps, value))
    seed_draws(draw_key("model", spec.seed), device)
    model = builder.build(spec.model, "model")
    check_model(model, spec)
    model.to(device)
    if spec.train.channels_last:
        model.to(memory_format=torch.channels_last)
    loss = build_loss(spec.loss, builder).to(device, number_type(model))
    buffers = Buffers({MODEL: model, **loss.modules()})
    buffers.own_memory()
    metrics = None
    if spec.metrics:
        from jobs.components.metrics import build_metrics, class_names  # torchmetrics takes a second or two to import

        metrics = build_metrics(spec.metrics, builder, class_names(val_set)).to(device)
    groups = group_parameters(model, spec.optimizer.groups, steps.steps_per_epoch)
    if not groups:
        raise DescriptionError(f"model has no parameters to train, got {spec.model.path}; check its requires_grad")
    optimizer = build_optimizer(spec.optimizer, model, groups, builder)
    declared_rates = [group["lr"] for group in optimizer.param_groups]
    schedule = build_schedule(spec.scheduler, optimizer, builder, steps)
    _check_rates(groups, optimizer, declared_rates)
    set_trainable(model, groups, step=0)
    if all(group.from_step > 0 for group in groups):
        raise DescriptionError("optimizer.groups freeze every parameter at first; let one group train from the start")
    check_imports()
    ema = None
    if spec.train.ema_decay is not None:
        ema = MovingAverage(model, spec.train.ema_decay)
    return Components(
        spec=spec,
        device=device,
        model=model,
        ema=ema,
        loss=loss,
        buffers=buffers,
        unsaved_buffers=UnsavedBuffers(buffers),
        metrics=metrics,
        groups=groups,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type) if spec.train.precision == "fp16" else None,
        schedule=schedule,
        train_set=train_set,
        val_set=val_set,
        steps=steps,
    )


def _check_rates(groups: list[ParameterGroup], optimizer: torch.optim.Optimizer, declared: list[float]) -> None:
    """Refuses a group's own rate if the schedule has replaced it.

    Args:
        groups: The parameter groups.
        optimizer: The optimizer, with the rates that the schedule has set.
        declared: The rates that the groups had before the schedule was built.
    """
    for number, (group, rate, torch_group) in enumerate(zip(groups, declared, optimizer.param_groups)):
        key = "lr_scale" if group.lr_scale is not None else "lr" if "lr" in group.args else None
        if key is not None and torch_group.get("initial_lr", rate) != rate:
            raise DescriptionError(
                f"optimizer.groups[{number}].{key} has no effect, for the schedule sets its own rate in every group; "
                "remove it, and write the schedule's rates as a list, one for each group"
            )


def number_type(model: nn.Module) -> torch.dtype:
    """Returns the type of the model's first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def numerics(spec: JobSpec, device: torch.device) -> None:
    """Sets all that may change a kernel's result: threads, determinism, TF32 and who chooses it, as the job says."""
    torch.set_num_threads(spec.train.threads)
    torch.use_deterministic_algorithms(spec.train.deterministic)  # and has torch.compile choose no kernel by time
    # Off: a debugging aid that deterministic algorithms turn on, and that writes every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        if spec.train.deterministic:
            # Read at the first computation. TunableOp chooses kernels by time.
            os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTORCH_TUNABLEOP_ENABLED": "0"}
        torch.set_float32_matmul_precision("high" if spec.train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = spec.train.tf32
        torch.backends.cudnn.benchmark = spec.train.cudnn_benchmark
        torch.backends.cudnn.deterministic = spec.train.deterministic


def make_steps(spec: JobSpec, num_samples: int) -> StepPlan:
    """Returns how a run over so many training samples is divided into steps.

    Raises:
        DescriptionError: They are too few for one step.
    """
    train = spec.train
    steps = StepPlan(num_samples, train.global_batch, train.shards, train.epochs, spec.data.shuffle)
    if steps.steps_per_epoch == 0:
        raise DescriptionError(
            f"train.global_batch must be at most the {steps.num_samples} samples of data.train, "
            f"got {spec.train.global_batch}; lower it"
        )
    return steps


def build_dataset(spec: JobSpec, target: Target, key: str, device: torch.device) -> Any:
    """Builds a map-style dataset, each from the same seed, so that a random split into parts is the same split.

    Raises:
        DescriptionError: It cannot be built as written, or is of another kind.
    """
    seed_draws(draw_key("data", spec.seed), device)
    dataset = Builder().build(target, key)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DescriptionError(
            f"{key} must be a map-style dataset, with __getitem__ and __len__, got {type(dataset).__name__}"
        )
    return dataset
