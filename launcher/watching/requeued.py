"""Ends the wait of a run that the scheduler of its batch job was to start again."""

from cluster.run.lease import SupersededError
from cluster.run.run_directory import RunDirectory
from launcher.driver.pending_writes import event_row
from launcher.watching.status import LONG_SILENCE_S, read_without_checkpoints, without_driver


def end_requeued(run: RunDirectory) -> None:
    """Record that a run which its scheduler was to start again is stopped, once its job has ended.

    Such a run is requeued, or its last driver is lost. A run with another status stays as it is.

    So does one that was submitted since: a later lease would make that submission count no more.

    This process takes the lease for that, like a driver: one that plans at this moment sees that somebody has had the
    run since it looked, and leaves it.
    """
    told = read_without_checkpoints(run, LONG_SILENCE_S)["status"]
    status = run.read_status()  # right before the lease, for a driver that has come meanwhile
    if status is None or (told, status["status"]) not in (("requeued", "requeued"), ("failed", "running")):
        return
    try:
        run.take_lease()
        events = run.events()
        events.append(event_row("stopped", {"step": status["step"]}))
        events.flush()
        run.write_status(without_driver(status) | {"status": "stopped", "requeued": None, "error": None})
    except SupersededError:  # another driver has just taken it
        return
