"""Warm starts: load weights from another run, a checkpoint or a safetensors file into a model, by name.

A warm start reads the weights (on rank 0), matches them with the model (changes nothing; an error says what does not
fit) and loads them in place, because the optimizer already holds the parameters. Nothing is ever unpickled.
``jobs/training/restore.py`` decides when a run starts with such weights, and sends them to the other ranks.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from cluster.errors import CheckpointError, DescriptionError, listed, nearest
from cluster.run.checkpoints import Checkpoints
from cluster.run.manifest import Manifest
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import MissingObject, Store
from jobs.checkpoint.layout import WEIGHTS_FILES, decode_weights
from jobs.components.averaging import MovingAverage
from jobs.spec import InitSpec

_SAFETENSORS = ".safetensors"
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
_STEP_FOLDER = re.compile(r"step-([0-9]{8,18})")
_MOST_PATTERNS = 8
"""The most patterns that an error suggests; a longer list helps nobody."""


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """The exact bytes that weights were read from."""

    url: str
    """The URL of one checkpoint or one file."""
    sha256: str
    """The SHA-256 of the file that holds the weights."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that a source holds."""

    source: WeightsSource
    tensors: Mapping[str, Tensor]
    """By their names in the source."""
    passed_over: tuple[str, ...] = ()
    """The defects of newer checkpoints of the run, which were not used."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Which tensors are loaded and which are not."""

    source: WeightsSource
    loaded: tuple[str, ...]
    """Names in the model whose tensors are loaded from the source."""
    kept: tuple[str, ...]
    """Names in the model whose tensors keep their initial values."""
    unused: tuple[str, ...]
    """Names in the source that no tensor of the model is loaded from."""
    passed_over: tuple[str, ...]
    """The defects of newer checkpoints of the run, which were not used."""


def read_weights(spec: InitSpec, planned: WeightsSource | None = None) -> Weights:
    """Reads and verifies the weights that ``spec`` names.

    Args:
        spec: ``init_from`` of the description.
        planned: What the plan read. The same bytes are read again, even if the run has made newer checkpoints since.

    Raises:
        DescriptionError: The source is a pickle, or ``ema`` is asked of a source without averaged weights.
        CheckpointError: No checkpoint is good, the file is damaged, or its bytes are not those that the plan read.
        StorageError: Nothing is at the URL, or the store does not answer.
    """
    url = Store(spec.url if planned is None else planned.url).url
    name = url.rpartition("/")[2]
    if name.lower().endswith(_PICKLED):
        raise DescriptionError(
            f"init_from.url {url} is a pickle, which can run any code when it is read; "
            "convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')"
        )
    if name.endswith(_SAFETENSORS):
        weights = _read_file(url, name, spec)
    elif folder := _STEP_FOLDER.fullmatch(name):
        manifest, files = Checkpoints(Store(url.removesuffix(name))).read(int(folder[1]), [WEIGHTS_FILES[spec.weights]])
        weights = _from_checkpoint(url, manifest, files, spec)
    else:
        weights = _read_run(RunDirectory(url), spec)
    if planned is not None and weights.source != planned:
        raise CheckpointError(
            f"{url}: holds other weights than when the run was planned, its SHA-256 differs; "
            "restore it, or begin a run of another name"
        )
    return weights


def match_weights(model: nn.Module, spec: InitSpec, weights: Weights) -> LoadReport:
    """Returns which tensors of the model are loaded; changes nothing.

    Raises:
        DescriptionError: A wanted tensor is missing in the source, or has another shape or kind of type; tied tensors
            conflict; or a pattern matches nothing.
    """
    here = _tensors(model)
    _check_patterns("init_from.include", spec.include, here)
    _check_patterns("init_from.exclude", spec.exclude, here)
    wanted = [name for name in here if _matches(name, spec.include) and not _matches(name, spec.exclude)]
    if not wanted:
        raise DescriptionError("init_from.exclude leaves no tensor to load; narrow it, or leave init_from out")
    there = weights.tensors
    origins = {name: _origin(name, tied, wanted, there) for tied in _tied(here) for name in tied if name in wanted}
    if not any(origins.values()):
        raise DescriptionError(
            f"init_from: {weights.source.url} has none of the tensors wanted, {listed(wanted)}; "
            f"it has {listed(list(there)) or 'no tensor at all'}; save them under the model's own names"
        )
    misfits = {
        name: misfit for name in wanted if (misfit := _misfit(here[name], there.get(origins[name] or ""))) is not None
    }
    if misfits:
        verb = "tensor of {} does" if len(misfits) == 1 else "tensors of {} do"
        raise DescriptionError(
            f"init_from: {len(misfits)} {verb.format(weights.source.url)} not fit: "
            f"{listed([f'{name} is {misfit}' for name, misfit in misfits.items()])}; {_advice(misfits, wanted, spec)}"
        )
    return LoadReport(
        source=weights.source,
        loaded=tuple(wanted),
        kept=tuple(name for name in here if name not in origins),
        unused=tuple(sorted(name for name in there if name not in origins)),
        passed_over=weights.passed_over,
    )


