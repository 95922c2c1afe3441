"""Wiring of the driver's process: run log, tracker, cluster and workers, from Ray's start to the last picture."""

import contextlib
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.errors import CheckpointError, Interrupted, LauncherError, Requeued, StorageError
from cluster.host.batch_job import batch_job
from cluster.host.signals import ABANDONING, stop_signals
from cluster.kinds.cluster import Cluster
from cluster.process.orders import Task
from cluster.run.lease import SupersededError
from cluster.run.manifest import Manifest
from cluster.run.run_directory import RunDirectory
from cluster.tracking.tracker import Tracker, TrackerSettings, open_tracker
from jobs.spec import JobSpec
from launcher.code.user_code import UserCode, lasting_directory
from launcher.config.description import Description
from launcher.display.plots import draw
from launcher.display.progress import Progress
from launcher.driver.driver import Driver
from launcher.driver.goodput import taken_over
from launcher.driver.membership import Membership
from launcher.driver.run_log import RunLog
from launcher.driver.run_state import RunState
from launcher.driver.stop_conditions import StopConditions
from launcher.driver.stop_signals import StopSignals
from launcher.planning.built_index import digests_of
from launcher.planning.placement import places_of
from launcher.planning.plan import ENTRY, Plan
from launcher.runs.data_indexes import write_indexes
from launcher.runs.environment import environment_with_attempt
from launcher.runs.rewind import first_workers, go_back


@contextlib.contextmanager
def ready_to_drive(cluster: Cluster, display: Progress) -> Iterator[StopSignals]:
    """Start what workers need, and count signals from then on: one that comes while Ray starts must not tear that.

    Enter it before anything is written to a run directory, so that a run whose cluster does not start leaves none, and
    one that is resumed stays as it was.

    Thread: the main thread, because of signal handlers.

    Yields:
        The signals, for ``drive_run``.

    Raises:
        ClusterError: The start failed.
        Interrupted: A signal came meanwhile.
        Requeued: SIGUSR1 came meanwhile, and the scheduler of the batch job starts the same command again.
    """
    signals = StopSignals()
    display.phase("starting Ray")
    with signals.caught(), cluster.started():
        signals.interrupting = stop_signals()
        if signals.first is not None:
            goes_on = batch_job().requeues and not signals.is_on_purpose
            error = Requeued if goes_on else Interrupted
            raise error(f"{signals.first.name} came before training began; nothing was changed")
        yield signals


def drive_run(
    run: RunDirectory,
    description: Description,
    plan: Plan,
    code: UserCode,
    cluster: Cluster,
    display: Progress,
    signals: StopSignals,
    back_to: Manifest | None = None,
    *,
    may_differ: bool,
    keeps_stop: bool = False,
) -> dict[str, Any]:
    """Take the lease of a run, write its documents, start the workers, and drive them to the end.

    Args:
        run: The run, which may not exist yet.
        description: Its description.
        plan: What follows from it.
        code: The user's code.
        cluster: Where the workers run; it is started.
        display: Shows progress.
        signals: From ``ready_to_drive``, in whose context this is called.
        back_to: The checkpoint to go back to first; None: go on from the newest good one.
        may_differ: Whether workers may train although they differ.
        keeps_stop: Whether a request to stop that has come before is for this driver too.

    Returns:
        The ``--json`` document.

    Raises:
        LauncherError: The run failed, or another driver took it over.
    """
    spec = description.spec
    signals.has_begun = True
    signals.interrupting = ()  # from now on a signal asks for a stop in order
    signals.raises_if_abandoned = True  # until the driver's loop runs: the store may not answer
    if plan.why_cpu:
        display.warn(plan.why_cpu)
    if not keeps_stop:
        run.clear_stop()  # a request to an earlier driver; one that comes after the lease is taken is for this driver
    run.take_lease()
    if back_to is not None:
        go_back(run, back_to)
    write_indexes(run, plan.indexes)  # before the environment that names them
    # From this write on the run exists, and can be resumed from anywhere.
    run.write_description(description.text, environment_with_attempt(run, plan, code))
    if code.submission_id is not None:
        run.submissions.mark_taken(code.submission_id)
    run.stay_alive()
    tracker = _open_tracker(run, description, display)
    run.stay_alive()
    events = run.events().read()
    state = _state_so_far(run, spec, plan, events)
    run.stay_alive()
    run_log = RunLog(spec=spec, plan=plan, run=run, state=state, display=display, tracker=tracker, events=events)
    stop = StopConditions(spec, run_log, signals, batch_job())
    driver = Driver(spec=spec, run_url=run.url, run_log=run_log, stop=stop, first_workers=first_workers(events))

    def make_membership() -> Membership:
        task = _make_task(spec, run, code, plan, may_differ=may_differ)
        return Membership(cluster.group(task, places_of(spec.workers, plan.gpus)), spec.workers, cluster.nodes)

    signals.raises_if_abandoned = False
    try:
        with run_log:
            driver.drive(make_membership)
    except LauncherError as error:
        error.document = run_log.document()
        raise
    finally:
        _finish(run, spec.name, run_log, tracker, signals)
    return run_log.document()


