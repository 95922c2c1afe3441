"""What a warm start takes from where, and what it refuses."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cluster.errors import CheckpointError, DescriptionError, LauncherError, StorageError
from cluster.run.checkpoints import Checkpoints
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from jobs.checkpoint.warm_start import LoadReport, Weights, WeightsSource, load_weights, match_weights, read_weights
from jobs.components.averaging import MovingAverage
from jobs.spec import InitSpec
from tests import saved
from tests.states import encode


class Net(nn.Module):
    """Parameters and buffers, floats and integers."""

    def __init__(self, num_classes: int = 2, width: int = 3) -> None:
        super().__init__()
        self.body = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, num_classes)


class TiedNet(nn.Module):
    """One tensor under two names, as an embedding and the layer that undoes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.decode = nn.Linear(3, 5)
        self.decode.weight = self.embed.weight


NET = ("body.weight", "body.bias")
NORM = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
HEAD = ("head.weight", "head.bias")


def held(model: nn.Module, **others: Tensor) -> dict[str, Tensor]:
    own = copy.deepcopy(dict(model.state_dict()))
    return own | {name.replace("__", "."): tensor for name, tensor in others.items()}


def weights(tensors: dict[str, Tensor]) -> Weights:
    return Weights(WeightsSource("s3://runs/digits/checkpoints/step-00000220", "0" * 64), tensors)


def match(model: nn.Module, tensors: dict[str, Tensor], **spec: Any) -> LoadReport:
    return match_weights(model, InitSpec(url="s3://runs/digits", **spec), weights(tensors))


def load(model: nn.Module, tensors: dict[str, Tensor], ema: MovingAverage | None = None, **spec: Any) -> LoadReport:
    report = match(model, tensors, **spec)
    load_weights(model, ema, weights(tensors), report)
    return report


# --- Matching ---

MATCHES = {
    "everything": ({}, {}, (NET + NORM + HEAD, (), ())),
    "without the head": ({"num_classes": 10}, {"exclude": ("head.*",)}, (NET + NORM, HEAD, HEAD)),
    "the body alone": ({"num_classes": 10}, {"include": ("body.*",)}, (NET, NORM + HEAD, NORM + HEAD)),
    "several patterns": (
        {},
        {"include": ("body.*", "head.*"), "exclude": ("*.bias",)},
        (("body.weight", "head.weight"), ("body.bias", *NORM, "head.bias"), ("body.bias", *NORM, "head.bias")),
    ),
    "weights without buffers": (
        {},
        {"exclude": ("*.running_*", "*.num_batches_tracked")},
        (NET + NORM[:2] + HEAD, NORM[2:], NORM[2:]),
    ),
}


@pytest.mark.parametrize("name", MATCHES)
def test_what_is_loaded_kept_and_unused(name: str) -> None:
    there, spec, (loaded, kept, unused) = MATCHES[name]
    model, source = Net(), Net(**there)
    source.norm.num_batches_tracked += 7
    nn.init.normal_(source.norm.running_mean)
    before = held(model)

    report = load(model, held(source), **spec)

    assert (report.loaded, report.kept, report.unused) == (loaded, kept, tuple(sorted(unused)))
    after = held(model)
    assert all(after[name].equal(held(source)[name]) for name in loaded)
    assert all(after[name].equal(before[name]) for name in kept)


