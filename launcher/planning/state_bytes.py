"""Measures the memory of components after a step."""

from collections.abc import Iterable

from torch import Tensor

from jobs.checkpoint.state_tree import pack
from jobs.components.build import Components
from jobs.training.aligned_gradients import needs_aligned
from launcher.planning.memory import StateBytes


def measure_state(components: Components, checkpoint_bytes: int, activations: int | None) -> StateBytes:
    """Return what components take.

    Args:
        components: The components, which have taken a step with all groups unfrozen.
        checkpoint_bytes: The size of a checkpoint of them.
        activations: What a micro-batch takes, if it was measured.
    """
    of_optimizer: dict[str, Tensor] = {}
    pack(components.optimizer.state_dict(), "", of_optimizer)
    weights = dict(components.model.named_parameters())
    buffers = components.buffers.take(with_values=False).tensors
    averages = []
    if components.ema is not None:
        wide = [value for name, value in components.ema.state_dict().items() if name != "n_averaged"]
        averages = [*components.ema.module.parameters(), *components.ema.module.buffers(), *wide]
    gradients = sum(weights[name].nbytes for group in components.groups for name in group.names)
    return StateBytes(
        weights=_size(weights.values()),
        buffers=_size([*buffers, *components.unsaved_buffers.initial]),
        gradients=gradients,
        aligned=gradients if needs_aligned(components.spec.train, components.optimizer) else 0,
        optimizer=_size(of_optimizer.values()),
        average=_size(averages),
        checkpoint=checkpoint_bytes,
        activations=activations,
    )


def _size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the memory that tensors lie in."""
    memory = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())
