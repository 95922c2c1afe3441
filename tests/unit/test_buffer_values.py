"""Buffers are found wherever forward has put them, and a checkpoint holds those that nothing else gives back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.components.buffers import Buffers, UnsavedBuffers

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("table", torch.tensor([1.0, torch.nan]), persistent=False)
        self.register_buffer("late", None, persistent=False)
        self.register_buffer("late_and_persistent", None)


class Holder(nn.Module):
    """A loss with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(3))


def built() -> tuple[Net, Holder, Buffers, UnsavedBuffers]:
    model, loss = Net(), Holder()
    buffers = Buffers({"model": model, "loss": loss})
    return model, loss, buffers, UnsavedBuffers(buffers)


def in_place(model: Any) -> None:
    model.seen += 1


def by_data(model: Any) -> None:
    model.seen.data.add_(1)


def other_data(model: Any) -> None:
    model.seen.data = model.seen.data + 1


def other_tensor(model: Any) -> None:
    model.seen = model.seen + 1


def late(model: Any) -> None:
    model.late = torch.ones(2)


def late_and_persistent(model: Any) -> None:
    model.late_and_persistent = torch.ones(2)


def registered(model: Any) -> None:
    model.register_buffer("new", torch.ones(2), persistent=False)


def registered_and_persistent(model: Any) -> None:
    model.register_buffer("new", torch.ones(2))


def gone(model: Any) -> None:
    model.norm.running_mean = None


CHANGES = {
    change.__name__: (change, name)
    for change, name in [
        (in_place, "seen"), (by_data, "seen"), (other_data, "seen"), (other_tensor, "seen"), (late, "late"),
        (late_and_persistent, "late_and_persistent"), (registered, "new"), (registered_and_persistent, "new"),
        (gone, "norm.running_mean"),
    ]
}  # fmt: skip


def of(model: nn.Module) -> dict[str, Tensor | None]:
    """All buffers by name, also those that are None."""
    return {
        f"{path}.{name}".removeprefix("."): None if tensor is None else tensor.clone()
        for path, module in model.named_modules()
        for name, tensor in module._buffers.items()
    }


def same(left: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> bool:
    def equal(one: Tensor | None, other: Tensor | None) -> bool:
        return one is other or (one is not None and other is not None and one.nan_to_num().equal(other.nan_to_num()))

    return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
def test_a_snapshot_undoes_a_change(change: Callable[[Any], None], name: str) -> None:
    model, _, buffers, unsaved = built()
    before, persistent = of(model), set(model.state_dict())
    snapshot = buffers.take(with_values=True)
    change(model)
    assert not same(of(model), before), name
    buffers.put(snapshot)
    assert same(of(model), before)
    assert set(model.state_dict()) == persistent
    assert unsaved.state_dict() == {}


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
def test_a_changed_buffer_is_saved_and_restored(change: Callable[[Any], None], name: str) -> None:
    model, _, _, unsaved = built()
    model.norm(torch.randn(4, 2))
    change(model)
    state = unsaved.state_dict()
    assert {root: list(named) for root, named in state.items()} == {"model": [name]}

    other, _, buffers, other_unsaved = built()
    other_unsaved.load_state_dict(state, model.state_dict(), CPU)
    other.load_state_dict(model.state_dict())

    assert same(of(other), of(model))
    assert set(other.state_dict()) == set(model.state_dict())
    assert other_unsaved.state_dict().keys() == {"model"}, "it still counts as changed"
    assert {name for root, name in (buffers.name(key) for key, _ in buffers) if root == "model"} == set(of(model))


def test_constant_buffers_and_those_of_a_state_dict_are_not_saved() -> None:
    model, _, _, unsaved = built()
    model.norm(torch.randn(4, 2))  # running statistics are in the state dict
    model.table = model.table.clone()  # the same values, and a NaN among them
    assert unsaved.state_dict() == {}


def test_the_loss_is_in_no_state_dict() -> None:
    _, loss, _, unsaved = built()
    loss.counts += 1
    state = unsaved.state_dict()
    assert state == {"loss": {"counts": loss.counts}}

    _, other, _, other_unsaved = built()
    other_unsaved.load_state_dict(state, {}, CPU)
    assert other.counts.tolist() == [1, 1, 1]


def test_another_shape_or_type_is_refused_by_name() -> None:
    model, _, buffers, unsaved = built()
    before = buffers.take(with_values=False)
    assert buffers.misfit(before) is None
    model.seen = torch.zeros(3, dtype=torch.int64)
    expected = r"model: buffer seen changes from float32 \[\] on cpu to int64 \[3\] on cpu in forward; keep its shape"
    misfit = buffers.misfit(before)
    assert misfit is not None
    with pytest.raises(ValueError, match=expected):
        raise ValueError(misfit)
    with pytest.raises(ValueError, match=expected):
        unsaved.state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {"seen": torch.zeros(2)}}, r"model: buffer seen is float32 \[2\] on cpu in the checkpoint and "),
        ({"model": {"head.seen": torch.zeros(2)}}, "model: the checkpoint has the buffer head.seen, and nothing here"),
        ({"loss.inner": {"seen": torch.zeros(2)}}, r"loss.inner: the checkpoint has the buffer seen, and nothing here"),
    ],
    ids=["shape", "module", "root"],
)
def test_buffers_of_another_model_are_refused_by_name(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built()[3].load_state_dict(state, {}, CPU)


def test_no_gradient_stays_in_a_buffer() -> None:
    """Else the next backward pass would go through this one's graph, which is gone."""
    model, _, buffers, _ = built()
    weight = nn.Parameter(torch.ones(()))
    model.seen = model.seen + weight
    buffers.put(buffers.take(with_values=False))
    assert not model.seen.requires_grad
    assert model.seen.item() == 1


def test_tied_buffers_stay_tied_and_part_as_forward_parts_them() -> None:
    model, _, buffers, _ = built()
    model.late = model.seen
    tied = buffers.take(with_values=True)
    model.late = model.late + 1
    parted = buffers.take(with_values=True)
    buffers.put(tied)
    assert model.late is model.seen
    buffers.put(parted)
    assert (model.seen.item(), model.late.item()) == (0, 1)


def test_an_expanded_buffer_can_be_written() -> None:
    model, _, buffers, _ = built()
    model.late = torch.ones(1).expand(4)
    buffers.own_memory()
    buffers.put(buffers.take(with_values=True))
    assert model.late.tolist() == [1, 1, 1, 1]