URL = "s3://runs/digits/checkpoints/step-00000220"
THE_NET = "body.weight, body.bias, norm.weight, norm.bias and 5 more"
MISMATCHES: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "shapes": (
        held(Net(num_classes=10)),
        {},
        f"init_from: 2 tensors of {URL} do not fit: head.weight is [2, 3] here and [10, 3] there, "
        "head.bias is [2] here and [10] there; to begin with random ones there, write init_from.exclude: [head.*]",
    ),
    "one shape, beside what is excluded": (
        held(Net(), head__bias=torch.ones(10)),
        {"exclude": ("norm.*",)},
        f"init_from: 1 tensor of {URL} does not fit: head.bias is [2] here and [10] there; "
        "to begin with random ones there, write init_from.exclude: [norm.*, head.bias]",
    ),
    "absent": (
        {name: tensor for name, tensor in held(Net()).items() if name not in ("norm.running_var", *HEAD)},
        {},
        f"init_from: 3 tensors of {URL} do not fit: norm.running_var is [3] here and absent there, "
        "head.weight is [2, 3] here and absent there, head.bias is [2] here and absent there; "
        "to begin with random ones there, write init_from.exclude: [norm.running_var, head.*]",
    ),
    "a float for an integer": (
        held(Net(), norm__num_batches_tracked=torch.tensor(1.0)),
        {},
        f"init_from: 1 tensor of {URL} does not fit: norm.num_batches_tracked is int64 here and float32 there; "
        "to begin with random ones there, write init_from.exclude: [norm.num_batches_tracked]",
    ),
    "a truth value for an integer": (
        held(Net(), norm__num_batches_tracked=torch.tensor(True)),
        {},
        f"init_from: 1 tensor of {URL} does not fit: norm.num_batches_tracked is int64 here and bool there; "
        "to begin with random ones there, write init_from.exclude: [norm.num_batches_tracked]",
    ),
    "a scalar for a vector": (
        held(Net(), head__bias=torch.tensor(1.0)),
        {},
        f"init_from: 1 tensor of {URL} does not fit: head.bias is [2] here and [] there; "
        "to begin with random ones there, write init_from.exclude: [head.bias]",
    ),
    "other names": (
        {f"module.{name}": tensor for name, tensor in held(Net()).items()},
        {"exclude": ("norm.*",)},
        f"init_from: {URL} has none of the tensors wanted, body.weight, body.bias, head.weight, head.bias; "
        "it has module.body.weight, module.body.bias, module.norm.weight, module.norm.bias, "
        "module.norm.running_mean, module.norm.running_var, module.norm.num_batches_tracked, module.head.weight "
        "and 1 more; save them under the model's own names",
    ),
    "nothing there": (
        {},
        {"include": ("head.bias",)},
        f"init_from: {URL} has none of the tensors wanted, head.bias; it has no tensor at all; "
        "save them under the model's own names",
    ),
    "a spelling": (
        held(Net()),
        {"exclude": ("norm.*", "heed.bias")},
        "init_from.exclude[1] matches no tensor of the model, got 'heed.bias' (did you mean 'head.bias'?); "
        f"the model has {THE_NET}",
    ),
    "another model's name": (
        held(Net(), fc__weight=torch.ones(1)),
        {"include": ("fc.*",)},
        f"init_from.include[0] matches no tensor of the model, got 'fc.*'; the model has {THE_NET}",
    ),
    "everything excluded": (
        held(Net()),
        {"exclude": ("*",)},
        "init_from.exclude leaves no tensor to load; narrow it, or leave init_from out",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_does_not_fit_is_named(name: str) -> None:
    tensors, spec, message = MISMATCHES[name]
    model = Net()
    before = held(model)
    with pytest.raises(DescriptionError) as caught:
        load(model, tensors, **spec)
    assert str(caught.value) == message
    assert all(tensor.equal(before[name]) for name, tensor in held(model).items())


def test_many_mismatches_are_shortened() -> None:
    layers = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    wider = nn.Sequential(*[nn.Linear(3, 3) for _ in range(20)])
    with pytest.raises(DescriptionError) as caught:
        match(layers, held(wider))
    message = str(caught.value)
    assert message.startswith(f"init_from: 40 tensors of {URL} do not fit: 0.weight is [2, 2] here and [3, 3] there, ")
    assert message.endswith("3.bias is [2] here and [3] there and 32 more; name other weights, or the same model")


@pytest.mark.parametrize("there", [torch.float16, torch.bfloat16, torch.float64])
def test_float_widths_are_converted(there: torch.dtype) -> None:
    model, source = Net(), held(Net())
    load(model, {name: t.to(there) if t.is_floating_point() else t for name, t in source.items()})
    assert model.head.weight.dtype == torch.float32
    assert model.head.weight.equal(source["head.weight"].to(there).float())


# --- Loading ---


def test_the_optimizer_and_the_memory_layout_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    source = nn.Sequential(nn.Conv2d(3, 4, 3))
    parameters = list(model.parameters())
    load(model, held(source))
    assert [id(parameter) for parameter in parameters] == list(map(id, model.parameters()))
    assert all(parameter.requires_grad for parameter in parameters)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.equal(source[0].weight)


def test_the_average_begins_at_the_loaded_weights() -> None:
    model, source = Net(), Net()
    nn.init.normal_(source.norm.running_mean)
    ema = MovingAverage(model, 0.9)
    load(model, held(source), ema, exclude=("head.*",))
    assert all(tensor.equal(held(model)[name]) for name, tensor in held(ema.module).items())
    assert ema.module.norm.running_mean.equal(source.norm.running_mean)


TIED = held(TiedNet())
UNTIED = {**TIED, "decode.weight": torch.ones(5, 3)}


@pytest.mark.parametrize("absent", [None, "decode.weight", "embed.weight"])
def test_tied_tensors_need_one_of_their_names(absent: str | None) -> None:
    model = TiedNet()
    report = load(model, {name: tensor for name, tensor in TIED.items() if name != absent})
    assert set(report.loaded) == {"embed.weight", "decode.weight", "decode.bias"}
    assert (report.kept, report.unused) == ((), ())
    assert model.embed.weight is model.decode.weight
    assert model.embed.weight.equal(TIED["embed.weight"])


@pytest.mark.parametrize(
    ("tensors", "spec", "message"),
    [
        (
            TIED,
            {"exclude": ("decode.weight",)},
            "init_from takes embed.weight and leaves decode.weight, which are tied: one tensor; take or exclude both",
        ),
        (
            UNTIED,
            {},
            "init_from: embed.weight and decode.weight are tied here, one tensor, and differ there; "
            "exclude them, or untie them in the model",
        ),
        (
            {"decode.weight": torch.ones(6, 3), "decode.bias": torch.ones(5)},
            {},
            f"init_from: 2 tensors of {URL} do not fit: embed.weight is [5, 3] here and [6, 3] there, "
            "decode.weight is [5, 3] here and [6, 3] there; "
            "to begin with random ones there, write init_from.exclude: [embed.*, decode.weight]",
        ),
    ],
    ids=["one of the two", "differ there", "another shape"],
)
def test_tied_tensors_are_one(tensors: dict[str, Tensor], spec: dict[str, Any], message: str) -> None:
    with pytest.raises(DescriptionError) as caught:
        match(TiedNet(), tensors, **spec)
    assert str(caught.value) == message


# --- Reading ---


@dataclass(frozen=True)
class Run:
    """A run in a store, with the weights of each of its steps."""

    url: str
    models: dict[int, Net]

    @property
    def store(self) -> Store:
        return Store(self.url)

    def weights_at(self, step: int) -> bytes:
        return RunDirectory(self.url).checkpoints.read(step)[1]["model.safetensors"]

    def damage(self, step: int) -> None:
        (part,) = RunDirectory(self.url).checkpoints.manifest(step).files["model.safetensors"].parts
        data = self.store.read(f"checkpoints/{part.object}")
        self.store.write(f"checkpoints/{part.object}", data[:-1] + bytes([data[-1] ^ 1]))


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "folder" else f"memory://{tmp_path.name}"


@pytest.fixture
def run(place: str) -> Run:
    run = RunDirectory(f"{place}/runs/digits")
    run.write_job("name: digits\n")
    models = {step: Net() for step in (10, 20)}
    for step, model in models.items():
        save(run.checkpoints, step, model)
    return Run(run.url, models)


def save(checkpoints: Checkpoints, step: int, model: nn.Module, ema: MovingAverage | None = None) -> None:
    average = None if ema is None else ema.state_dict()
    state = {"model": model.state_dict(), "optimizer": {}, "scheduler": {}, "ema": average}
    saved.save(checkpoints, step, encode(state))


def read(url: str, planned: WeightsSource | None = None, **spec: Any) -> Weights:
    return read_weights(InitSpec(url=url, **spec), planned)


def holds(found: Weights, model: nn.Module) -> bool:
    expected = held(model)
    return found.tensors.keys() == expected.keys() and all(
        found.tensors[name].equal(expected[name]) for name in expected
    )


@pytest.mark.parametrize(
    ("below", "step"),
    [("", 20), ("/", 20), ("/checkpoints/step-00000010", 10), ("/checkpoints/step-00000020/", 20)],
)
def test_a_run_or_one_of_its_checkpoints(run: Run, below: str, step: int) -> None:
    found = read(run.url + below)
    assert holds(found, run.models[step])
    assert found.source.url == f"{run.url}/checkpoints/step-{step:08d}"
    assert found.passed_over == ()


def test_a_file(run: Run, place: str) -> None:
    Store(place).write("net.safetensors", run.weights_at(10))
    found = read(f"{place}/net.safetensors")
    assert holds(found, run.models[10])
    assert found.source == WeightsSource(
        f"{place}/net.safetensors", read(f"{run.url}/checkpoints/step-00000010").source.sha256
    )


def test_a_file_beside_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "net.safetensors")
    monkeypatch.chdir(tmp_path)
    assert holds(read("net.safetensors"), model)
    assert holds(read(f"file://{tmp_path}/net.safetensors"), model)


