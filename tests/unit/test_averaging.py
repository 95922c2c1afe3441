"""The moving average of the weights: torch's bits in float32, and no update lost in 16 bits."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cluster.errors import DescriptionError
from jobs.components.averaging import MovingAverage

DECAY = 0.99


class Net(nn.Module):
    """A convolution, BatchNorm, a tied layer, a frozen parameter, one of float64 and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.tied = self.tied_again = nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.counts = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Moves every parameter and buffer a little."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.add_(torch.randn_like(tensor) / 10 if tensor.is_floating_point() else 1)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def test_float32_and_float64_have_the_bits_and_the_memory_order_of_torch() -> None:
    torch.manual_seed(0)
    model = Net().to(memory_format=torch.channels_last)
    ours, torchs = MovingAverage(model, DECAY), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for _ in range(5):
        change(model)
        ours.update_parameters(model)
        torchs.update_parameters(model)
        for name, expected in tensors_of(torchs.module).items():
            if name != "counts":
                assert tensors_of(ours.module)[name].equal(expected), name
                assert tensors_of(ours.module)[name].stride() == expected.stride(), name
        assert ours.module.counts.equal(model.counts), "integers are copied, because a mean of them is none"
    state, expected_state = ours.state_dict(), torchs.state_dict()
    assert state.keys() == expected_state.keys()
    assert state["n_averaged"].equal(expected_state["n_averaged"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_a_narrow_weight_is_averaged_in_float32(dtype: torch.dtype) -> None:
    """With a decay of 0.9999, an average in bfloat16 would not move at all."""
    model = nn.ParameterList([nn.Parameter(torch.ones(4).to(dtype), requires_grad=False)])
    average = MovingAverage(model, 0.9999)
    average.update_parameters(model)
    model[0].data = torch.full((4,), 1.5).to(dtype)
    for _ in range(2000):
        average.update_parameters(model)

    expected = 1.5 - 0.5 * 0.9999**2000
    torch.testing.assert_close(average.state_dict()["module.0"], torch.full((4,), expected))
    assert average.module[0].dtype == dtype
    assert average.module[0].float().equal(torch.full((4,), expected).to(dtype).float())


def test_tied_weights_of_16_bits_stay_tied() -> None:
    model = Net().bfloat16()
    average = MovingAverage(model, DECAY)
    change(model)
    average.update_parameters(model)
    state = average.state_dict()
    assert state["module.tied.weight"] is state["module.tied_again.weight"]
    assert average.module.tied.weight is average.module.tied_again.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_comes_back_and_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Net().to(dtype).to(memory_format=torch.channels_last)
    average, restored = MovingAverage(model, DECAY), MovingAverage(model, DECAY)
    for _ in range(3):
        change(model)
        average.update_parameters(model)
    restored.load_state_dict({name: value.clone() for name, value in average.state_dict().items()})
    assert tensors_of(restored.module)["conv.weight"].equal(tensors_of(average.module)["conv.weight"])

    change(model)
    average.update_parameters(model)
    restored.update_parameters(model)

    for name, value in average.state_dict().items():
        assert restored.state_dict()[name].equal(value), name
        assert restored.state_dict()[name].stride() == value.stride(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_of_torch_fits(dtype: torch.dtype) -> None:
    """Checkpoints that torch's average was saved in; its averages of 16 bits have 16 bits."""
    model = Net().to(dtype)
    torchs, ours = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY)), MovingAverage(model, DECAY)
    for _ in range(3):
        change(model)
        torchs.update_parameters(model)
    ours.load_state_dict(torchs.state_dict())

    for name, value in torchs.state_dict().items():
        assert ours.state_dict()[name].to(value.dtype).equal(value), name
    for name, value in torchs.module.named_parameters():
        assert tensors_of(ours.module)[name].equal(value), name


def test_a_state_of_another_model_is_refused() -> None:
    average = MovingAverage(nn.Linear(2, 2), DECAY)
    with pytest.raises(RuntimeError, match="size mismatch"):
        average.load_state_dict(MovingAverage(nn.Linear(3, 2), DECAY).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        average.load_state_dict({"n_averaged": torch.tensor(1)})


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.fc.lock = threading.Lock()  # type: ignore[assignment]
        self.layers = [self.fc]


class Logging(nn.Linear):
    def __init__(self, path: Path) -> None:
        super().__init__(2, 2)
        self.log = path.open("w")


class Refusing(nn.Linear):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise NotImplementedError("one of me is enough")


def normed() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize(
    ("build", "what"),
    [
        (normed, r"1\.weight cannot be copied: RuntimeError: Only Tensors created explicitly"),
        (Locked, r"fc\.lock cannot be copied: TypeError: cannot pickle"),
        (lambda: Refusing(2, 2), "the model cannot be copied: NotImplementedError: one of me is enough"),
    ],
)
def test_a_model_that_cannot_be_copied_is_named(build: Callable[[], nn.Module], what: str) -> None:
    with pytest.raises(DescriptionError, match=f"^train.ema_decay averages a copy of the model, and {what}") as error:
        MovingAverage(build(), DECAY)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("or remove train.ema_decay")


def test_an_open_file_is_named(tmp_path: Path) -> None:
    model = Logging(tmp_path / "log")
    with pytest.raises(DescriptionError, match=r"and log cannot be copied: TypeError"):
        MovingAverage(model, DECAY)
    model.log.close()


def test_parametrized_weights_are_averaged() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2).bfloat16())
    average = MovingAverage(model, DECAY)
    change(model)
    average.update_parameters(model)
    assert average.state_dict()["module.parametrizations.weight.original1"].dtype == torch.float32


class Hiding(nn.Linear):
    """Its state dict has copies of the weights."""

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: value.clone() for name, value in super().state_dict(*args, **kwargs).items()}  # type: ignore


def test_a_narrow_weight_that_the_state_dict_does_not_hold_is_named() -> None:
    MovingAverage(Hiding(2, 2), DECAY)
    with pytest.raises(DescriptionError, match=r"^train.ema_decay: the state dict of the model must hold weight, "):
        MovingAverage(Hiding(2, 2).bfloat16(), DECAY)


def test_buffers_follow_the_model_whatever_it_does_to_them() -> None:
    model = nn.BatchNorm1d(2)
    model.register_buffer("late", None)
    average = MovingAverage(model, DECAY)
    model.running_mean = model.running_mean + 1  # another tensor
    model.late = torch.ones(3)
    model.register_buffer("new", torch.zeros(2), persistent=False)
    for _ in range(2):
        average.update_parameters(model)
        copied = dict(average.module.named_buffers())
        assert copied.keys() == dict(model.named_buffers()).keys()
        for name, value in model.named_buffers():
            assert copied[name].equal(value)
            assert copied[name] is not value
        model.late = None
    delattr(model, "new")
    average.update_parameters(model)
    assert not hasattr(average.module, "new")
