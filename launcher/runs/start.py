"""Beginning and continuing a run: what a run directory holds already decides which of the two it is.

Where it runs is decided before, and may be another cluster each time.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.capacity import num_cores
from cluster.errors import CheckpointError, ClusterError, DescriptionError, LauncherError, StorageError
from cluster.kinds.cluster import Cluster
from cluster.run.lease import DRIVER_KEYS, STATUS_INTERVAL_S, SupersededError
from cluster.run.manifest import Manifest
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import MissingObject, Store
from cluster.tracking.tracker import Tracker, TrackerSettings, open_tracker
from jobs.spec import JobSpec
from launcher.code.user_code import UserCode, code_folder, find_code, has_bundle, lasting_directory, make_import_paths
from launcher.config.description import Description, Difference, differences, parse
from launcher.display.plots import draw
from launcher.display.progress import Progress
from launcher.driver.background_writer import BackgroundWriter
from launcher.driver.driver import Driver, make_task
from launcher.driver.goodput import taken_over
from launcher.driver.membership import Membership
from launcher.driver.run_log import RunLog
from launcher.driver.run_state import RunState
from launcher.planning.placement import places_of
from launcher.planning.plan import DryRunResult, Plan, make_plan
from launcher.runs.rewind import branch_directory, checkpoint_at, copy_run, first_workers, go_back, good_checkpoint_at
from launcher.watching.status import is_driven, without_driver

_SAFE = (
    "name", "store", "workers", "tracking", "checkpoint", "train.max_steps", "train.max_seconds", "data.loaders",
)  # fmt: skip
"""Keys that may change in the life of a run: no bit of its state depends on them."""
_PACKAGES = (
    "launcher", "torch", "torchvision", "torchmetrics", "ray", "numpy", "fsspec", "omegaconf", "wandb", "safetensors",
)  # fmt: skip


def begin(
    description: Description, folder: Path, cluster: Cluster, display: Progress, *, take_over: bool = False
) -> dict[str, Any]:
    """Runs a job from its description; a run that exists already is continued if it is the same one.

    Args:
        description: What to run.
        folder: Where the job file lies, for the user's own modules.
        cluster: Where to run it; this process has joined it.
        display: Shows progress.
        take_over: Even from a driver that is alive, which then ends.

    Returns:
        The ``--json`` document.

    Raises:
        LauncherError: See the tree in ``cluster.errors``.
    """
    code = UserCode(folders=make_import_paths(folder))
    run = run_directory(description)
    seen = _look(run)
    if run.exists():
        stored = parse(run.read_job(), f"{run.url}/job.yaml")
        if has_bundle(run):
            code = find_code(run)
            display.message(f"running with the code that was submitted, not with {code_folder(folder)}")
        return _continue(run, seen, stored, description, code, cluster, display, force=False, take_over=take_over)
    _meet_other_driver(run, display, take_over=take_over)  # it has the run, and has not described it yet
    cluster.import_ahead()
    plan = make_plan(description, run.url, code, cluster, display.phase, may_wait=not take_over)
    display.message(one_line(description.spec, plan))
    _check_since(run, seen, take_over=take_over)
    return _train(run, description, plan, code, cluster, display, may_differ=False)


def resume(
    run: RunDirectory,
    overrides: Sequence[str],
    cluster: Cluster,
    display: Progress,
    *,
    force: bool = False,
    take_over: bool = False,
    at: int | None = None,
    new: str | None = None,
    submission_id: str | None = None,
) -> dict[str, Any]:
    """Goes on with a run from a checkpoint, from its directory alone.

    Args:
        run: What to go on with.
        overrides: What to change in its description.
        cluster: Where to go on; this process has joined it.
        display: Shows progress.
        force: Go on even with another description, other data, or workers that differ.
        take_over: Even from a driver that is alive, which then ends.
        at: The step of the checkpoint, to which the run goes back; by default the newest good one.
        new: The name or the URL of a branch, which goes on in place of the run.
        submission_id: Of the submission for which this process was begun. Its description and its code become those
            of the run, unless this one or a later one has been taken.

    Raises:
        LauncherError: See the tree in ``cluster.errors``.
    """
    seen = _look(run)
    found = find_description(run, submission_id)
    stored = found.stored
    branch = None if new is None else branch_directory(run, new)
    if take_over and at is not None:
        raise DescriptionError(
            f"{run.url}: --at goes back in a run that nobody drives; launcher stop it, and leave out --take-over"
        )
    code = find_code(run, found.submission_id)
    steps = run.checkpoints.steps()
    reached = max(steps, default=0) if at is None else at
    if branch is not None:
        overrides = [*overrides, *_place_of(branch, stored, overrides)]
    wanted = found.changed(overrides) if submission_id else found.continued(overrides, reached)
    if branch is None:
        return _continue(
            run, seen, stored, wanted, code, cluster, display, force=force, take_over=take_over, at=at,
            taking=found.submission_id if submission_id else None,
        )  # fmt: skip
    if at is not None:
        steps = [checkpoint_at(run, at, steps).step]
    return _branch(run, branch, steps, stored, wanted, code, cluster, display, force=force)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundDescription:
    """What a run goes on with, from its directory alone.

    Attributes:
        stored: Its description; of a run that has not begun, the one that it was submitted with.
        text: What it goes on with, before anything is changed.
        submission_id: Of the submission that this comes from, which the run has yet to take; none: it is the run's own.
    """

    stored: Description
    text: str
    submission_id: str | None

    def changed(self, overrides: Sequence[str]) -> Description:
        """The description with some changes.

        Raises:
            DescriptionError: They are wrong.
        """
        return parse(self.text, self.stored.source, overrides)

    def continued(self, overrides: Sequence[str], reached: int) -> Description:
        """The same for a person who has a run go on that has reached a step: a limit it has reached is taken away.

        Raises:
            DescriptionError: The changes are wrong.
        """
        wanted = self.changed(overrides)
        limit = wanted.spec.train.max_steps
        if limit is not None and reached >= limit and not any(o.startswith("train.max_steps=") for o in overrides):
            wanted = self.changed([*overrides, "train.max_steps=null"])  # shown as a change, if it comes to that
        return wanted


def find_description(run: RunDirectory, submission_id: str | None = None) -> FoundDescription:
    """What a run goes on with.

    Args:
        run: It exists, or was submitted.
        submission_id: Of the submission for which this process was begun; none: a person asks.

    Raises:
        ClusterError: The run has taken another submission since.
        StorageError: What it has cannot be read.
    """
    source = f"{run.url}/job.yaml"
    own_text = None
    with contextlib.suppress(MissingObject):  # it may be submitted, and not begun
        own_text = run.read_job()
    taking = _submission_to_take(run, submission_id, has_begun=own_text is not None)
    text = (own_text or run.read_job()) if taking is None else run.submissions.read(taking).description
    return FoundDescription(stored=parse(own_text or text, source), text=text, submission_id=taking)


def _submission_to_take(run: RunDirectory, submission_id: str | None, *, has_begun: bool) -> str | None:
    """The submission that a process takes which goes on with a run; none: it goes on with what the run has.

    Whoever was begun for none, such as a person elsewhere, leaves those that wait to their jobs, unless the run has
    nothing else yet.

    Raises:
        ClusterError: The run has taken another one since.
    """
    if submission_id is not None:
        standing = run.submissions.standing(submission_id)
        if standing == "superseded":
            raise ClusterError(
                f"{run.url}: submission {submission_id} is superseded, the run was begun for another one since; "
                "nothing is left to do for this job"
            )
        return submission_id if standing == "due" else None
    newest = None if has_begun else run.submissions.newest()
    return None if newest is None else newest.id


def plan_only(description: Description, folder: Path, cluster: Cluster, display: Progress) -> Plan:
    """Checks and decides everything, and starts no worker.

    Raises:
        DescriptionError: The description cannot run as written, there.
        ClusterError: The cluster is not fit for it.
    """
    code = UserCode(folders=make_import_paths(folder))
    return make_plan(description, run_directory(description).url, code, cluster, display.phase, may_wait=False)


def one_line(spec: JobSpec, plan: Plan) -> str:
    """The plan, for a person who has started a run."""
    device = "GPU" if plan.gpus else "CPU"
    shards = f"{spec.train.shards} shards on {plan.num_workers} worker{'s' * (plan.num_workers > 1)} ({device})"
    return (
        f"{spec.name}: {plan.end_step:,} steps of {spec.train.global_batch} samples, "
        f"{plan.steps_per_epoch:,} an epoch; "
        f"{plan.parameters:,} parameters; {shards}; {plan.run}"
    )


def run_directory(description: Description) -> RunDirectory:
    """Where the run of a description lies, whether it exists or not.

    Raises:
        DescriptionError: The store makes no sense here.
    """
    try:
        return RunDirectory(Store(description.spec.store).at(description.spec.name))
    except StorageError as error:
        raise DescriptionError(f"{description.source}: store: {error}") from error


def _continue(
    run: RunDirectory,
    seen: "_Seen",
    stored: Description,
    wanted: Description,
    code: UserCode,
    cluster: Cluster,
    display: Progress,
    *,
    force: bool,
    take_over: bool,
    at: int | None = None,
    taking: str | None = None,
) -> dict[str, Any]:
    """Goes on with a run that exists, if what is wanted is that run.

    Args:
        at: The step to go back to; none: it goes on from the newest good one.
        taking: The submission for which this process was begun, if it has yet to take it.
        run, seen, stored, wanted, code, cluster, display, force, take_over: See ``resume``.
    """
    changed, is_same = compare(run, stored, wanted, force=force)
    _meet_other_driver(run, display, take_over=take_over)
    status = run.read_status()
    steps = run.checkpoints.steps()
    back_to = None if at is None else good_checkpoint_at(run, at, steps)
    goes_back = status is not None and at is not None and at < status.get("step", 0)
    if status is not None and status["status"] == "completed" and is_same and not goes_back:
        display.message(f"{run.url} is complete; nothing to do (another name starts another run)")
        return without_driver(status)
    for change in changed:
        display.message(f"changed {change}")
    reached = max(steps, default=0) if at is None else at
    placed = placed_at(run, wanted) if wanted.spec.store == stored.spec.store else wanted
    # A driver that is alive has the very room that its successor would wait for.
    with _telling_elsewhere(run, taking, display.phase) as tell:
        plan = _plan_to_go_on(run, placed, reached, code, cluster, tell, force=force, may_wait=not take_over)
    if status is not None and reached >= plan.end_step < plan.total_steps:
        display.message(f"{run.url} has reached train.max_steps={plan.end_step}; raise it to go on")
        return without_driver(status)
    if back_to is None:
        display.message(f"resuming {run.url}")
    else:
        display.message(f"going back to step {at} of {run.url}")
    _check_since(run, seen, take_over=take_over)
    if taking is not None and not run.submissions.is_there(taking):
        raise ClusterError(f"{run.url}: submission {taking} was withdrawn; nothing is left to do for this job")
    return _train(run, wanted, plan, code, cluster, display, back_to, may_differ=force)


def changes_of(stored: str, wanted: Description) -> list[Difference]:
    """What of a description that is stored is to change; what the cluster says of workers is no change of it."""
    return differences(parse(stored, wanted.source, wanted.of_cluster).spec, wanted.spec)


def compare(
    run: RunDirectory, stored: Description, wanted: Description, *, force: bool = False
) -> tuple[list[Difference], bool]:
    """What is to change in a run that exists, and whether its bits stay as they are.

    Raises:
        DescriptionError: They do not, and that is not forced.
    """
    changed = changes_of(stored.text, wanted)
    unsafe = [change for change in changed if not _is_safe(change.key)]
    if unsafe and not force:
        listed = "; ".join(map(str, unsafe))
        raise DescriptionError(
            f"{wanted.source}: the run {run.url} exists with another description: {listed}; "
            "give this one another name, or resume with --force to change the run"
        )
    return changed, not unsafe


def _branch(
    run: RunDirectory,
    branch: RunDirectory,
    steps: Sequence[int],
    stored: Description,
    wanted: Description,
    code: UserCode,
    cluster: Cluster,
    display: Progress,
    *,
    force: bool,
) -> dict[str, Any]:
    """Goes on in a new run from the newest good one of some checkpoints."""
    changed = changes_of(stored.text, wanted)
    unsafe = [change for change in changed if not _is_safe(change.key)]
    if unsafe and not force:
        raise DescriptionError(
            f"{wanted.source}: the branch has another description: {'; '.join(map(str, unsafe))}; "
            "leave that as it is, or branch with --force"
        )
    for change in changed:
        display.message(f"changed {change}")
    reached = max(steps, default=0)
    plan = _plan_to_go_on(run, wanted, reached, code, cluster, display.phase, force=force, may_wait=True)
    manifest = copy_run(run, branch, wanted.text, steps, code.sha256, display.warn)
    display.message(f"branching from step {manifest.step} of {run.url}")
    return _train(branch, wanted, plan, code, cluster, display, may_differ=force)


def _place_of(branch: RunDirectory, stored: Description, overrides: Sequence[str]) -> list[str]:
    """What to change in a description so that its run lies there."""
    if any(override.startswith(("name=", "store=")) for override in overrides):
        raise DescriptionError(
            f"{stored.source}: a branch has its name and its store from --as; leave out name and store"
        )
    store = branch.url.rpartition("/")[0]
    is_beside = Store(stored.spec.store).url == store  # then it may stay relative
    return [f"name={json.dumps(branch.name)}", *([] if is_beside else [f"store={json.dumps(store)}"])]


def placed_at(run: RunDirectory, wanted: Description) -> Description:
    """A description with the store in which its run lies, for a store that is written relative to another machine."""
    return dataclasses.replace(wanted, spec=dataclasses.replace(wanted.spec, store=run.url.rpartition("/")[0]))


def _plan_to_go_on(
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
    """The plan of a run that has reached a step; see ``make_plan``.

    Raises:
        DescriptionError: It cannot run as written, there; or what it began with has changed since.
        ClusterError: There is no room to try it out there, or the cluster is not fit for it.
    """
    cluster.import_ahead()
    left = left_to_plan(run, wanted, reached, force=force)
    plan = make_plan(left, run.url, code, cluster, tell, may_wait=may_wait)
    if not force:
        check_unchanged(run, wanted, plan)
    return plan


@contextlib.contextmanager
def _telling_elsewhere(
    run: RunDirectory, submission_id: str | None, tell: Callable[[str], None]
) -> Iterator[Callable[[str], None]]:
    """Within it, a job that has yet to take its run says in the run directory what it is at, and that it lives.

    Args:
        run: Which.
        submission_id: That the job has yet to take; none: this process was begun for none, and writes nothing.
        tell: Takes the same on this host.

    Yields:
        Takes what the job is at.
    """
    if submission_id is None:
        yield tell
        return
    doing = "planning"

    def write() -> Iterator[None]:
        run.submissions.write_sign(submission_id, doing)
        yield

    def tell_both(what: str) -> None:
        nonlocal doing
        tell(what)
        doing = what
        signs.ask()

    with BackgroundWriter(write, STATUS_INTERVAL_S, patience_s=math.inf) as signs:  # without a sign, the job goes on
        yield tell_both
    signs.check()
    run.submissions.delete_sign(submission_id)  # the run's own status follows; of an error, the submission tells


def left_to_plan(run: RunDirectory, wanted: Description, reached: int, *, force: bool = False) -> Description:
    """What is left to plan of a run that has reached a step: with weights of its own, it loads no others."""
    begun_with = None if force else run.read_environment().get("init_from")
    return _left_to_load(wanted, reached, begun_with)


def check_unchanged(run: RunDirectory, wanted: Description, found: Plan | DryRunResult) -> None:
    """Makes sure that a run would go on with what it began with.

    Raises:
        DescriptionError: Its data, or the weights that it began with, have changed since.
    """
    environment = run.read_environment()
    if environment.get("data_fingerprint") not in (None, found.data_fingerprint):
        raise DescriptionError(
            f"{wanted.source}: data has changed since the run began: other samples, classes or targets; "
            "restore it, or resume with --force"
        )
    if found.init_from is not None and environment.get("init_from") not in (None, _source(found)):
        raise DescriptionError(
            f"{wanted.source}: init_from: {found.init_from.url} has changed since the run began; "
            "restore it, or resume with --force"
        )


def _train(
    run: RunDirectory,
    description: Description,
    plan: Plan,
    code: UserCode,
    cluster: Cluster,
    display: Progress,
    back_to: Manifest | None = None,
    *,
    may_differ: bool,
) -> dict[str, Any]:
    """Writes the run's documents, starts Ray and the workers, and drives them to the end."""
    spec = description.spec
    if plan.why_cpu:
        display.warn(plan.why_cpu)
    run.clear_stop()  # one that was asked of an earlier driver; one that comes once the run is claimed is for this one
    run.take_lease()
    if back_to is not None:
        go_back(run, back_to)
    # With that the run exists: from here on it can be resumed from anywhere.
    run.write_description(description.text, _environment(run, plan, code))
    if code.submission_id is not None:
        run.submissions.mark_taken(code.submission_id)
    run.stay_alive()
    tracker = _open_tracker(run, description, display)
    run.stay_alive()
    events = run.events().read()
    state = _state_so_far(run, spec, plan, events)
    run.stay_alive()
    run_log = RunLog(spec=spec, plan=plan, run=run, state=state, display=display, tracker=tracker)
    driver = Driver(spec=spec, run_url=run.url, run_log=run_log, first_workers=first_workers(events))

    stack = contextlib.ExitStack()

    def make_membership() -> Membership:
        stack.enter_context(cluster.started())
        task = make_task(spec, run, code, data_fingerprint=plan.data_fingerprint, may_differ=may_differ)
        return Membership(cluster.group(task, places_of(spec.workers, plan.gpus)), spec.workers, cluster.nodes)

    try:
        display.phase("starting Ray")
        with run_log, stack:
            driver.drive(make_membership)
    except LauncherError as error:
        error.document = run_log.document()
        raise
    finally:
        pictures = _write_pictures(run, spec.name, display)
        summary = {name: value for name, value in run_log.document().items() if isinstance(value, (int, float, str))}
        summary |= {f"time/{part}": seconds for part, seconds in state.time.items()}
        tracker.finish(summary, pictures, succeeded=state.status != "failed")
    return run_log.document() | {"interrupted": driver.interrupted}