def _finish(run: RunDirectory, name: str, run_log: RunLog, tracker: Tracker, signals: StopSignals) -> None:
    """Draw the pictures and finish the tracker's run. Ctrl-C cuts that short, and does not hide how the run ended."""
    display, state = run_log.display, run_log.state
    try:
        signals.interrupting = ABANDONING  # the others have nothing left to stop
        pictures = _write_pictures(run, name, display)
        summary = {name: value for name, value in run_log.document().items() if isinstance(value, (int, float, str))}
        summary |= {f"time/{part}": seconds for part, seconds in state.time.items()}
        tracker.finish(summary, pictures, succeeded=state.status != "failed")
    except KeyboardInterrupt:
        display.warn("interrupted: pictures may be missing, and the tracker may lack the end of the run")
    if tracker.sync_command is not None:
        display.message(f"W&B: recorded offline; upload it with: {tracker.sync_command}")


def _make_task(spec: JobSpec, run: RunDirectory, code: UserCode, plan: Plan, *, may_differ: bool) -> Task:
    """Return the task that every training process of the run gets."""
    return replace(
        code.task(ENTRY, run.url, spec),
        hang_timeout_s=spec.workers.hang_timeout_s,
        first_step_timeout_s=spec.workers.first_step_timeout_s or math.inf,
        data_fingerprint=plan.data_fingerprint,
        indexes=digests_of(plan.indexes),
        may_differ=may_differ or not spec.train.exact,
    )


def _state_so_far(run: RunDirectory, spec: JobSpec, plan: Plan, events: Sequence[Mapping[str, Any]]) -> RunState:
    """Return the state that earlier drivers of the run have left in its directory."""
    status, state = run.read_status(), RunState()
    if status is not None and "seconds" in status:  # else a driver took the lease, and never began
        state.seconds, state.best = status["seconds"], status["best"]
        state.time = taken_over(status["time"], status.get("unsaved", {}))
        state.failure, state.worker_hours = status.get("failure"), status.get("worker_hours", 0.0)
        state.last_saves_s, state.validation_s = status.get("last_saves_s", []), status.get("validation_s", 0.0)
    for event in events:
        if event["kind"] == "attempt_started":  # written at once; the status of a killed driver may be older
            state.attempts = event["attempt"] + 1
    for row in run.metrics().read():
        state.metrics |= {name: value for name, value in row.items() if "/" in name}
    steps = run.checkpoints.steps()
    if steps:
        state.step, state.epoch = steps[-1], steps[-1] // plan.steps_per_epoch
        state.saved_step = steps[-1]
        state.samples = steps[-1] * spec.train.global_batch
        with contextlib.suppress(CheckpointError):  # the workers report it and use the checkpoint before
            state.state_sha256 = run.checkpoints.manifest(steps[-1]).state_sha256
    return state


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
    """Draw the pictures of the run and write them; return them by name.

    A store that fails now only causes a warning, so that it does not hide how the run ended.
    """
    try:
        pictures = draw(run.metrics().read(), run.read_matrices(), name)
        run.check_lease()
        for picture, png in pictures.items():
            run.write_picture(picture, png)
    except StorageError as error:
        display.warn(f"the pictures were not written: {error}")
        return {}
    except SupersededError:  # the error that ended the run says so
        return {}
    return pictures
