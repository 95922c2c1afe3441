"""A call in the place of one worker on a Ray cluster, which reserves a worker's resources while the call lasts.

The reservation is a placement group of one bundle; Ray Train's have several. Ray says exactly when it has room for the
group, asks an autoscaler for room if there is none, and ends the processes in the group when it is removed.
"""

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

from cluster.errors import ClusterError, LauncherError
from cluster.process import fork_server
from cluster.process.workplace import Call, call_here, fork_from
from cluster.ray.cluster import last_line, nodes
from cluster.ray.fork_servers import host_on
from cluster.ray.policies import why_lost

_MOST_TRIES = 3
_LOOK_INTERVAL_S = 1
"""How long each wait for room lasts; Python handles Ctrl-C only between waits. Ray takes whole seconds."""


class _LostError(Exception):
    """A node or process that the call needs was lost; the call may succeed on another try."""


def call_there(
    call: Call, hosts: dict[str, Any], tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Any:
    """Make a call on a node that has room for one worker; try again elsewhere if the node or a process is lost.

    Args:
        call: The function, and what it needs.
        hosts: The actors that keep fork servers on nodes, by node id; new ones are added. A server lives as long as
            its actor is in here.
        tell: Called with a line about what the call waits for, where the function runs, or what it tells.
        clock: A monotonic clock, in seconds.

    Returns:
        What the function returns.

    Raises:
        ChildProcessError, TimeoutError, LauncherError: See ``call_here``.
        ClusterError: There was no room in time, the node cannot run the call, or every try was lost.
    """
    room = _Room(call, tell, clock)
    for number in range(1, _MOST_TRIES):
        try:
            return _call_once(call, hosts, tell, room)
        except _LostError as lost:
            tell(f"{lost}; try {number + 1} of {_MOST_TRIES}")
    try:
        return _call_once(call, hosts, tell, room)
    except _LostError as lost:
        raise ClusterError(f"{lost}; that was try {_MOST_TRIES} of {_MOST_TRIES}, look at the nodes") from lost


def _call_once(call: Call, hosts: dict[str, Any], tell: Callable[[str], None], room: "_Room") -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    with _reserved(call, room) as (place, node, address):
        tell(f"on node {address}")
        options: dict[str, Any] = {
            "num_cpus": call.resources.cpus,
            "num_gpus": call.resources.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(place),
        }
        with _named_errors(f"node {address}"):
            caller: Any = ray.remote(**options)(_Caller).remote()
            server = _server_on(node, call, hosts)
            ray.get(caller.started.remote(), timeout=call.start_timeout_s)
            answer, error = _answer_of(
                caller.call.remote(call, server), lambda what: tell(f"on node {address}: {what}")
            )
    if error is not None:
        raise _located(error, address)
    return answer


def _answer_of(promises: Iterable[Any], tell: Callable[[str], None]) -> tuple[Any, Exception | None]:
    """Return the last value of ``_Caller.call``; the ones before it are told."""
    import ray

    last: Any = None
    for promise in promises:
        last = ray.get(promise)
        if isinstance(last, str):
            tell(last)
    return cast(tuple[Any, Exception | None], last)


def _located(error: Exception, address: str) -> Exception:
    """Return the call's error with the node in its message; a lost fork server becomes a ``_LostError``."""
    if isinstance(error, fork_server.ServerLostError):
        return _LostError(f"node {address}: the process of the call {error}")
    if isinstance(error, LauncherError):
        error.args, error.node = (f"node {address}: {error}",), address
        return error
    kind = ChildProcessError if isinstance(error, ChildProcessError) else TimeoutError
    return kind(f"on node {address} {error}")  # their texts are predicates about the process


@contextmanager
def _reserved(call: Call, room: "_Room") -> Iterator[tuple[Any, str, str]]:
    """Reserve what one worker reserves; yield the placement group, and the id and address of its node."""
    import ray
    from ray.util import placement_group, placement_group_table, remove_placement_group

    with _named_errors("the reservation of one worker"):
        place = placement_group([call.resources.amounts()])
    try:
        with _named_errors("the reservation of one worker"):
            room.wait(place)
            node = placement_group_table(place)["bundles_to_node_id"][0]
            addresses = {each.id: each.address for each in nodes()}
        yield place, node, addresses.get(node, node)  # a node that has just died has no address
    finally:
        with suppress(ray.exceptions.RayError):  # Ray is gone, and the group with it
            remove_placement_group(place)


class _Room:
    """Waits for room, with one time limit over all tries of a call.

    Args:
        call: The call that needs room.
        tell: Called with a line about what is missing.
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, call: Call, tell: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._call, self._tell, self._clock = call, tell, clock
        self._waited_s = 0.0

    def wait(self, place: Any) -> None:
        """Return when the placement group is reserved.

        Raises:
            ClusterError: The time limit is over.
        """
        call, looked_at, is_told = self._call, self._clock(), False
        while not place.wait(timeout_seconds=_LOOK_INTERVAL_S):
            if not is_told:
                self._tell(f"waiting for room for one worker of {call.resources}")
                is_told = True
            now = self._clock()
            self._waited_s, looked_at = self._waited_s + now - looked_at, now
            if self._waited_s > call.wait_s:
                raise ClusterError(
                    f"there is no room for one worker of {call.resources}, after {call.wait_s:.0f} s of waiting "
                    "(workers.wait_s); free or add nodes, or lower what a worker reserves"
                )


def _server_on(node: str, call: Call, hosts: dict[str, Any]) -> str | None:
    """Return the address of a fork server on a node; workers that start there later fork from it, too."""
    import ray

    if node == ray.get_runtime_context().get_node_id():
        fork_server.start(call.modules)
        return fork_server.own_address()
    if node not in hosts:
        hosts[node] = host_on(node, call.modules)
    try:
        server: str | None = ray.get(hosts[node].address.remote(), timeout=call.start_timeout_s)
    except ray.exceptions.RayError:
        del hosts[node]  # the next try starts another actor
        raise
    return server


@contextmanager
def _named_errors(where: str) -> Iterator[None]:
    """Turn Ray's errors into ours; one that may not come again on another try becomes a ``_LostError``."""
    from ray import exceptions

    try:
        yield
    except exceptions.GetTimeoutError as error:
        raise _LostError(f"{where}: processes did not start within workers.start_timeout_s") from error
    except exceptions.RayTaskError as error:
        raise ClusterError(f"{where}: {last_line(error)}") from error
    except exceptions.RayError as error:
        raise _LostError(f"{where}: {why_lost(error)}") from error


class _Caller:
    """Ray actor: holds the resources of one worker; the process that it forks for a call inherits them."""

    def started(self) -> None:
        """Return when the actor has started."""

    def call(self, call: Call, server: str | None) -> Iterator[str | tuple[Any, Exception | None]]:
        """Yield what the function tells, then its result, or its error; Ray reports errors of this process."""
        import ray

        fork_from(server, call.modules)
        call = replace(call, task=replace(call.task, on_gpu=bool(ray.get_gpu_ids())))
        told = queue.SimpleQueue[Any]()
        with ThreadPoolExecutor(1, thread_name_prefix="call") as pool:
            made = pool.submit(call_here, call, told.put)
            made.add_done_callback(told.put)
            while (what := told.get()) is not made:
                yield what
            try:
                yield made.result(), None
            except (LauncherError, ChildProcessError, TimeoutError) as error:
                yield None, error