def _left_to_load(wanted: Description, reached: int, begun_with: dict[str, str] | None) -> Description:
    """What is left to plan of ``init_from``: nothing once the run has weights of its own, else the very same source."""
    init_from = wanted.spec.init_from
    if init_from is None or reached:
        init_from = None
    elif begun_with is not None:
        init_from = dataclasses.replace(init_from, url=begun_with["url"])
    return dataclasses.replace(wanted, spec=dataclasses.replace(wanted.spec, init_from=init_from))


def _source(plan: Plan | DryRunResult) -> dict[str, str] | None:
    return None if plan.init_from is None else {"url": plan.init_from.url, "sha256": plan.init_from.sha256}


def _is_safe(key: str) -> bool:
    return any(key == safe or key.startswith(safe + ".") for safe in _SAFE)


def _meet_other_driver(run: RunDirectory, display: Progress, *, take_over: bool) -> None:
    """Refuses to take a run from a driver that is alive, unless that is wanted."""
    status = run.read_status()
    if status is None or status["status"] != "running":
        return
    driver = f"process {status['pid']} on {status['host']}"
    if take_over:
        display.message(f"taking {run.url} over from {driver}")
    elif is_driven(run, status):
        raise ClusterError(
            f"{run.url}: {driver} is running it; stop it with `launcher stop {run.url}`, or add --take-over to go on "
            "here in its place"
        )
    else:
        display.message(f"{driver} ran {run.url} and is gone: going on in its place")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """How a run stood when this process looked at it.

    Attributes:
        status: What its last driver wrote; none: it never had one.
        text: Its description; none: it has not begun.
        code: The digest of the bundle that it has; none: it has none.
    """

    status: dict[str, Any] | None
    text: str | None
    code: str | None

    @property
    def content(self) -> tuple[object, ...]:
        """Who had the run last, and what with."""
        return *((self.status or {}).get(key) for key in DRIVER_KEYS), self.text, self.code

    @property
    def is_running(self) -> bool:
        """Whether its last driver has not said that it ended."""
        return self.status is not None and self.status["status"] == "running"


