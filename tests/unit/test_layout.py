"""What a checkpoint holds comes back as it was, and the digest tells any two states apart."""

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from cluster.errors import CheckpointError
from jobs.checkpoint.layout import MODEL_FILE, PART_BYTES, STATE_FILES, lay_out
from tests.states import decode, digest, encode


def a_state() -> dict[str, Any]:
    return {
        "model": {"fc.weight": torch.arange(6.0).view(2, 3), "norm.num_batches_tracked": torch.tensor(7)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "moment": torch.tensor([0.5, -0.0])}, 1: {}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1]}],
        },
        "scheduler": {"milestones": Counter({2: 1, 5: 2}), "best": math.inf, "mode": "min"},
        "ema": None,
        "progress": {"step": 3, "best_metric": None},
    }


def same(left: Any, right: Any) -> bool:
    """Whether two trees hold the same, with the same types and bits."""
    if isinstance(left, Tensor):
        same_kind = isinstance(right, Tensor) and (left.dtype, left.shape) == (right.dtype, right.shape)
        return same_kind and left.contiguous().view(-1).view(torch.uint8).equal(
            right.contiguous().view(-1).view(torch.uint8)
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) or left != left  # NaN is the same as NaN


VALUES = {
    "nothing": None,
    "bool": True,
    "int": 2**80,
    "float": 0.1,
    "inf": [math.inf, -math.inf],
    "nan": math.nan,
    "text": "µ\n\"",
    "tuple": (1, (2.0, "x")),
    "list": [1, [2], []],
    "like a tag": ["tuple", [1, 2]],
    "int keys": {0: "a", 10: {"b": (1,)}},
    "keys of both kinds": {0: "a", "b": 1},
    "counter": Counter({30: 1, 80: 2}),
    "empty": {},
    "scalar tensor": torch.tensor(1.5),
    "bfloat16": torch.tensor([1.0, -2.5, math.nan], dtype=torch.bfloat16),
    "float64": torch.tensor([0.1], dtype=torch.float64),
    "int64": torch.tensor([2**62]),
    "bool tensor": torch.tensor([True, False]),
    "no elements": torch.empty(0, 3),
    "not contiguous": torch.arange(6).view(2, 3).T,
    "tensors in lists": [torch.zeros(2), (torch.ones(1), {3: torch.ones(2)})],
}  # fmt: skip


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert same(decode(encode({"model": {}, "value": value}))["value"], value)


def test_a_state_comes_back_as_it_was() -> None:
    assert same(decode(encode(a_state())), a_state())


IN_MEMORY = {
    "channels last": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last 3d": torch.arange(240.0).view(2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "in the order of its dimensions": torch.arange(6.0).view(2, 3),
    "with gaps": torch.arange(12.0).view(3, 4)[:, ::2],
    "no dimension": torch.tensor(1.0),
}


@pytest.mark.parametrize("tensor", IN_MEMORY.values(), ids=IN_MEMORY.keys())
def test_a_moment_lies_in_memory_as_it_did(tensor: Tensor) -> None:
    """An update takes other kernels where it does not, which may round otherwise."""
    moments = {"state": {0: {"exp_avg": tensor}}, "own": {"k": tensor}}
    decoded = decode(encode({"model": {}, "optimizer": moments}))["optimizer"]
    for found in (decoded["state"][0]["exp_avg"], decoded["own"]["k"]):
        assert found.equal(tensor)
        has_gaps = torch.empty_like(tensor).stride() != tensor.stride()
        assert found.stride() == (torch.empty(tensor.shape) if has_gaps else tensor).stride()


def test_files_are_of_the_moment_they_were_made() -> None:
    state = {**a_state(), "column": torch.arange(6.0).view(2, 3).T, "ordered": OrderedDict(a=1)}
    before, files = copy.deepcopy(state), encode(state)

    state["model"]["fc.weight"].add_(1)
    state["column"].add_(1)
    state["optimizer"]["param_groups"][0]["lr"] = 0.0

    decoded = decode(files)
    assert same(decoded["model"], before["model"])
    assert same(decoded["optimizer"], before["optimizer"])
    assert same(decoded["column"], before["column"])


def test_the_weights_file_has_the_names_of_the_model() -> None:
    """So that anybody can load it, without this package."""
    import safetensors.torch

    weights = safetensors.torch.load(encode(a_state())[MODEL_FILE])

    assert same(weights, a_state()["model"])


def test_averaged_weights_have_a_file_of_their_own() -> None:
    ema = {"n_averaged": torch.tensor(3), "module.fc.weight": torch.arange(6.0)}
    files = encode({**a_state(), "ema": ema})
    assert files.keys() == {*STATE_FILES, "training.json", "ema.safetensors"}
    assert same(decode(files)["ema"], ema)


