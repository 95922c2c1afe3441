"""Gradients at aligned addresses, for kernels that round by the address of what they read.

DDP keeps each gradient in a bucket. Its address there depends on the size of the buckets, and changes after the first
step of a process, when DDP orders the buckets anew. Operations on single elements give the same bits at any address.
Products of matrices do not, and neither do norms on a GPU: at an address that their vectors do not fit, they add up in
another order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jobs.spec import TrainSpec

_ALIGNMENT = {"cpu": 64, "cuda": 256}
"""Bytes to which torch aligns what it allocates; no kernel asks for more. By type of device."""
_BY_ELEMENT = (
    torch.optim.ASGD, torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW,
    torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
)  # fmt: skip
"""Optimizers that update each element by itself. Others may multiply matrices or take norms."""


class AlignedGradients:
    """Moves gradients to aligned addresses, in memory that is kept for the next step."""

    def __init__(self) -> None:
        self._memory: dict[nn.Parameter, Tensor] = {}

    def align(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces each gradient that is not aligned by a copy that is."""
        originals, copies = [], []
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is not None and gradient.data_ptr() % _ALIGNMENT[gradient.device.type]:
                if parameter not in self._memory:
                    self._memory[parameter] = torch.empty_like(gradient)
                parameter.grad = self._memory[parameter]
                originals.append(gradient)
                copies.append(self._memory[parameter])
        if originals:
            torch._foreach_copy_(copies, originals)


def needs_aligned(train: TrainSpec, optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the bits of a job depend on the addresses of its gradients, and must not."""
    return train.exact and (train.clip_norm is not None or type(optimizer) not in _BY_ELEMENT)