def test_a_bad_newest_checkpoint_is_passed_over_and_told_of(run: Run) -> None:
    run.damage(20)
    found = read(run.url)
    assert holds(found, run.models[10])
    assert found.source.url.endswith("/step-00000010")
    (defect,) = found.passed_over
    assert re.search(r"step-00000020: model-\w+-00000.safetensors has other bytes than were written", defect)
    report = match_weights(Net(), InitSpec(url=run.url), found)
    assert (report.source, report.passed_over) == (found.source, found.passed_over)


def test_averaged_weights(place: str) -> None:
    run, model = RunDirectory(f"{place}/averaged"), Net()
    ema = MovingAverage(model, 0.9)
    nn.init.normal_(ema.module.head.weight)
    save(run.checkpoints, 5, model, ema)
    averaged, trained = read(run.url, weights="ema"), read(run.url)
    assert holds(averaged, ema.module)
    assert holds(trained, model)
    assert averaged.source.url == trained.source.url
    assert averaged.source.sha256 != trained.source.sha256


def test_what_was_planned_is_read_though_the_run_went_on(run: Run) -> None:
    planned = read(run.url).source
    save(RunDirectory(run.url).checkpoints, 30, Net())
    assert holds(read(run.url, planned), run.models[20])


def test_what_was_planned_and_has_changed_is_refused(run: Run) -> None:
    planned = read(run.url).source
    save(RunDirectory(run.url).checkpoints, 20, Net())
    with pytest.raises(CheckpointError, match=r"/step-00000020: holds other weights than when the run was planned"):
        read(run.url, planned)


