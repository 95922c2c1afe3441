"""Export the weights of a checkpoint as safetensors, or the model with its weights as ONNX.

The file is read back and compared before the export succeeds. This module imports torch.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from cluster.errors import CheckpointError, DescriptionError, StorageError, one_line
from cluster.host.import_paths import search_last
from cluster.run.manifest import Manifest
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from jobs.checkpoint.layout import TRAINING_FILES, WEIGHTS_FILES, decode_buffers, decode_weights
from jobs.components.build import build_parts
from jobs.data.loader import KeyedDataset
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from jobs.spec import JobSpec
from launcher.code.user_code import find_code
from launcher.config.description import named_errors, parse
from launcher.runs.environment import recorded_indexes
from launcher.runs.rewind import checkpoint_at

Which = Literal["model", "ema"]

_SAMPLES = 3
"""The ONNX model is traced with a batch of two samples and checked with three, so a fixed batch size is noticed."""
_TOLERANCE = 1e-4
"""Largest difference between torch and onnxruntime, as a share of the largest output. Their kernels add in different
orders, so float32 rounding (6e-8 a sum) differs and accumulates over the layers; 1e-4 leaves room for a hundred layers,
and a wrong weight, layer or input causes far more."""
_TOLERANCE_16_BIT = 2e-2
"""The same for outputs with 8 or 11 significant bits: bfloat16 and float16."""


@dataclass(frozen=True, slots=True)
class ExportSource:
    """Weights and the checkpoint that they come from."""

    run: RunDirectory
    manifest: Manifest
    which: Which
    tensors: Mapping[str, Tensor]
    """By parameter or buffer name."""
    unsaved_buffers: Mapping[str, Mapping[str, Tensor | None]]
    """Changed buffers that are not among the tensors, by root and name; read for ONNX alone."""


@dataclass(frozen=True, slots=True)
class ExportFile:
    """The file to write."""

    folder: Store
    name: str

    @property
    def url(self) -> str:
        """The URL of the file."""
        return f"{self.folder.url.rstrip('/')}/{self.name}"


def export(run: RunDirectory, *, to: str | None, at: int | None, which: Which, force: bool) -> dict[str, Any]:
    """Write the weights of a checkpoint to a file.

    Args:
        run: The run.
        to: A path or URL ending in ``.safetensors`` or ``.onnx``; None: ``RUN.safetensors`` in the working directory.
        at: The step of the checkpoint; None: the newest good one.
        which: The trained weights, or their moving average.
        force: Overwrite an existing file.

    Returns:
        The ``--json`` document: what was written.

    Raises:
        DescriptionError: The file exists or has another suffix, the run keeps no average, or its model cannot be
            exported as ONNX.
        CheckpointError: There is no such checkpoint, it is bad, or it does not fit the description.
        StorageError: The file reads back with other bytes than were written.
    """
    target = _target(to or f"{run.name}.safetensors", force)
    is_onnx = target.name.endswith(".onnx")
    if is_onnx:
        _require_onnx()
    source = _read(run, at, which, is_onnx=is_onnx)
    about = {
        "run": run.url,
        "step": source.manifest.step,
        "weights": which,
        "state_sha256": source.manifest.state_sha256,
    }
    if is_onnx:
        data, checked = _to_onnx(source, about)
    else:
        metadata = {name: str(value) for name, value in about.items()} | {"format": "pt"}
        data, checked = safetensors.torch.save(dict(source.tensors), metadata), {}
    target.folder.write(target.name, data)
    back = target.folder.read(target.name)
    if not (back == data if is_onnx else _equal(source.tensors, safetensors.torch.load(back))):
        raise StorageError(f"{target.url}: holds other bytes than were written; write it elsewhere")
    return about | {"to": target.url, "bytes": len(data), "tensors": len(source.tensors), **checked}


def _target(to: str, force: bool) -> ExportFile:
    folder, slash, name = to.rpartition("/")
    if not name.endswith((".safetensors", ".onnx")):
        raise DescriptionError(f"--to must end in .safetensors or .onnx, got {to!r}; name the file so")
    target = ExportFile(Store(folder or slash or "."), name)
    if not force and target.folder.exists(name):
        raise DescriptionError(f"--to {target.url} exists; give another name, or overwrite it with --force")
    return target


def _read(run: RunDirectory, at: int | None, which: Which, *, is_onnx: bool) -> ExportSource:
    """Read the weights, and for ONNX the buffers beside them; no other file of the checkpoint is read."""
    checkpoints, file = run.checkpoints, WEIGHTS_FILES[which]
    wanted = [file, *(TRAINING_FILES if is_onnx else ())]
    if at is not None:
        manifest = checkpoint_at(run, at, checkpoints.steps())
        files = checkpoints.read_files(manifest, wanted)
    else:
        defects: list[str] = []
        newest = checkpoints.newest_good(lambda _, error: defects.append(str(error)), wanted)
        if newest is None:
            why = f"no checkpoint is good; the newest, {defects[0]}" if defects else "has no checkpoint; train it first"
            raise CheckpointError(f"{run.url}: {why}")
        manifest, files = newest
    if file not in files:
        raise DescriptionError(
            f"--weights {which}: the checkpoint of step {manifest.step} keeps no averaged weights; "
            "write model, or train with train.ema_decay"
        )
    try:
        tensors = decode_weights(files[file], which)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoints.url(manifest.step)}: {file} {error}") from error
    return ExportSource(run, manifest, which, tensors, decode_buffers(files) if is_onnx else {})


def _equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Return whether two sets of tensors have the same bits; a NaN equals itself."""
    return left.keys() == right.keys() and all(_bits(left[name]) == _bits(right[name]) for name in left)


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --- ONNX ---


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise DescriptionError(
            f"--to: an .onnx file needs {' and '.join(missing)}, not installed here; pip install 'launcher[onnx]'"
        )