def load_weights(model: nn.Module, ema: MovingAverage | None, weights: Weights, report: LoadReport) -> None:
    """Copies the tensors that the report lists into the model, and the model into ``ema``.

    Shapes: each tensor has the shape of its namesake in the model; ``match_weights`` has checked it.
    """
    # The source may lack some of the tied names: these share the tensor of a name that it has.
    loaded = {name: weights.tensors[name] for name in report.loaded if name in weights.tensors}
    model.load_state_dict({**model.state_dict(), **loaded})
    if ema is not None:
        ema.copy_from(model)


# --- Reading ---


def _read_file(url: str, name: str, spec: InitSpec) -> Weights:
    if spec.weights == "ema":
        raise DescriptionError(
            f"init_from.weights ema needs a run or a checkpoint that keeps averaged weights, got the file {url}; "
            "leave weights out to take the file's own"
        )
    data = Store(url.removesuffix(name)).read(name)
    return Weights(WeightsSource(url, hashlib.sha256(data).hexdigest()), _decode(data, url, spec))


def _read_run(run: RunDirectory, spec: InitSpec) -> Weights:
    passed_over: list[str] = []
    found = run.checkpoints.newest_good(lambda _, error: passed_over.append(str(error)), [WEIGHTS_FILES[spec.weights]])
    if found is not None:
        manifest, files = found
        return _from_checkpoint(run.checkpoints.url(manifest.step), manifest, files, spec, tuple(passed_over))
    if passed_over:
        raise CheckpointError(f"{run.url}: no checkpoint is good; the newest, {passed_over[0]}")
    if run.exists():
        raise CheckpointError(f"{run.url}: has no checkpoint; train it first, or name another run")
    raise MissingObject(f"{run.url}: is no run, no checkpoint and no {_SAFETENSORS} file; check the URL")


def _from_checkpoint(
    url: str, manifest: Manifest, files: Mapping[str, bytes], spec: InitSpec, passed_over: tuple[str, ...] = ()
) -> Weights:
    file = WEIGHTS_FILES[spec.weights]
    if file not in files:
        raise DescriptionError(
            f"init_from.weights ema needs a run that keeps averaged weights, and {url} has none; "
            "write model, or name a run with train.ema_decay"
        )
    tensors = _decode(files[file], url, spec)
    return Weights(WeightsSource(url, manifest.files[file].sha256), tensors, passed_over)


def _decode(data: bytes, url: str, spec: InitSpec) -> dict[str, Tensor]:
    try:
        return decode_weights(data, spec.weights)
    except CheckpointError as error:
        raise CheckpointError(f"{url}: {error}") from error


# --- Matching ---


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name, as the objects themselves: tied names have the same object."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _tied(tensors: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """Returns the names of each tensor; a tied tensor has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return names.values()


def _origin(name: str, tied: Sequence[str], wanted: Sequence[str], there: Mapping[str, Tensor]) -> str | None:
    """Returns the name in the source to load a tensor from: its own, or a tied one; None if the source has neither."""
    if unwanted := [other for other in tied if other not in wanted]:
        raise DescriptionError(
            f"init_from takes {name} and leaves {unwanted[0]}, which are tied: one tensor; take or exclude both"
        )
    found = [other for other in tied if other in there]
    if any(not _same(there[found[0]], there[other]) for other in found):
        raise DescriptionError(
            f"init_from: {' and '.join(found)} are tied here, one tensor, and differ there; "
            "exclude them, or untie them in the model"
        )
    return name if name in found else next(iter(found), None)


def _same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def _misfit(here: Tensor, there: Tensor | None) -> str | None:
    """Returns how two tensors differ in shape or in kind of type, which no conversion mends; None if they fit."""
    if there is None:
        return f"{list(here.shape)} here and absent there"
    if here.shape != there.shape:
        return f"{list(here.shape)} here and {list(there.shape)} there"
    if _kind(here) != _kind(there):
        return f"{here.dtype} here and {there.dtype} there".replace("torch.", "")
    return None


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    """Returns the kind of a tensor's type: within a kind, loading converts the numbers."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def _check_patterns(key: str, patterns: Sequence[str], names: Mapping[str, Tensor]) -> None:
    for number, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DescriptionError(
                f"{key}[{number}] matches no tensor of the model, got {pattern!r}{nearest(pattern, names)}; "
                f"the model has {listed(list(names), most=4)}"
            )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _advice(misfits: Iterable[str], wanted: Sequence[str], spec: InitSpec) -> str:
    """Returns what to write to leave misfits out: the pattern of a module where all of its tensors misfit."""
    patterns = list(spec.exclude)
    for name in misfits:
        module = f"{name.rpartition('.')[0]}.*" if "." in name else name
        whole = all(other in misfits for other in wanted if fnmatchcase(other, module))
        pattern = module if whole else name
        if pattern not in patterns:
            patterns.append(pattern)
    if len(patterns) > _MOST_PATTERNS:
        return "name other weights, or the same model"
    return f"to begin with random ones there, write init_from.exclude: [{', '.join(patterns)}]"
