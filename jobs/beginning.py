"""Where a worker begins: at the newest good checkpoint, with given weights, or with random ones.

Rank 0 reads and verifies, once, and everyone begins with the same bytes.
"""

from collections.abc import Mapping
from typing import Any

from cluster.errors import CheckpointError, one_line
from cluster.link import Link
from cluster.run_directory import RunDirectory
from jobs.loop import Progress
from jobs.parts import Parts
from jobs.spec import InitSpec
from jobs.state import decode
from jobs.team import Team
from jobs.warm_start import Source, Weights, load_weights, match_weights, read_weights

_Found = tuple[int, dict[str, float], Mapping[str, bytes]]
"""A checkpoint: its step, the newest metrics at it, and its files."""


def begin(link: Link, run: RunDirectory, parts: Parts, progress: Progress, team: Team) -> dict[str, float]:
    """Puts parts and progress where the run stands.

    Returns:
        The newest metrics at that step.

    Collective: every rank.

    Raises:
        CheckpointError: There are checkpoints and none is good, or it belongs to another model; or the weights to
            begin with are others than the plan read.
        StorageError: The store does not answer.
    """
    link.activity.mark("restore", progress.step)
    found = team.from_rank_0(lambda: _newest_good(link, run))
    if found is not None:
        step, metrics, files = found
        _restore(parts, progress, files, run.checkpoints.url(step))
        return metrics
    init_from = parts.spec.init_from
    if init_from is not None:
        weights = team.from_rank_0(lambda: _weights(init_from, run))
        load_weights(parts.model, parts.ema, weights, match_weights(parts.model, init_from, weights))
    return {}


def _newest_good(link: Link, run: RunDirectory) -> _Found | None:
    def on_bad(step: int, error: CheckpointError) -> None:
        link.send("fell_back", step=step, defect=str(error))

    found = run.checkpoints.newest_good(on_bad)
    if found is None and run.checkpoints.steps():
        raise CheckpointError(f"{run.url}: no checkpoint is good; look at them, or start a run of another name")
    # What lies beyond is of a future that will be made anew; left there, it would count as the newest.
    run.checkpoints.discard_after(-1 if found is None else found[0].step)
    return None if found is None else (found[0].step, dict(found[0].metrics), found[1])


def _weights(spec: InitSpec, run: RunDirectory) -> Weights:
    """What the plan read, whatever its source has made since."""
    planned = run.read_environment().get("init_from")
    return read_weights(spec, None if planned is None else Source(**planned))


def _restore(parts: Parts, progress: Progress, files: Mapping[str, bytes], url: str) -> None:
    state: dict[str, Any] = decode(files)
    try:
        parts.load_state(state, state["progress"]["step"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{url}: does not fit the job: {one_line(error)}; resume with the description that made it"
        ) from error
    for name, value in state["progress"].items():
        setattr(progress, name, value)
