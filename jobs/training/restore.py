"""The state that a worker starts from: the newest good checkpoint, the weights of ``init_from``, or random weights.

Each rank reads and verifies its share of a checkpoint once and sends it to the others, so all start with the same
bytes.
"""

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from cluster.errors import CheckpointError, LauncherError, one_line
from cluster.process.agent_link import AgentLink
from cluster.process.messages import FellBack
from cluster.run.checkpoints import Checkpoints
from cluster.run.manifest import Manifest, divide
from cluster.run.run_directory import RunDirectory
from jobs.checkpoint.layout import decode, memory_of
from jobs.checkpoint.loop_state import LoopState
from jobs.checkpoint.warm_start import Weights, WeightsSource, load_weights, match_weights, read_weights
from jobs.components.build import Components
from jobs.parallel.worker_team import Team
from jobs.spec import InitSpec


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
            manifest = team.from_rank_0(partial(run.checkpoints.manifest, step))
            files = _read_together(run.checkpoints, manifest, team)
        except CheckpointError as error:  # the same on every rank
            if team.rank == 0:
                link.send(FellBack(step=step, defect=str(error)))
            continue
        _load(components, state, files, run.checkpoints.url(step))
        return manifest
    if steps:
        raise CheckpointError(f"{run.url}: no checkpoint is good; look at them, or start a run of another name")
    init_from = components.spec.init_from
    if init_from is not None:
        weights = team.from_rank_0(lambda: _read_planned_weights(init_from, run))
        load_weights(components.model, components.ema, weights, match_weights(components.model, init_from, weights))
    return None


def _read_together(checkpoints: Checkpoints, manifest: Manifest, team: Team) -> dict[str, bytes]:
    """Returns the files of a checkpoint; each rank reads a share and sends it to the others.

    Raises:
        CheckpointError, StorageError: A rank cannot read its share; every rank raises the same error.

    Collective: every rank.
    """
    keys = manifest.part_keys()
    sizes = [manifest.part(key).size for key in keys]
    ends = [0, *itertools.accumulate(sizes)]
    shares = divide(sizes, team.world_size)
    stretches = [range(ends[share.start], ends[share.stop]) for share in shares]
    own, stretch = shares[team.rank], stretches[team.rank]
    own_error, parts = None, list[bytes]()
    try:
        parts = checkpoints.read_parts(manifest, keys[own.start : own.stop])
    except LauncherError as error:
        own_error = error
    for error_of_rank in team.gather(own_error):
        if error_of_rank is not None:
            raise error_of_rank
    data = torch.empty(ends[-1], dtype=torch.uint8)
    memory_of(data)[stretch.start : stretch.stop] = b"".join(parts)
    team.share(data, stretches)
    files, start = {}, 0
    for name, entry in manifest.files.items():
        files[name] = data[start : start + entry.size].numpy().tobytes()
        start += entry.size
    return files


def _read_planned_weights(spec: InitSpec, run: RunDirectory) -> Weights:
    """Reads the checkpoint or file that the plan read, even if the source run has made newer checkpoints since."""
    planned = run.read_environment().get("init_from")
    return read_weights(spec, None if planned is None else WeightsSource(**planned))


def _load(components: Components, state: LoopState, files: Mapping[str, bytes], url: str) -> None:
    saved: dict[str, Any] = decode(files)
    try:
        components.load_state(saved, saved["progress"]["step"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{url}: does not fit the job: {one_line(error)}; resume with the description that made it"
        ) from error
    for name, value in saved["progress"].items():
        setattr(state, name, value)