def _to_onnx(source: ExportSource, about: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Return the ONNX file, and ``largest_difference`` between the outputs of onnxruntime and torch."""
    with contextlib.redirect_stdout(sys.stderr):  # the exporter prints its progress, and the user's code may print
        model, inputs = _model_and_inputs(source)
        try:
            # Two samples: the exporter would take a batch size of 1 for a constant.
            program = torch.export.export(model, (inputs[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
            exported = torch.onnx.export(program, input_names=["input"], output_names=["output"], verbose=False)
            assert exported is not None
            proto = exported.model_proto
            for name, value in about.items():
                proto.metadata_props.add(key=name, value=str(value))
            data = proto.SerializeToString()
        except Exception as error:  # user code runs here, and the exporter raises many types
            raise DescriptionError(
                f"model: has no ONNX, torch.onnx.export raised {type(error).__name__}: {one_line(error)[:300]}; "
                "export .safetensors"
            ) from error
        return data, {"largest_difference": _check_onnx(data, model, inputs)}


def _model_and_inputs(source: ExportSource) -> tuple[nn.Module, Tensor]:
    """Return the run's model with the weights, and a batch of its validation samples (else training samples).

    Changes the working directory and the import path of this process.
    """
    description = parse(source.run.read_job(), f"{source.run.url}/job.yaml")
    code = find_code(source.run)
    search_last(code.import_paths)
    recorded = recorded_indexes(source.run.read_environment())
    if recorded:  # else its data has no index, or an earlier version of the launcher has driven it
        use_index_files(IndexFiles(source.run, recorded))
    with named_errors(description.source):
        parts = build_parts(description.spec, torch.device("cpu"))
        inputs = _inputs(parts.train_set if parts.val_set is None else parts.val_set, description.spec)
    try:
        parts.unsaved_buffers.load_state_dict(source.unsaved_buffers, source.tensors, parts.device)
        parts.model.load_state_dict(source.tensors)
    except (RuntimeError, ValueError) as error:
        url = source.run.checkpoints.url(source.manifest.step)
        raise CheckpointError(f"{url}: does not fit the model of the description: {one_line(error)}") from error
    return parts.model.eval(), inputs


def _inputs(dataset: Any, spec: JobSpec) -> Tensor:
    keyed = KeyedDataset(dataset, spec.seed)
    inputs = default_collate([keyed[0, number % len(dataset)][0] for number in range(_SAMPLES)])
    if not isinstance(inputs, Tensor):
        raise DescriptionError(
            f"data: an .onnx file is made for inputs that are one tensor, got {type(inputs).__name__}; "
            "export .safetensors"
        )
    return inputs


def _check_onnx(data: bytes, model: nn.Module, inputs: Tensor) -> float:
    """Return the largest difference of outputs between onnxruntime and torch, as a share of the largest output.

    Raises:
        DescriptionError: The difference is more than rounding explains, or the output is not one tensor.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(inputs)
    if not isinstance(expected, Tensor):
        raise DescriptionError(
            f"model: an .onnx file is made for an output that is one tensor, got {type(expected).__name__}; "
            "export .safetensors"
        )
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
    difference = (got.double() - expected.double()).abs().max().item() / max(
        expected.double().abs().max().item(), 1e-30
    )
    tolerance = _TOLERANCE_16_BIT if expected.dtype.itemsize == 2 else _TOLERANCE
    if not difference <= tolerance:
        raise DescriptionError(
            f"model: onnxruntime's outputs differ from torch's by {difference:.2g} of the largest, "
            f"more than {tolerance:g}: an operator is exported wrongly; export .safetensors"
        )
    return difference
