"""The operators that raise on a GPU: each is run on the CPU, where it has to be found, and so are its harmless kin.

Whether a GPU really refuses one can only be tried there; what is compared here is torch's own list of them.
"""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from jobs.spec import TrainSpec
from jobs.training.deterministic import refusal, refused_operator
from launcher.planning.deterministic_ops import OPERATORS
from launcher.planning.operator_watch import OperatorWatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    """As in a run; what raises on the CPU, too, is run without."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def x(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


class Runs(nn.Module):
    """A model around a function, with a part that is used by it."""

    def __init__(self, function: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.part, self.shape = nn.Identity(), shape
        if isinstance(function, nn.Module):
            self.part = function
        else:
            self.part.forward = function  # type: ignore[method-assign]

    def forward(self) -> Any:
        return self.part(x(*self.shape))


def found_in(function: Callable[..., Any], *shape: int, train: TrainSpec | None = None) -> tuple[str, ...]:
    """What is found of a function of random numbers and its backward pass."""
    model, watch = Runs(function, *shape), OperatorWatch(train or TRAIN, CPU)
    with watch.over([("model", model)]):
        output = model()
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.sum().backward()
    return watch.found()


TRAIN = TrainSpec(global_batch=4)
INDEX = torch.tensor([0, 1, 1])
GRID = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2, 3)


def max_unpool(kind: str) -> Callable[[Tensor], Tensor]:
    def run(inputs: Tensor) -> Tensor:
        torch.use_deterministic_algorithms(False)  # a CPU refuses it, too
        pooled, indices = getattr(F, f"max_pool{kind}")(inputs, 2, return_indices=True)
        unpooled: Tensor = getattr(F, f"max_unpool{kind}")(pooled.detach().requires_grad_(), indices, 2)
        return unpooled

    return run


def ctc(log_probs_TNC: Tensor, *, target_shape: tuple[int, ...] = (2, 2), blank: int = 0) -> Tensor:
    targets, lengths = torch.full(target_shape, 1), torch.tensor([2, 2])
    return F.ctc_loss(log_probs_TNC.log_softmax(2), targets, lengths * 2, lengths, blank=blank)


def put(inputs: Tensor) -> Tensor:
    return torch.zeros(4).put_(INDEX, inputs, accumulate=True)


RAISES: dict[str, tuple[str, Callable[..., Any], tuple[int, ...]]] = {
    "AdaptiveAvgPool1d": ("_adaptive_avg_pool2d_backward", nn.AdaptiveAvgPool1d(2), (1, 2, 4)),
    "AdaptiveAvgPool2d": ("_adaptive_avg_pool2d_backward", nn.AdaptiveAvgPool2d(2), (1, 2, 4, 4)),
    "AdaptiveAvgPool2d that changes nothing": ("_adaptive_avg_pool2d_backward", nn.AdaptiveAvgPool2d(7), (1, 2, 7, 7)),
    "AdaptiveAvgPool2d to a row": ("_adaptive_avg_pool2d_backward", nn.AdaptiveAvgPool2d((1, None)), (1, 2, 4, 4)),
    "AdaptiveAvgPool3d": ("_adaptive_avg_pool3d_backward", nn.AdaptiveAvgPool3d(2), (1, 2, 4, 4, 4)),
    "interpolate area": ("_adaptive_avg_pool2d_backward", lambda a: F.interpolate(a, 2, mode="area"), (1, 2, 4, 4)),
    "AdaptiveMaxPool1d": ("adaptive_max_pool2d_backward", nn.AdaptiveMaxPool1d(2), (1, 2, 4)),
    "AdaptiveMaxPool2d": ("adaptive_max_pool2d_backward", nn.AdaptiveMaxPool2d(1), (1, 2, 4, 4)),
    "AvgPool3d": ("avg_pool3d_backward", nn.AvgPool3d(2), (1, 2, 4, 4, 4)),
    "MaxPool3d": ("max_pool3d_with_indices_backward", nn.MaxPool3d(2), (1, 2, 4, 4, 4)),
    "FractionalMaxPool2d": ("fractional_max_pool2d_backward", nn.FractionalMaxPool2d(2, 2), (1, 2, 4, 4)),
    "FractionalMaxPool3d": ("fractional_max_pool3d_backward", nn.FractionalMaxPool3d(2, 2), (1, 2, 4, 4, 4)),
    "MaxUnpool1d": ("max_unpool2d", max_unpool("1d"), (1, 2, 4)),
    "MaxUnpool2d": ("max_unpool2d", max_unpool("2d"), (1, 2, 4, 4)),
    "MaxUnpool3d": ("max_unpool3d", max_unpool("3d"), (1, 2, 4, 4, 4)),
    "interpolate linear": ("upsample_linear1d_backward", nn.Upsample(scale_factor=2, mode="linear"), (1, 2, 4)),
    "interpolate bicubic": ("upsample_bicubic2d_backward", nn.Upsample(scale_factor=2, mode="bicubic"), (1, 2, 4, 4)),
    "interpolate bilinear antialias": (
        "_upsample_bilinear2d_aa_backward",
        lambda a: F.interpolate(a, 2, mode="bilinear", antialias=True),
        (1, 2, 4, 4),
    ),
    "interpolate bicubic antialias": (
        "_upsample_bicubic2d_aa_backward",
        lambda a: F.interpolate(a, 2, mode="bicubic", antialias=True),
        (1, 2, 4, 4),
    ),
    "ReflectionPad1d": ("reflection_pad1d_backward", nn.ReflectionPad1d(1), (1, 2, 4)),
    "ReflectionPad3d": ("reflection_pad3d_backward", nn.ReflectionPad3d(1), (1, 2, 4, 4, 4)),
    "grid_sample": ("grid_sampler_2d_backward", lambda a: F.grid_sample(a, GRID[0], align_corners=True), (1, 2, 4, 4)),
    "grid_sample of volumes": (
        "grid_sampler_3d_backward",
        lambda a: F.grid_sample(a, GRID[1], align_corners=True),
        (1, 2, 4, 4, 4),
    ),
    "CTCLoss": ("_ctc_loss_backward", ctc, (4, 2, 3)),
    "CTCLoss with another blank": ("_ctc_loss_backward", lambda a: ctc(a, target_shape=(4,), blank=2), (4, 2, 3)),
    "EmbeddingBag max": (
        "_embedding_bag_backward",
        lambda a: F.embedding_bag(INDEX[None], a, mode="max"),
        (2, 3),
    ),
    "NLLLoss of pixels": ("nll_loss2d_forward", lambda a: F.cross_entropy(a, INDEX[None, None] * 0), (1, 2, 1, 3)),
    "NLLLoss of pixels, summed": (
        "nll_loss2d_forward",
        lambda a: F.nll_loss(a, INDEX[None, None] * 0, reduction="sum"),
        (1, 2, 1, 3),
    ),
    "put_": ("put", put, (3,)),
    "take": ("put", lambda a: a.take(INDEX), (3,)),
    "scatter multiply": ("scatter", lambda a: torch.ones(3).scatter(0, INDEX, a.detach(), reduce="multiply"), (3,)),
    "scatter_reduce prod": (
        "scatter_reduce",
        lambda a: torch.ones(3).scatter_reduce(0, INDEX, a.detach(), "prod"),
        (3,),
    ),
    "scatter_reduce_ prod": (
        "scatter_reduce",
        lambda a: torch.ones(3).scatter_reduce_(0, INDEX, a.detach(), "prod"),
        (3,),
    ),
    "index_reduce": ("index_reduce", lambda a: torch.ones(3).index_reduce(0, INDEX, a.detach(), "mean"), (3,)),
    "index_reduce_": ("index_reduce", lambda a: torch.ones(3).index_reduce_(0, INDEX, a.detach(), "amax"), (3,)),
    "median": ("median", lambda a: a.median(0), (3,)),
    "nanmedian": ("nanmedian", lambda a: a.nanmedian(dim=0), (3,)),
    "histc": ("histc", lambda a: a.detach().histc(4), (3,)),
    "bincount": ("bincount", lambda a: INDEX.bincount(weights=a.detach()), (3,)),
}


@pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter", "ignore:index_reduce")  # of torch
@pytest.mark.parametrize("case", RAISES)
def test_what_raises_on_a_gpu_is_found_with_its_module(case: str) -> None:
    name, function, shape = RAISES[case]

    (found,) = found_in(function, *shape)

    where = "" if case == "take" else " in model.part"  # a backward pass has no module, and that of take is put_
    instead = OPERATORS[name].instead
    assert found == f"{name}{where}" + (f" (instead: {instead})" if instead else "")


def test_each_operator_of_the_table_is_run() -> None:
    assert {name for name, *_ in RAISES.values()} == OPERATORS.keys()


HARMLESS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "AdaptiveAvgPool1d to 1": (nn.AdaptiveAvgPool1d(1), (1, 2, 4)),
    "AdaptiveAvgPool2d to 1": (nn.AdaptiveAvgPool2d((1, 1)), (1, 2, 4, 4)),
    "AdaptiveAvgPool3d to 1": (nn.AdaptiveAvgPool3d(1), (1, 2, 4, 4, 4)),
    "AdaptiveMaxPool3d": (nn.AdaptiveMaxPool3d(2), (1, 2, 4, 4, 4)),
    "AvgPool2d": (nn.AvgPool2d(2), (1, 2, 4, 4)),
    "MaxPool2d": (nn.MaxPool2d(2), (1, 2, 4, 4)),
    "interpolate nearest": (nn.Upsample(scale_factor=2), (1, 2, 4, 4)),
    "interpolate bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 4, 4)),
    "interpolate trilinear": (nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 4, 4, 4)),
    "ReflectionPad2d": (nn.ReflectionPad2d(1), (1, 2, 4, 4)),
    "ReplicationPad1d": (nn.ReplicationPad1d(1), (1, 2, 4)),
    "ReplicationPad2d": (nn.ReplicationPad2d(1), (1, 2, 4, 4)),
    "ReplicationPad3d": (nn.ReplicationPad3d(1), (1, 2, 4, 4, 4)),
    "CTCLoss that may be cuDNN's": (lambda a: ctc(a, target_shape=(4,)), (4, 2, 3)),
    "Embedding": (lambda a: F.embedding(INDEX, a), (2, 3)),
    "EmbeddingBag mean": (lambda a: F.embedding_bag(INDEX[None], a, mode="mean"), (2, 3)),
    "NLLLoss": (lambda a: F.cross_entropy(a, INDEX), (3, 2)),
    "NLLLoss of pixels by terms": (
        lambda a: F.cross_entropy(a, INDEX[None, None] * 0, reduction="none"),
        (1, 2, 1, 3),
    ),
    "index_put": (lambda a: torch.zeros(3).index_put((INDEX,), a, accumulate=True), (3,)),
    "index_add": (lambda a: torch.zeros(3).index_add(0, INDEX, a), (3,)),
    "index_select": (lambda a: a.index_select(0, INDEX), (3,)),
    "gather": (lambda a: a.gather(0, INDEX), (3,)),
    "scatter": (lambda a: torch.zeros(3).scatter(0, INDEX, a), (3,)),
    "scatter_add": (lambda a: torch.zeros(3).scatter_add(0, INDEX, a), (3,)),
    "scatter_reduce sum": (lambda a: torch.zeros(3).scatter_reduce(0, INDEX, a, "sum"), (3,)),
    "cumsum": (lambda a: a.cumsum(0), (3,)),
    "median of all": (lambda a: a.median(), (3,)),
    "kthvalue": (lambda a: a.kthvalue(2, 0), (3,)),
    "sort": (lambda a: a.sort(), (3,)),
    "bincount": (lambda _: INDEX.bincount(), (3,)),
    "attention": (lambda a: F.scaled_dot_product_attention(a, a, a), (1, 2, 4, 4)),
    "LSTM": (nn.LSTM(4, 4), (3, 2, 4)),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_deterministic_on_a_gpu_is_not_found(case: str) -> None:
    function, shape = HARMLESS[case]

    assert found_in(function, *shape) == ()


def test_without_a_gradient_a_backward_pass_is_not_run() -> None:
    assert found_in(lambda inputs: F.adaptive_avg_pool2d(inputs.detach(), 2), 1, 2, 4, 4) == ()


def test_modules_are_named_once_each_in_the_order_they_run() -> None:
    pool = nn.AdaptiveAvgPool2d(2)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), pool, nn.Sequential(nn.AdaptiveAvgPool2d(3), pool))
    frozen = nn.AdaptiveAvgPool2d(4)
    loss = nn.NLLLoss()
    watch = OperatorWatch(TRAIN, CPU)
    with watch.over([("model", model), ("model", frozen), ("loss", loss)]):
        output = model(frozen(x(1, 2, 4, 4).detach()))
        loss(output, torch.zeros(1, 2, 2, dtype=torch.long)).backward()
        output.detach().median(0)

    assert [text.partition(" (")[0] for text in watch.found()] == [
        "nll_loss2d_forward in loss",
        "_adaptive_avg_pool2d_backward in model.1, model.2.0",
        "median",
    ]


def test_a_module_that_raises_ends() -> None:
    watch = OperatorWatch(TRAIN, CPU)
    with watch.over([("model", nn.Linear(2, 2))]), pytest.raises(RuntimeError):
        nn.Linear(3, 2)(x(1, 2))
    with watch.over([]):
        x(3).median(0)

    assert watch.found() == ("median (instead: sort)",)


def test_nothing_is_watched_where_nothing_raises() -> None:
    assert found_in(nn.AdaptiveAvgPool2d(2), 1, 2, 4, 4, train=TrainSpec(global_batch=4, deterministic=False)) == ()


def test_what_a_compiled_model_runs_otherwise_is_not_found_in_it() -> None:
    compiled = TrainSpec(global_batch=4, compile=True)
    assert found_in(nn.ReflectionPad1d(1), 1, 2, 4, train=compiled) == ()
    assert len(found_in(nn.AdaptiveAvgPool2d(2), 1, 2, 4, 4, train=compiled)) == 1
    watch = OperatorWatch(compiled, CPU)
    with watch.over([("model", nn.Identity())]):  # a loss function
        F.nll_loss(x(1, 2, 1, 3), INDEX[None, None] * 0)
    assert len(watch.found()) == 1


def test_each_is_one_that_torchs_cuda_library_names() -> None:
    libraries = Path(torch.__file__).parent / "lib"
    if not (libraries / "libtorch_cuda.so").exists():
        pytest.skip("this torch is built without CUDA")
    named = {name for operator in OPERATORS.values() for name in operator.on_gpu}
    for library in ("libtorch_cuda.so", "libtorch_cpu.so"):
        with open(libraries / library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            named -= {name for name in named if content.find(f"{name}\0".encode()) >= 0}

    assert named == set()


def test_an_operator_that_raises_is_told_by_the_name_that_it_has_here() -> None:
    watch = OperatorWatch(TRAIN, CPU)
    with watch.over([("model", Runs(nn.AdaptiveMaxPool2d(1), 1, 2, 4, 4))]):
        F.adaptive_max_pool2d(x(1, 2, 4, 4), 1).sum().backward()

    assert watch.describe("adaptive_max_pool2d_backward_cuda").startswith("adaptive_max_pool2d_backward (instead: max")
    assert watch.describe("a_new_one_cuda") == "a_new_one_cuda"


def test_what_torch_says_of_one_is_recognised() -> None:
    pooled, indices = F.max_pool2d(x(1, 1, 2, 2).detach(), 2, return_indices=True)
    with pytest.raises(RuntimeError) as caught:
        F.max_unpool2d(pooled, indices, 2)

    assert refused_operator(caught.value) in OPERATORS["max_unpool2d"].on_gpu
    assert refused_operator(RuntimeError("another")) == ""
    assert refused_operator(ValueError(str(caught.value))) == ""
    assert refusal("median in model.1", "GPUs") == (
        "train.deterministic: torch has no deterministic implementation on GPUs of median in model.1; replace it, or "
        "give up equal bits in every run with train.deterministic: false"
    )
