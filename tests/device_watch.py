"""Tells where a step would wait for a GPU, on a machine that has none.

The watch follows which tensors would be on the GPU: those that the test marks, and all that is computed from them. It
sees every operator of the threads that enter it, forward and backward, in torch's own code as in ours, and notes those
for which the CPU would wait: it reads a value of such a tensor, needs to know a result's shape, or copies between GPU
and pageable memory. It notes collectives, too.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_READS = {"_local_scalar_dense", "equal", "is_nonzero"}
_OF_UNKNOWN_SHAPE = {
    "nonzero", "masked_select", "bincount", "repeat_interleave",
    "_unique", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_", "_unsafe_index_put"}
_READS_OF_PYTHON = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.new_tensor}
_FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray}


class DeviceWatch:
    """Notes waits and collectives, step by step.

    Attributes:
        waits: Of each step, what the CPU would wait for.
        collectives: Of each step, how often each collective began.
    """

    device = torch.device("cpu", 0)
    """Stands for the GPU in calls that make tensors on a device; torch forgets the 0 at once."""

    def __init__(self) -> None:
        self.waits: list[list[str]] = [[]]
        self.collectives: list[Counter[str]] = [Counter()]
        self._on_device: dict[int, StorageWeakRef] = {}  # a weak reference also keeps the number from being used again

    def next_step(self) -> None:
        """Begins the next step."""
        self.waits.append([])
        self.collectives.append(Counter())

    @contextmanager
    def here(self) -> Iterator[None]:
        """Watches what this thread does."""
        with _Calls(self), _Operators(self):
            yield

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """Says of tensors that they are on the device, with all that shares their memory."""
        for tensor in tensors:
            reference = StorageWeakRef(tensor.untyped_storage())
            self._on_device.setdefault(reference.cdata, reference)

    def copy_to_device(self, tree: Any) -> Any:
        """Returns a tree with copies on the device of its tensors; nobody waits for them."""

        def copied(tensor: Tensor) -> Tensor:
            copy = tensor.clone()
            self.mark([copy])
            return copy

        return tree_map_only(Tensor, copied, tree)

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        """Returns a copy of a tensor that is not on the device; nobody waits for it."""
        copy = tensor.clone()
        self._on_device.pop(copy.untyped_storage()._cdata, None)
        return copy

    def has(self, value: Any) -> bool:
        """Returns whether a value is a tensor on the device."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._on_device

    def note_wait(self, what: object) -> None:
        """Notes that the CPU would wait here."""
        self.waits[-1].append(str(what))


class _Operators(TorchDispatchMode):
    def __init__(self, watch: DeviceWatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watch, name = self._watch, func.overloadpacket.__name__
        if func.namespace == "c10d":
            watch.collectives[-1][name] += 1
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [watch.has(operand) for operand in operands]
        if func.namespace == "aten" and self._waits(name, operands, on_device, args):
            watch.note_wait(func)
        result = func(*args, **kwargs)
        if any(on_device) or (kwargs.get("device") == watch.device and kwargs["device"].index is not None):
            # An operator that writes to the CPU's memory what is on the device is one that waits, and is noted.
            watch.mark(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
            watch.mark(written for written in _written(func, args, kwargs) if isinstance(written, Tensor))
        return result

    def _waits(self, name: str, operands: list[Tensor], on_device: list[bool], args: Any) -> bool:
        if not any(on_device):
            return False
        if name in _READS or name in _OF_UNKNOWN_SHAPE:
            return True
        if name in ("copy_", "_foreach_copy_"):
            targets, values = (tree_leaves(side) for side in args[:2])
            return [self._watch.has(each) for each in targets] != [self._watch.has(each) for each in values]
        if name in _INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
            return True
        # A scalar of the CPU is an argument of a kernel; any other tensor has to be copied first.
        return any(operand.dim() and not here for operand, here in zip(operands, on_device))


class _Calls(TorchFunctionMode):
    """Calls that reach no operator, because the memory is the CPU's here."""

    def __init__(self, watch: DeviceWatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._waits(func, args, kwargs):
            self._watch.note_wait(func)
        return func(*args, **kwargs)

    def _waits(self, func: Any, args: Any, kwargs: Any) -> bool:
        if func in _FROM_NUMBERS:
            device = kwargs.get("device")
            return isinstance(device, torch.device) and device.index is not None
        if func is Tensor.to and "cpu" not in (*args[1:2], kwargs.get("device")):
            return False
        return (func in _READS_OF_PYTHON or func is Tensor.to) and self._watch.has(args[0])


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Returns the arguments that an operator writes to."""
    values = {**dict(zip((argument.name for argument in func._schema.arguments), args)), **kwargs}
    names = [each.name for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return tree_leaves([values.get(name) for name in names])
