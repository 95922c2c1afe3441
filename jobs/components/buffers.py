"""Buffers: tensors of the model and of the loss that no optimizer trains and that forward may change.

Forward may change a buffer in place or put another tensor in its place, as ``self.seen = self.seen + 1`` does, and it
may make a buffer that was None or absent. So the modules are asked for their buffers each time. A buffer that is a
tensor must keep its shape and type, because the other workers and a resumed run expect these.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_Key = tuple[int, str]
"""The number of a module and the name of a buffer in it."""
_Kind = tuple[torch.dtype, torch.Size, torch.device]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The buffers at one moment."""

    places: Mapping[_Key, Tensor | None]
    """The tensors themselves; None: declared and not made yet."""
    tensors: list[Tensor]
    """The tensors, each once."""
    values: list[Tensor]
    """Copies of their values; empty if none were made."""


class Buffers:
    """The buffers of some modules, as they are when they are asked for."""

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        """``roots``: the model and the modules of the loss, by the names that errors and checkpoints give them."""
        named = [(root, path, module) for root, top in roots.items() for path, module in top.named_modules()]
        self._paths = [(root, path) for root, path, _ in named]
        self._modules = [module for _, _, module in named]

    def __iter__(self) -> Iterator[tuple[_Key, Tensor | None]]:
        """Yields the place and the tensor of each buffer."""
        for number, module in enumerate(self._modules):
            for name, tensor in module._buffers.items():
                yield (number, name), tensor

    def take(self, *, with_values: bool) -> Snapshot:
        """Returns the buffers as they are now, without a gradient: a checkpoint could not hold one.

        Args:
            with_values: Copy the values too, so that ``put`` undoes changes in place.
        """
        places = {
            key: tensor.detach() if tensor is not None and tensor.requires_grad else tensor for key, tensor in self
        }
        tensors = list({id(tensor): tensor for tensor in places.values() if tensor is not None}.values())
        return Snapshot(places, tensors, [tensor.clone() for tensor in tensors] if with_values else [])

    @torch.no_grad()
    def put(self, snapshot: Snapshot) -> None:
        """Puts the tensors of a snapshot back in their places, with the values that it has copied."""
        for number, name in [key for key, _ in self if key not in snapshot.places]:
            delattr(self._modules[number], name)
        for (number, name), tensor in snapshot.places.items():
            self._modules[number]._buffers[name] = tensor
        if snapshot.values:
            torch._foreach_copy_(snapshot.tensors, snapshot.values)

    def own_memory(self) -> None:
        """Gives buffers that ``expand`` has made, whose elements share memory, memory that can be written."""
        for (number, name), tensor in self:
            if tensor is not None and any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride())):
                self._modules[number]._buffers[name] = tensor.contiguous()

    def misfit(self, before: Snapshot) -> str | None:
        """Returns which buffer has another shape, type or device than in the snapshot; None if none has."""
        for key, tensor in self:
            was = before.places.get(key)
            if was is not None and tensor is not None and was is not tensor and _kind(was) != _kind(tensor):
                return _misfit(self.label(key), _kind(was), _kind(tensor))
        return None

    def label(self, key: _Key) -> str:
        """Returns what errors call the buffer."""
        root, name = self.name(key)
        return f"{root}: buffer {name}"

    def name(self, key: _Key) -> tuple[str, str]:
        """Returns the root of a buffer, and its name there."""
        root, path = self._paths[key[0]]
        return root, f"{path}.{key[1]}" if path else key[1]

    def place(self, key: _Key) -> tuple[nn.Module, str]:
        """Returns the module that has a buffer, and the buffer's name in it."""
        number, name = key
        return self._modules[number], name

    def owner(self, root: str, name: str) -> tuple[nn.Module, str]:
        """Returns the module that a buffer belongs to, and the buffer's name in it.

        Raises:
            ValueError: There is no such module.
        """
        path, _, own_name = name.rpartition(".")
        if (root, path) not in self._paths:
            raise ValueError(f"{root}: the checkpoint has the buffer {name}, and nothing here is called {path or root}")
        return self._modules[self._paths.index((root, path))], own_name

    def is_in_state_dict(self, key: _Key) -> bool:
        """Returns whether the model's state dict holds the buffer, once it is made."""
        number, name = key
        return self._paths[number][0] == MODEL and name not in self._modules[number]._non_persistent_buffers_set


MODEL = "model"
"""The name of the root whose state dict a checkpoint holds; that of a loss is in no checkpoint."""