def _all_bad(run: Run) -> str:
    run.damage(10)
    run.damage(20)
    return run.url


def _damaged(run: Run) -> str:
    run.damage(10)
    return f"{run.url}/checkpoints/step-00000010"


def _without_checkpoints(run: Run) -> str:
    empty = RunDirectory(f"{run.url}-2")
    empty.write_job("name: digits-2\n")
    return empty.url


def _broken_file(run: Run) -> str:
    run.store.write("net.safetensors", run.weights_at(10)[:-9])
    return f"{run.url}/net.safetensors"


REFUSED: dict[str, tuple[Any, dict[str, Any], type[LauncherError], str]] = {
    "no run": (lambda run: f"{run.url}s", {}, StorageError, "digitss: is no run, no checkpoint and no .safetensors f"),
    "no file": (lambda run: f"{run.url}/a.safetensors", {}, StorageError, "digits: holds no a.safetensors; check the"),
    "no such checkpoint": (
        lambda run: f"{run.url}/checkpoints/step-00000015",
        {},
        CheckpointError,
        "step-00000015: its manifest is missing",
    ),
    "no checkpoint yet": (_without_checkpoints, {}, CheckpointError, "digits-2: has no checkpoint; train it first"),
    "no good checkpoint": (
        _all_bad,
        {},
        CheckpointError,
        r"digits: no checkpoint is good; the newest, .*/step-00000020",
    ),
    "a bad checkpoint": (_damaged, {}, CheckpointError, r"step-00000010: model-\w+-00000.safetensors has other"),
    "a torn file": (
        _broken_file,
        {},
        CheckpointError,
        "net.safetensors: is no whole safetensors file, the tensors have",
    ),
    "a pickle": (
        lambda run: f"{run.url}/resnet50.PTH",
        {},
        DescriptionError,
        r"init_from.url .*/resnet50.PTH is a pickle, which can run any code when it is read; convert it: safetensors",
    ),
    "no average": (
        lambda run: run.url,
        {"weights": "ema"},
        DescriptionError,
        "init_from.weights ema needs a run that keeps averaged weights, and .*/step-00000020 has none; write model",
    ),
    "the average of a file": (
        lambda run: f"{run.url}/net.safetensors",
        {"weights": "ema"},
        DescriptionError,
        "init_from.weights ema needs a run or a checkpoint that keeps averaged weights, got the file .*/net.saf",
    ),
    "no such protocol": (lambda _: "s4://b/run", {}, StorageError, "s4://b/run: unknown protocol 's4'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_source_that_cannot_be_read(run: Run, name: str) -> None:
    url_in, spec, error, message = REFUSED[name]
    with pytest.raises(error) as caught:
        read(url_in(run), **spec)
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
