"""Loads the weights of ``init_from`` in the dry run, to show what is loaded and what is not."""

from cluster.errors import CheckpointError, DescriptionError, StorageError
from jobs.checkpoint.warm_start import load_weights, match_weights, read_weights
from jobs.components.build import Components
from jobs.spec import InitSpec
from launcher.planning.plan import InitPlan


def load_init_weights(spec: InitSpec, parts: Components) -> InitPlan:
    """Load the weights of ``init_from`` into the model.

    Raises:
        DescriptionError: They cannot be read, or do not fit the model.
    """
    try:
        weights = read_weights(spec)
    except (StorageError, CheckpointError) as error:
        raise DescriptionError(f"init_from.url: {error}") from error
    report = match_weights(parts.model, spec, weights)
    load_weights(parts.model, parts.ema, weights, report)
    return InitPlan(
        url=report.source.url,
        sha256=report.source.sha256,
        loaded=report.loaded,
        kept=report.kept,
        unused=report.unused,
        passed_over=report.passed_over,
    )