class UnsavedBuffers:
    """The buffers that no state dict in a checkpoint holds: non-persistent ones, the loss's, and those made in forward.

    Most are constant, such as a table of positions, and follow from the description. A checkpoint holds those whose
    values differ from those that they were built with.
    """

    def __init__(self, buffers: Buffers) -> None:
        """Copies the values to compare with; to be called when the modules are built."""
        self._buffers = buffers
        self._built = {key for key, _ in buffers}
        self._kinds = {key: _kind(tensor) for key, tensor in buffers if tensor is not None}
        self._initial = {
            key: tensor.detach().clone()
            for key, tensor in buffers
            if tensor is not None and not buffers.is_in_state_dict(key)
        }

    @property
    def initial(self) -> list[Tensor]:
        """The values of buffers that count as unchanged. All ranks must have the same, to save the same buffers."""
        return list(self._initial.values())

    def state_dict(self) -> dict[str, dict[str, Tensor | None]]:
        """Returns the changed buffers by root and name; ranks with the same buffers return the same ones.

        Waits for the GPU if there is a buffer to compare, because the files of a checkpoint depend on the answer. A
        tensor's version would not do: forward may write to ``buffer.data``, or change the buffers of one rank alone.

        Raises:
            ValueError: A buffer has another shape or type than it was built with.
        """
        changed: dict[_Key, Tensor | None] = {}
        differs: dict[_Key, Tensor] = {}
        for key, tensor in self._buffers:
            kind = self._kinds.get(key)
            if tensor is None or kind is None:
                if (tensor is None) != (kind is None):
                    changed[key] = tensor
            elif kind != _kind(tensor):
                raise ValueError(_misfit(self._buffers.label(key), kind, _kind(tensor)))
            elif key in self._initial:
                changed[key] = tensor
                differs[key] = (_bits(tensor) != _bits(self._initial[key])).any()
        if differs:
            for key, is_changed in zip(differs, torch.stack(list(differs.values())).tolist()):  # the wait
                if not is_changed:
                    del changed[key]
        state: dict[str, dict[str, Tensor | None]] = {}
        for key, tensor in changed.items():
            root, name = self._buffers.name(key)
            state.setdefault(root, {})[name] = tensor
        return state

    @torch.no_grad()
    def load_state_dict(
        self, state: Mapping[str, Mapping[str, Tensor | None]], model: Mapping[str, Tensor], device: torch.device
    ) -> None:
        """Restores what ``state_dict`` returned; to be called before the model's state dict is loaded.

        Buffers that the state does not name become what they were built as, whatever forward has made of them since.

        Args:
            state: The buffers by root and name.
            model: The model's state dict. A buffer that forward registers is persistent if this holds it.
            device: Where to put buffers that are not made yet.

        Raises:
            ValueError: A buffer belongs to another model or loss.
        """
        self._reset()
        for root, buffers in state.items():
            for name, saved in buffers.items():
                module, own_name = self._buffers.owner(root, name)
                if own_name not in module._buffers:
                    module.register_buffer(own_name, None, persistent=root == MODEL and name in model)
                tensor = module._buffers[own_name]
                if tensor is None or saved is None:
                    module._buffers[own_name] = None if saved is None else saved.to(device)
                elif _kind(tensor)[:2] == _kind(saved)[:2]:
                    tensor.copy_(saved)
                else:
                    raise ValueError(
                        f"{root}: buffer {name} is {_text(_kind(saved))} in the checkpoint and "
                        f"{_text(_kind(tensor))} in the job"
                    )

    def _reset(self) -> None:
        """Makes the buffers that no state dict holds what they were built as."""
        for key, tensor in list(self._buffers):
            module, name = self._buffers.place(key)
            if key not in self._built:
                delattr(module, name)
            elif key not in self._kinds:
                module._buffers[name] = None
            elif key in self._initial:
                if tensor is None or _kind(tensor) != self._kinds[key]:
                    module._buffers[name] = self._initial[key].clone()
                else:
                    tensor.detach().copy_(self._initial[key])


@torch.no_grad()
def copy_buffers(model: nn.Module, copy: nn.Module) -> None:
    """Gives a copy of a model the buffers that the model has now."""
    tensors, values = list[Tensor](), list[Tensor]()
    for ours, theirs in zip(copy.modules(), model.modules(), strict=True):
        for name in ours._buffers.keys() - theirs._buffers.keys():
            delattr(ours, name)
        for name, value in theirs._buffers.items():
            if name not in ours._buffers:
                ours.register_buffer(name, None, persistent=name not in theirs._non_persistent_buffers_set)
            tensor = ours._buffers[name]
            if tensor is None or value is None:
                ours._buffers[name] = None if value is None else value.detach().clone()
            else:
                tensors.append(tensor)
                values.append(value)
    if tensors:
        torch._foreach_copy_(tensors, values)


def _kind(tensor: Tensor) -> _Kind:
    return tensor.dtype, tensor.shape, tensor.device


def _misfit(label: str, before: _Kind, after: _Kind) -> str:
    return (
        f"{label} changes from {_text(before)} to {_text(after)} in forward; keep its shape and type, or hold what has "
        "no fixed shape outside of buffers"
    )


def _text(kind: _Kind) -> str:
    dtype, shape, device = kind
    return f"{dtype} {list(shape)} on {device.type}".removeprefix("torch.")


def _bits(tensor: Tensor) -> Tensor:
    """Returns the bytes of a tensor; so a NaN equals itself. Shapes: [...] -> uint8 [bytes]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
