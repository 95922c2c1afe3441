"""Where a worker begins: at the newest good checkpoint, with given weights, or with random ones.

All ranks read and verify, each a share of it, once, and everyone begins with the same bytes.
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
from jobs.build.components import Components
from jobs.checkpoint.layout import decode, memory_of
from jobs.checkpoint.loop_state import LoopState
from jobs.checkpoint.warm_start import Weights, WeightsSource, load_weights, match_weights, read_weights
from jobs.parallel.worker_team import Team
from jobs.spec import InitSpec


def begin(link: AgentLink, run: RunDirectory, parts: Components, progress: LoopState, team: Team) -> Manifest | None:
    """Puts parts and progress where the run stands.

    Returns:
        The manifest of the checkpoint they are of now; none at the very beginning.

    Collective: every rank.

    Raises:
        CheckpointError: There are checkpoints and none is good, or it belongs to another model; or the weights to
            begin with are others than the plan read.
        StorageError: The store does not answer.
    """
    link.activity.mark("restore", progress.step)
    steps = team.from_rank_0(run.checkpoints.steps)
    for step in reversed(steps):
        try:
            manifest = team.from_rank_0(partial(run.checkpoints.manifest, step))
            files = _read_together(run.checkpoints, manifest, team)
        except CheckpointError as error:  # the same on every rank
            if team.rank == 0:
                link.send(FellBack(step=step, defect=str(error)))
            continue
        _restore(parts, progress, files, run.checkpoints.url(step))
        return manifest
    if steps:
        raise CheckpointError(f"{run.url}: no checkpoint is good; look at them, or start a run of another name")
    init_from = parts.spec.init_from
    if init_from is not None:
        weights = team.from_rank_0(lambda: _weights(init_from, run))
        load_weights(parts.model, parts.ema, weights, match_weights(parts.model, init_from, weights))
    return None


def _read_together(checkpoints: Checkpoints, manifest: Manifest, team: Team) -> dict[str, bytes]:
    """The files of a checkpoint, of which each rank reads a share and gives it to the others."""
    keys = manifest.part_keys()
    sizes = [manifest.part(key).size for key in keys]
    ends = [0, *itertools.accumulate(sizes)]
    shares = divide(sizes, team.world_size)
    stretches = [range(ends[share.start], ends[share.stop]) for share in shares]
    own, stretch = shares[team.rank], stretches[team.rank]
    error, parts = None, list[bytes]()
    try:
        parts = checkpoints.read_parts(manifest, keys[own.start : own.stop])
    except LauncherError as caught:
        error = caught
    for defect in team.gather(error):
        if defect is not None:
            raise defect
    data = torch.empty(ends[-1], dtype=torch.uint8)
    memory_of(data)[stretch.start : stretch.stop] = b"".join(parts)
    team.share(data, stretches)
    files, start = {}, 0
    for name, entry in manifest.files.items():
        files[name] = data[start : start + entry.size].numpy().tobytes()
        start += entry.size
    return files


def _weights(spec: InitSpec, run: RunDirectory) -> Weights:
    """What the plan read, whatever its source has made since."""
    planned = run.read_environment().get("init_from")
    return read_weights(spec, None if planned is None else WeightsSource(**planned))


def _restore(parts: Components, progress: LoopState, files: Mapping[str, bytes], url: str) -> None:
    state: dict[str, Any] = decode(files)
    try:
        parts.load_state(state, state["progress"]["step"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{url}: does not fit the job: {one_line(error)}; resume with the description that made it"
        ) from error
    for name, value in state["progress"].items():
        setattr(progress, name, value)
