"""What a training process tells of itself without being asked."""

import multiprocessing
import threading
from multiprocessing.connection import Connection

from cluster.process import agent_link, fork_server
from cluster.process.activity import Activity
from cluster.process.agent_link import AgentLink
from cluster.process.messages import Beat
from cluster.process.orders import Stop


def two_steps(connection: Connection) -> None:
    """Begins its second step when it is told to stop; regular beats are an hour apart."""
    agent_link._BEAT_INTERVAL_S = 3600.0
    told = AgentLink(connection, Activity())
    told.activity.mark("data", 7)
    told.stop_wanted.wait()
    told.activity.mark("data", 8)
    threading.Event().wait()


def test_the_end_of_the_first_step_is_told_at_once() -> None:
    """A process that stops a moment later is noticed as soon as in any step, though its first may take long."""
    fork_server.start([__name__])
    ours, theirs = multiprocessing.Pipe()
    process = fork_server.fork(two_steps, (theirs,), "two steps")
    theirs.close()
    first = next_beat(ours)
    ours.send(Stop())
    second = next_beat(ours)
    process.kill()
    process.join()
    ours.close()
    assert (first.is_first_step, second.step, second.is_first_step) == (True, 8, False)


def next_beat(connection: Connection) -> Beat:
    assert connection.poll(60)
    (beat,) = connection.recv()
    assert isinstance(beat, Beat)
    return beat