def _look(run: RunDirectory) -> _Seen:
    status, text = run.read_status(), None  # the status first: a driver claims the run before it describes it
    with contextlib.suppress(MissingObject):
        text = run.read_job()
    return _Seen(status=status, text=text, code=run.read_environment().get("code"))


def _check_since(run: RunDirectory, seen: _Seen, *, take_over: bool) -> None:
    """Makes sure, just before a run is claimed, that it is as it was when this process decided what to do with it.

    That may be long ago, for the plan waits until there is room to try the job out.

    Args:
        run: Which.
        seen: How it stood before anything else of it was read.
        take_over: Whether the driver that was seen may be alive.

    Raises:
        ClusterError: Somebody else drives it, or has driven it since.
    """
    now = _look(run)
    has_written = seen.is_running and now.status != seen.status  # then the driver that seemed to be gone lives
    if now.content == seen.content and (take_over or not has_written):
        return
    who = "somebody" if now.status is None else f"process {now.status['pid']} on {now.status['host']}"
    raise ClusterError(
        f"{run.url}: {who} has driven it since this process looked at it; nothing was changed here: look at "
        f"`launcher status {run.url}`, then give the command again"
    )


def _state_so_far(run: RunDirectory, spec: JobSpec, plan: Plan, events: Sequence[Mapping[str, Any]]) -> RunState:
    """What earlier attempts have counted, from the run directory."""
    status, state = run.read_status(), RunState()
    if status is not None and "seconds" in status:  # else it was claimed, and never begun
        state.seconds, state.best = status["seconds"], status["best"]
        state.time = taken_over(status["time"], status.get("unsaved", {}))
        state.failure, state.worker_hours = status.get("failure"), status.get("worker_hours", 0.0)
    for event in events:
        if event["kind"] == "attempt_started":  # stored as it happens; the status of a killed driver may be older
            state.attempts = event["attempt"] + 1
    for row in run.metrics().read():
        state.metrics |= {name: value for name, value in row.items() if "/" in name}
    steps = run.checkpoints.steps()
    if steps:
        state.step, state.epoch = steps[-1], steps[-1] // plan.steps_per_epoch
        state.samples = steps[-1] * spec.train.global_batch
        with contextlib.suppress(CheckpointError):  # the workers will name it and fall back
            state.state_sha256 = run.checkpoints.manifest(steps[-1]).state_sha256
    return state


