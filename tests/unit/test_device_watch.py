"""The watch itself: what it notes as a wait for the GPU, and what not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.device_watch import DeviceWatch

WAITS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a number of it": lambda x, _: float(x.detach().sum()),
    "a branch on it": lambda x, _: 1 if x.sum() > 0 else 2,
    "a list of it": lambda x, _: x.tolist(),
    "an array of it": lambda x, _: x.detach().numpy(),
    "its copy on the CPU": lambda x, _: x.cpu(),
    "the same, by name": lambda x, _: x.to("cpu"),
    "a selection by truth": lambda x, _: x[x > 1],
    "an assignment by truth": lambda x, _: x.detach().index_put_((x > 1,), torch.tensor(0.0)),
    "where it is not zero": lambda x, _: x.nonzero(),
    "its different values": lambda x, _: x.unique(),
    "a comparison as a whole": lambda x, _: torch.equal(x, x + 1),
    "a tensor of a number": lambda *_: torch.tensor(1.0, device=DeviceWatch.device),
    "a copy to it": lambda x, host: x.detach().copy_(host),
    "copies to some": lambda x, host: torch._foreach_copy_([x.detach()], [host]),
    "a copy from it": lambda x, host: host.copy_(x.detach()),
    "values of the CPU as an operand": lambda x, host: x + host,
    "in the backward pass": lambda x, _: in_backward(x),
}
NO_WAITS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a reduction": lambda x, _: x.sum(dtype=torch.float64),
    "a selection by place": lambda x, _: x.detach()[1:].copy_(x[0]),
    "a masked choice": lambda x, _: torch.where(x > 1, x, 0.0).sum(),
    "a number of the CPU as an operand": lambda x, _: x * 3.0 + torch.tensor(2.0),
    "a filled tensor": lambda x, _: torch.full((), 3.0, device=DeviceWatch.device) + x.new_zeros(()),
    "another type": lambda x, _: x.double(),
    "a value of the CPU": lambda _, host: (float(host.sum()), host.tolist(), host[host > 0]),
}


def in_backward(x: Tensor) -> None:
    def read(gradient: Tensor) -> None:
        float(gradient.sum())

    x.register_hook(read)
    x.sum().backward()


def waits(do: Callable[[Tensor, Tensor], Any]) -> list[str]:
    watch, host = DeviceWatch(), torch.arange(3.0)
    x = torch.arange(3.0).requires_grad_()
    watch.mark([x])
    with watch.here():
        do(x, host)
    return watch.waits[0]


@pytest.mark.parametrize("name", WAITS)
def test_it_notes(name: str) -> None:
    assert len(waits(WAITS[name])) == 1


@pytest.mark.parametrize("name", NO_WAITS)
def test_it_does_not_note(name: str) -> None:
    assert waits(NO_WAITS[name]) == []