class TestLayout:
    """Parts of one stretch of bytes, in which the files lie."""

    STATE: dict[str, Any] = {
        "model": {
            "a.weight": torch.arange(3 * PART_BYTES // 8, dtype=torch.float32),
            "b.bias": torch.ones(10),
            "c.weight": torch.arange(2**17, dtype=torch.float32).view(2, -1).T,
            "d.count": torch.tensor(7),
            "e.mask": torch.tensor([True]),
        },
        "optimizer": {},
        "scheduler": {},
    }

    def test_parts_cover_a_file_without_gaps_and_none_is_too_large(self) -> None:
        layout, files = lay_out(self.STATE), encode(self.STATE)
        for name, parts in layout.files.items():
            assert [part.stop for part in parts[:-1]] == [part.start for part in parts[1:]]
            assert all(0 < len(part) <= PART_BYTES for part in parts)
            assert parts[0].start % 64 == 0
            assert len(files[name]) == parts[-1].stop - parts[0].start

    def test_a_large_tensor_has_parts_of_its_own(self) -> None:
        """So that a change of its neighbours does not make it another one."""
        changed = copy.deepcopy(self.STATE)
        changed["model"]["b.bias"].add_(1)
        changed["model"]["d.count"].add_(1)
        before, after = self.parts(self.STATE), self.parts(changed)
        assert [len(part) for part in before[1:4]] == [PART_BYTES, PART_BYTES // 2, 40]
        assert [left == right for left, right in zip(before, after)] == [False, True, True, False, True, True]

    def test_any_stretch_is_copied_as_the_whole_has_it(self) -> None:
        layout = lay_out(a_state())
        whole = torch.empty(layout.size, dtype=torch.uint8)
        layout.copy_to(whole, range(layout.size))
        for start in range(0, layout.size, 7):
            for stop in (start, start + 1, start + 30, layout.size):
                wanted = range(start, min(stop, layout.size))
                buffer = torch.full((len(wanted) + 3,), 99, dtype=torch.uint8)
                layout.copy_to(buffer, wanted)
                assert buffer[: len(wanted)].equal(whole[wanted.start : wanted.stop])
                assert buffer[len(wanted) :].tolist() == [99] * 3

    @staticmethod
    def parts(state: dict[str, Any]) -> list[bytes]:
        data = encode(state)[MODEL_FILE]
        return [data[part.start : part.stop] for part in lay_out(state).files[MODEL_FILE]]


class TestDigest:
    def test_equal_states_have_equal_digests(self) -> None:
        assert digest(a_state()) == digest(copy.deepcopy(a_state())) == digest(decode(encode(a_state())))

    def test_the_order_of_names_does_not_matter(self) -> None:
        state = a_state()
        state["model"] = dict(reversed(state["model"].items()))

        assert digest(state) == digest(a_state())

    def test_it_is_a_fixed_sha256(self) -> None:
        """Else digests that are in manifests already would become wrong."""
        assert digest(a_state()) == "0b9961dffd0f12dc4e8fd2b5bd2ce795e60ac2f9efc9dac885b32a635196727e"

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda state: flip_last_bit(state["model"]["fc.weight"]), id="a bit of a weight"),
            pytest.param(lambda state: state["model"]["norm.num_batches_tracked"].add_(1), id="a buffer"),
            pytest.param(lambda state: state["optimizer"]["state"][0]["moment"].abs_(), id="the sign of a zero"),
            pytest.param(lambda state: flip_last_bit(state["optimizer"]["state"][0]["step"]), id="a scalar tensor"),
            pytest.param(lambda state: rename(state["model"], "fc.weight", "fc1.weight"), id="a name"),
            pytest.param(lambda state: rename(state["optimizer"]["state"], 1, 2), id="an int key"),
            pytest.param(lambda state: reshape(state["model"], "fc.weight", (3, 2)), id="a shape"),
            pytest.param(lambda state: as_ints(state["model"], "fc.weight"), id="a dtype"),
            pytest.param(lambda state: state["optimizer"]["param_groups"][0].update(lr=0.1 + 2**-56), id="a rate"),
            pytest.param(lambda state: state["optimizer"]["param_groups"][0].update(betas=(0.9, 0.99)), id="a beta"),
            pytest.param(lambda state: state["scheduler"]["milestones"].update([5]), id="a milestone"),
            pytest.param(lambda state: state["scheduler"].update(best=0.5), id="the best so far"),
            pytest.param(lambda state: state["model"].popitem(), id="a tensor less"),
        ],
    )
    def test_any_change_shows(self, change: Callable[[dict[str, Any]], object]) -> None:
        state = a_state()
        change(state)

        assert digest(state) != digest(a_state())