def _environment(run: RunDirectory, plan: Plan, code: UserCode) -> dict[str, Any]:
    """What the bits of the run depend on beside its description, with an entry for this attempt."""
    environment = run.read_environment()
    attempt = {
        "time": round(time.time(), 3),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": _versions(),
        "hardware": {"machine": platform.machine(), "cores": num_cores(), "gpus_per_worker": plan.gpus},
        "workers": plan.num_workers,
        # Of the code: where a bundle was made, and not where it was unpacked.
        "git": git_state() if code.sha256 is None else code.git,
        "command": " ".join(map(os.path.basename, sys.argv[:2])),
    }
    return {
        "data_fingerprint": plan.data_fingerprint,
        "init_from": _source(plan) or environment.get("init_from"),
        "working_directory": os.getcwd() if code.sha256 is None else code.submitted_from,
        "import_paths": list(code.folders),
        "code": code.sha256,
        "code_directory": code.directory,
        "attempts": [*environment.get("attempts", []), attempt],
    }


def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in _PACKAGES}


def git_state() -> dict[str, Any] | None:
    """Revision and digest of uncommitted changes of the working directory's repository, if it is in one."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout

    try:
        revision = git("rev-parse", "HEAD").decode().strip()
        changes = git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision, "changes_sha256": hashlib.sha256(changes).hexdigest() if changes else None}


def _open_tracker(run: RunDirectory, description: Description, display: Progress) -> Tracker:
    run_id = run.read_tracker_id()
    if run_id is None:
        run_id = secrets.token_hex(8)
        run.write_tracker_id(run_id)
    tracking = description.spec.tracking
    settings = TrackerSettings(
        mode=tracking.mode,
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group,
        tags=tracking.tags,
        name=description.spec.name,
        run_id=run_id,
        directory=os.environ.get("WANDB_DIR") or lasting_directory(run_id),
        config=description.document,
    )
    return open_tracker(settings, display.warn, past=run.metrics().read())


def _write_pictures(run: RunDirectory, name: str, display: Progress) -> dict[str, bytes]:
    """The pictures of the run; a store that fails now must not hide how the run ended."""
    try:
        pictures = draw(run.metrics().read(), run.read_matrices(), name)
        run.check_lease()
        for picture, png in pictures.items():
            run.write_picture(picture, png)
    except StorageError as error:
        display.warn(f"the pictures were not written: {error}")
        return {}
    except SupersededError:  # how the run ended tells it
        return {}
    return pictures
