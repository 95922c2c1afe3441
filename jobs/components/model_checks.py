"""Refuses models that cannot train exactly here, before a weight moves to a device."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cluster.errors import DescriptionError
from jobs.spec import JobSpec

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def check_model(model: Any, spec: JobSpec) -> None:
    """Check what ``model`` in the description has built.

    Raises:
        DescriptionError: It is no module, or it holds a layer or a tensor that workers cannot train.
    """
    if not isinstance(model, nn.Module):
        raise DescriptionError(f"model must be a torch.nn.Module, got {type(model).__name__} from {spec.model.path}")
    for name, module in model.named_modules():
        _check_module(name or type(module).__name__, module)
    for name, tensor in _tensors(model):
        if tensor.is_meta:
            raise DescriptionError(f"model: {name} is on the device meta and has no values; build it on the CPU")
    if spec.train.precision == "fp16":
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype == torch.float16:
                raise DescriptionError(
                    f"model: {name} is float16, and train.precision: fp16 trains float32 weights, because gradients of "
                    "float16 weights overflow; remove half() from the model, autocast makes its inputs float16"
                )


def _check_module(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and any(is_lazy(tensor) for _, tensor in _tensors(module)):
        raise DescriptionError(
            f"model: {name} is a {type(module).__name__}, whose shape is unknown until its first batch; write its "
            "number of inputs, or call the model on a sample where you build it"
        )
    if isinstance(module, nn.SyncBatchNorm) and module.training:
        raise DescriptionError(
            f"model: {name} is a SyncBatchNorm, whose result depends on the number of workers; take BatchNorm, which "
            "sees the micro-batch of one shard here, and lower train.shards for larger batches"
        )
    if isinstance(module, _WRAPPERS):
        raise DescriptionError(
            f"model: {name} is a {type(module).__name__}; return the module inside, workers wrap it themselves"
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