def flip_last_bit(tensor: Tensor) -> None:
    tensor.view(-1).view(torch.uint8)[0] ^= 1


def rename(tree: dict[Any, Any], old: Any, new: Any) -> None:
    tree[new] = tree.pop(old)


def reshape(tree: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
    tree[name] = tree[name].view(shape)


def as_ints(tree: dict[str, Tensor], name: str) -> None:
    tree[name] = tree[name].view(torch.int32)


class TestErrors:
    @pytest.mark.parametrize("use", [encode, digest])
    def test_what_cannot_be_kept_is_named(self, use: Callable[[Any], object]) -> None:
        state = {**a_state(), "scheduler": {"lr_lambdas": [None, {"fn": object()}]}}

        with pytest.raises(CheckpointError) as caught:
            use(state)
        assert str(caught.value) == (
            "scheduler.lr_lambdas.1.fn: a object cannot be kept in a checkpoint; "
            "keep tensors, numbers, strings, lists and dicts"
        )

    @pytest.mark.parametrize("name", [MODEL_FILE, "optimizer.json", "training.json"])
    def test_a_missing_file_is_named(self, name: str) -> None:
        files = encode(a_state())
        del files[name]

        with pytest.raises(CheckpointError, match=f"^the checkpoint has no {name}; use an earlier one$"):
            decode(files)

    @pytest.mark.parametrize("name", [*STATE_FILES, "training.json"])
    @pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"\x80" * 50])  # noqa: ARG005
    def test_a_damaged_file_is_an_error_of_one_line(self, name: str, damage: Callable[[bytes], bytes]) -> None:
        files = encode(a_state())
        files[name] = damage(files[name])

        with pytest.raises(
            CheckpointError, match=r"^the checkpoint cannot be decoded: .*; use an earlier one$"
        ) as caught:
            decode(files)
        assert "\n" not in str(caught.value)

    def test_a_tensor_that_the_tree_names_must_be_there(self) -> None:
        files = encode(a_state())
        del files["optimizer.safetensors"]

        with pytest.raises(CheckpointError, match="^the checkpoint cannot be decoded"):
            decode(files)


Schedule = lr_scheduler.LRScheduler | lr_scheduler.ReduceLROnPlateau


def sequential(optimizer: Optimizer) -> Schedule:
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[2])


def chained(optimizer: Optimizer) -> Schedule:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(optimizer, step_size=2), lr_scheduler.ExponentialLR(optimizer, gamma=0.9)]
    )


class TestOptimizersAndSchedules:
    """Torch's own states pass through files, and training goes on from them to the same bits."""

    @pytest.mark.parametrize(
        "make_optimizer",
        [
            pytest.param(lambda groups: SGD(groups, lr=0.1, momentum=0.9, nesterov=True), id="SGD"),
            pytest.param(lambda groups: AdamW(groups, lr=0.01, amsgrad=True), id="AdamW"),
        ],
    )
    @pytest.mark.parametrize(
        "make_schedule",
        [
            pytest.param(sequential, id="SequentialLR"),
            pytest.param(chained, id="ChainedScheduler"),
            pytest.param(lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 4, 4]), id="MultiStepLR"),
            pytest.param(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=9), id="OneCycleLR"),
            pytest.param(
                lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), id="ReduceLROnPlateau"
            ),
        ],
    )
    def test_training_goes_on_from_a_file_to_the_same_bits(
        self, make_optimizer: Callable[..., Optimizer], make_schedule: Callable[[Optimizer], Schedule]
    ) -> None:
        def parts() -> tuple[nn.Linear, Optimizer, Schedule]:
            torch.manual_seed(0)
            model = nn.Linear(3, 2)
            optimizer = make_optimizer([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.02}])
            return model, optimizer, make_schedule(optimizer)

        undisturbed, first, second = parts(), parts(), parts()
        train(*undisturbed, steps=range(6))
        train(*first, steps=range(3))
        load(second, decode(encode(state_of(first))))
        assert digest(state_of(second)) == digest(state_of(first))

        train(*second, steps=range(3, 6))

        assert digest(state_of(second)) == digest(state_of(undisturbed)) != digest(state_of(first))


def train(model: nn.Module, optimizer: Optimizer, schedule: Schedule, *, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.full((4, 3), 1.0 + step)).square().mean().backward()
        optimizer.step()
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step(float(step % 2))
        else:
            schedule.step()


def state_of(parts: tuple[nn.Linear, Optimizer, Schedule]) -> dict[str, Any]:
    model, optimizer, schedule = parts
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}


def load(parts: tuple[nn.Linear, Optimizer, Schedule], state: dict[str, Any]) -> None:
    for part, key in zip(parts, ("model", "optimizer", "scheduler")):
        part.load_state_dict(state[key])
