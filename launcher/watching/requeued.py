"""Ends the wait of a run that the scheduler of its batch job was to start again."""

from cluster.run.lease import SupersededError
from cluster.run.run_directory import RunDirectory
from launcher.driver.pending_writes import event_row
from launcher.watching.status import read_without_checkpoints, without_driver


def end_requeued(run: RunDirectory) -> None:
    """Record that a requeued run is stopped, once its job has ended; a run with another status stays as it is.

    So does one that was submitted since: a later lease would make that submission count no more.

    This process takes the lease for that, like a driver: one that plans at this moment sees that somebody has had the
    run since it looked, and leaves it.
    """
    if read_without_checkpoints(run)["status"] != "requeued":
        return
    status = run.read_status()  # right before the lease, for a driver that has come meanwhile
    if status is None or status["status"] != "requeued":
        return
    try:
        run.take_lease()
        events = run.events()
        events.append(event_row("stopped", {"step": status["step"]}))
        events.flush()
        run.write_status(without_driver(status) | {"status": "stopped", "requeued": None})
    except SupersededError:  # another driver has just taken it
        return
