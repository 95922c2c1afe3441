"""The plan of a run that goes on: it loads no initial weights again, and its data must not have changed."""

import dataclasses
from collections.abc import Callable

from cluster.errors import DescriptionError
from cluster.kinds.cluster import Cluster
from cluster.run.run_directory import RunDirectory
from launcher.code.user_code import UserCode
from launcher.config.description import Description
from launcher.planning.plan import DryRunResult, Plan, make_plan
from launcher.runs.data_indexes import check_indexes
from launcher.runs.environment import init_from_record


def plan_to_resume(
    run: RunDirectory,
    wanted: Description,
    reached: int,
    code: UserCode,
    cluster: Cluster,
    tell: Callable[[str], None],
    *,
    force: bool,
    may_wait: bool,
) -> Plan:
    """Make the plan of a run that has reached a step; see ``make_plan``.

    Raises:
        DescriptionError: The description cannot run there as written; or, without ``force``, the data or the initial
            weights of the run have changed.
        ClusterError: There is no room for the dry run, or the cluster is not fit for the job.
    """
    cluster.import_ahead()
    plan = make_plan(left_to_plan(run, wanted, reached, force=force), run.url, code, cluster, tell, may_wait=may_wait)
    if not force:
        check_unchanged(run, wanted, plan)
    return plan


def left_to_plan(run: RunDirectory, wanted: Description, reached: int, *, force: bool = False) -> Description:
    """Return the description that is left to plan for a run that has reached a step.

    Once the run has weights of its own it loads no others, so ``init_from`` is removed. At step 0, ``init_from`` is the
    source that the run began with, unless ``force``.
    """
    init_from = wanted.spec.init_from
    begun_with: dict[str, str] | None = None if force else run.read_environment().get("init_from")
    if init_from is None or reached:
        init_from = None
    elif begun_with is not None:
        init_from = dataclasses.replace(init_from, url=begun_with["url"])
    return dataclasses.replace(wanted, spec=dataclasses.replace(wanted.spec, init_from=init_from))


def check_unchanged(run: RunDirectory, wanted: Description, found: Plan | DryRunResult) -> None:
    """Check that a run would go on with the data and the initial weights that it began with.

    Raises:
        DescriptionError: They have changed since.
    """
    check_indexes(run, wanted.source, found.indexes)
    environment = run.read_environment()
    if environment.get("data_fingerprint") not in (None, found.data_fingerprint):
        raise DescriptionError(
            f"{wanted.source}: data has changed since the run began: other samples, classes or targets; "
            "restore it, or resume with --force"
        )
    if found.init_from is not None and environment.get("init_from") not in (None, init_from_record(found)):
        raise DescriptionError(
            f"{wanted.source}: init_from: {found.init_from.url} has changed since the run began; "
            "restore it, or resume with --force"
        )


def placed_at(run: RunDirectory, wanted: Description) -> Description:
    """Return a description whose ``store`` is the one that the run lies in.

    As written, ``store`` may be relative to a folder of another machine.
    """
    return dataclasses.replace(wanted, spec=dataclasses.replace(wanted.spec, store=run.url.rpartition("/")[0]))
