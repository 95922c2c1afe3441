"""The state that a worker starts from: the newest good checkpoint, the weights of ``init_from``, or random weights.

Each rank reads and verifies its share of a checkpoint once and sends it to the others, so all start with the same
bytes. The parts are read into the memory that they are loaded from: beside the live state, a worker needs memory for
the state once, on its device, and for the parts that it reads at a time.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cluster.errors import CheckpointError, LauncherError, one_line
from cluster.process.agent_link import AgentLink
from cluster.process.messages import FellBack
from cluster.run.checkpoints import Checkpoints
from cluster.run.manifest import Manifest, PartKey, divide
from cluster.run.run_directory import RunDirectory
from jobs.checkpoint.file_content import FileContent, HeaderError, has_header, header_size, open_file
from jobs.checkpoint.layout import decode, decode_error, place_of
from jobs.checkpoint.loop_state import LoopState
from jobs.checkpoint.warm_start import Weights, WeightsSource, load_weights, match_weights, read_weights
from jobs.components.build import Components
from jobs.parallel.worker_team import Team
from jobs.spec import InitSpec


@dataclass(frozen=True, slots=True)
class _Head:
    """What tells the memory that a checkpoint needs.

    Attributes:
        manifest: Its manifest.
        headers: The header of each file of tensors.
    """

    manifest: Manifest
    headers: Mapping[str, bytes]


def restore_newest(
    link: AgentLink, run: RunDirectory, components: Components, state: LoopState, team: Team
) -> Manifest | None:
    """Loads the newest good checkpoint into the components and the loop's state.

    Without a checkpoint it loads the weights of ``init_from``, if there are any.

    Returns:
        The manifest of the loaded checkpoint; None if the run has no checkpoint.

    Raises:
        CheckpointError: There are checkpoints and none is good, or the newest good one belongs to another model; or
            ``init_from`` has other weights than the plan read.
        StorageError: The store does not answer.

    Collective: every rank.
    """
    link.activity.mark("restore", state.step)
    # As DDP does with the model before the first step: buffers that were drawn without the seed are those of rank 0.
    team.share_buffers([*components.buffers.take(with_values=False).tensors, *components.unsaved_buffers.initial])
    steps = team.from_rank_0(run.checkpoints.steps)
    for step in reversed(steps):
        try:
            head = team.from_rank_0(partial(_read_head, run.checkpoints, step))
            files = _read_together(run.checkpoints, head, team)
        except HeaderError as error:  # its bytes are those that were written, so that an earlier one may be no better
            raise decode_error(error) from error
        except CheckpointError as error:  # the same on every rank
            if team.rank == 0:
                link.send(FellBack(step=step, defect=str(error)))
            continue
        _load(components, state, files, run.checkpoints.url(step))
        return head.manifest
    if steps:
        raise CheckpointError(f"{run.url}: no checkpoint is good; look at them, or start a run of another name")
    init_from = components.spec.init_from
    if init_from is not None:
        weights = _share_weights(lambda: _read_planned_weights(init_from, run), team)
        load_weights(components.model, components.ema, weights, match_weights(components.model, init_from, weights))
    return None


def _read_head(checkpoints: Checkpoints, step: int) -> _Head:
    """Reads the manifest of a checkpoint, and the first parts of its files of tensors as far as their headers go.

    Raises:
        CheckpointError, StorageError: They cannot be read.
    """
    manifest = checkpoints.manifest(step)
    headers = {name: b"" for name in manifest.files if has_header(name)}

    def append(key: PartKey, data: bytes) -> None:
        headers[key[0]] += data

    for number in itertools.count():
        wanted = [
            (name, number)
            for name, header in headers.items()
            if len(header) < header_size(header) and number < len(manifest.files[name].parts)
        ]
        if not wanted:
            break
        checkpoints.read_parts(manifest, wanted, append)
    return _Head(manifest, {name: header[: header_size(header)] for name, header in headers.items()})


def _read_together(checkpoints: Checkpoints, head: _Head, team: Team) -> dict[str, FileContent]:
    """Returns the files of a checkpoint; each rank reads a share and sends it to the others.

    Every part is read into its place and dropped. The ranks send each other nothing until all of them have verified
    what they have read.

    Raises:
        CheckpointError, StorageError: A rank cannot read its share; every rank raises the same error.
        HeaderError: A file has no header that this version can read; every rank raises the same error.

    Collective: every rank.
    """
    manifest = head.manifest
    files = {
        name: open_file(name, entry.size, head.headers.get(name, b""), place_of(name, team.device))
        for name, entry in manifest.files.items()
    }
    keys = manifest.part_keys()
    sizes = [manifest.part(key).size for key in keys]
    shares = divide(sizes, team.world_size)
    begins = dict[PartKey, int]()
    for name, entry in manifest.files.items():
        ends = itertools.accumulate((part.size for part in entry.parts), initial=0)
        begins |= {(name, number): begin for number, begin in zip(range(len(entry.parts)), ends)}
    own, own_error = shares[team.rank], None
    try:
        checkpoints.read_parts(
            manifest, keys[own.start : own.stop], lambda key, data: files[key[0]].write(begins[key], data)
        )
    except LauncherError as error:
        own_error = error
    for error_of_rank in team.gather(own_error):
        if error_of_rank is not None:
            files.clear()  # the error's traceback refers to them, and an earlier checkpoint needs their memory
            raise error_of_rank
    for rank, share in enumerate(shares):
        memory = list[Tensor]()
        for name, of_file in itertools.groupby(keys[share.start : share.stop], key=lambda key: key[0]):
            first, *rest = of_file
            last = rest[-1] if rest else first
            memory += files[name].slices(range(begins[first], begins[last] + manifest.part(last).size))
        team.share(memory, rank)
    return files


def _share_weights(read: Callable[[], Weights], team: Team) -> Weights:
    """Returns the weights that rank 0 reads, on the device of each rank.

    Raises:
        LauncherError: Rank 0 cannot read them; every rank raises the same error.

    Collective: every rank.
    """
    tensors: dict[str, Tensor] = {}

    def read_without_values() -> Weights:
        weights = read()
        tensors.update(weights.tensors)
        return replace(weights, tensors={name: tensor.to("meta") for name, tensor in tensors.items()})

    weights = team.from_rank_0(read_without_values)
    for name, without_values in weights.tensors.items():
        here = tensors.get(name, without_values)
        tensors[name] = here.to(team.device) if team.rank == 0 else torch.empty_like(here, device=team.device)
    team.share([tensor.view(-1).view(torch.uint8) for tensor in tensors.values()], source=0)
    return replace(weights, tensors=tensors)


def _read_planned_weights(spec: InitSpec, run: RunDirectory) -> Weights:
    """Reads the checkpoint or file that the plan read, even if the source run has made newer checkpoints since."""
    planned = run.read_environment().get("init_from")
    return read_weights(spec, None if planned is None else WeightsSource(**planned))


def _load(components: Components, state: LoopState, files: Mapping[str, FileContent], url: str) -> None:
    saved: dict[str, Any] = decode(files)
    try:
        components.load_state(saved, saved["progress"]["step"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{url}: does not fit the job: {one_line(error)}; resume with the description that made it"
        ) from error
    for name, value in saved["progress"].items():
        setattr(state, name, value)
