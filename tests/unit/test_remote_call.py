"""One call in the place of a worker: what is reserved for it, for how long, and what becomes of what is lost.

Ray itself does not run: its actors are objects of this process, and it has room when the test says so.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import ray  # takes a second or two
from ray import exceptions

from cluster.capacity import Node, WorkerResources
from cluster.errors import ClusterError, DescriptionError, LauncherError, StorageError
from cluster.process import fork_server
from cluster.process.orders import Task
from cluster.process.workplace import Call
from cluster.ray import remote_call
from cluster.ray.remote_call import call_there

WORKER = WorkerResources(cpus=2.0, gpus=1, accelerator="H100")
CALL = Call(
    task=Task(entry="job:try_out", run_url="s3://runs/job", import_paths=(), working_directory="."),
    modules=("job",),
    resources=WORKER,
    wait_s=60.0,
    start_timeout_s=30.0,
    timeout_s=1800.0,
)
WHERE = "on node 10.0.0.2"


class LocalActor:
    """A handle of an object in this process; calls return a promise that ``Ray.get`` keeps."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)
        return SimpleNamespace(remote=lambda *args: Promise(method, args))


class Promise:
    """What a call of an actor returns; of a generator, a promise for each value that it yields."""

    def __init__(self, method: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._method, self._args = method, args

    def __call__(self) -> Any:
        return self._method(*self._args)

    def __iter__(self) -> Iterator[Callable[[], Any]]:
        return (partial(lambda value: value, value) for value in self())


class Ray:
    """Ray, as far as a call needs it."""

    def __init__(self) -> None:
        self.full_for = 0
        """How often it still has no room when it is asked."""
        self.full_again_for: list[int] = []
        """The same, from the next tries on."""
        self.is_late = False
        """The next process does not start in time."""
        self.node = "b"
        """That has room."""
        self.outcomes: list[Any] = []
        """What becomes of the function, each time it is called: a result, or an exception."""
        self.told: list[str] = []
        """What the function tells each time."""
        self.reserved: list[dict[str, float]] = []
        """What is reserved now."""
        self.actors: list[tuple[str, dict[str, Any]]] = []
        """The actors that were started, and with which options."""
        self.calls: list[tuple[Call, list[dict[str, float]]]] = []
        """The calls of the function, and what was reserved meanwhile."""
        self.seconds = 0.0

    def placement_group(self, bundles: list[dict[str, float]]) -> Any:
        self.reserved += bundles
        if self.calls and self.full_again_for:
            self.full_for = self.full_again_for.pop(0)
        return SimpleNamespace(bundles=bundles, wait=self._wait)

    def _wait(self, timeout_seconds: int) -> bool:
        if self.full_for:
            self.full_for -= 1
            self.seconds += timeout_seconds
            return False
        return True

    def remove_placement_group(self, place: Any) -> None:
        for bundle in place.bundles:
            self.reserved.remove(bundle)

    def remote(self, **options: Any) -> Callable[[type], Any]:
        def start(actor: type, *args: Any) -> LocalActor:
            self.actors.append((actor.__name__, options))
            return LocalActor(actor(*args))

        return lambda actor: SimpleNamespace(remote=partial(start, actor))

    def get(self, promise: Callable[[], Any], timeout: float | None = None) -> Any:
        if timeout is not None and self.is_late:
            self.is_late = False
            raise exceptions.GetTimeoutError
        return promise()

    def call_here(self, call: Call, tell: Callable[[str], None]) -> Any:
        self.calls.append((call, [*self.reserved]))
        for text in self.told:
            tell(text)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Ray:
    fake = Ray()
    node = partial(Node, resources={}, free={}, drains_at=None)
    nodes = [node(id="a", address="10.0.0.1", is_here=True), node(id="b", address="10.0.0.2", is_here=False)]
    for name in ("placement_group", "remove_placement_group"):
        monkeypatch.setattr(ray.util, name, getattr(fake, name))
    monkeypatch.setattr(ray.util, "placement_group_table", lambda _: {"bundles_to_node_id": {0: fake.node}})
    monkeypatch.setattr(ray, "remote", fake.remote)
    monkeypatch.setattr(ray, "get", fake.get)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [3])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    monkeypatch.setattr(remote_call, "nodes", lambda: nodes)
    monkeypatch.setattr(remote_call, "call_here", fake.call_here)
    for name in ("start", "use"):
        monkeypatch.setattr(fork_server, name, lambda *_: None)
    monkeypatch.setattr(fork_server, "own_address", lambda: "/tmp/server")
    return fake


def make_call(cluster: Ray, told: list[str] | None = None, hosts: dict[str, Any] | None = None) -> Any:
    said, kept = [] if told is None else told, {} if hosts is None else hosts
    return call_there(CALL, kept, said.append, clock=lambda: cluster.seconds)


def lost() -> exceptions.RayError:
    return exceptions.ActorDiedError()


def test_it_has_what_a_worker_has_for_as_long_as_it_takes(cluster: Ray) -> None:
    cluster.outcomes, told = ["tried"], list[str]()

    assert make_call(cluster, told) == "tried"

    ((call, reserved),) = cluster.calls
    assert reserved == [WORKER.amounts()]
    assert (call.task.on_gpu, call.task.run_url, call.timeout_s) == (True, "s3://runs/job", 1800.0)
    (caller,) = (options for name, options in cluster.actors if name == "_Caller")
    assert (caller["num_cpus"], caller["num_gpus"]) == (2.0, 1)
    assert caller["scheduling_strategy"].placement_group.bundles == [WORKER.amounts()]
    assert told == [WHERE]
    assert cluster.reserved == []


def test_what_the_function_tells_is_told(cluster: Ray) -> None:
    cluster.outcomes, cluster.told, told = ["tried"], ["listing", "listing more"], list[str]()

    assert make_call(cluster, told) == "tried"

    assert told == [WHERE, f"{WHERE}: listing", f"{WHERE}: listing more"]


def test_room_is_waited_for_and_that_is_said_once(cluster: Ray) -> None:
    cluster.outcomes, cluster.full_for, told = ["tried"], 5, list[str]()

    assert make_call(cluster, told) == "tried"

    assert told == ["waiting for room for one worker of 2 CPU, 1 GPU, H100", WHERE]


def test_but_not_for_ever(cluster: Ray) -> None:
    cluster.full_for = 1000

    with pytest.raises(ClusterError) as caught:
        make_call(cluster)

    assert str(caught.value) == (
        "there is no room for one worker of 2 CPU, 1 GPU, H100, after 60 s of waiting "
        "(workers.wait_s); free or add nodes, or lower what a worker reserves"
    )
    assert 60 < cluster.seconds < 70
    assert (cluster.reserved, cluster.actors) == ([], [])


def test_all_tries_of_a_call_wait_no_longer_together_than_one_may(cluster: Ray) -> None:
    cluster.full_for, cluster.full_again_for, cluster.outcomes = 30, [30, 1], [lost(), lost(), "tried"]

    with pytest.raises(ClusterError, match="after 60 s of waiting"):
        make_call(cluster)

    assert (len(cluster.calls), cluster.seconds, cluster.reserved) == (2, 61, [])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DescriptionError("model: no", "Traceback ..."), "node 10.0.0.2: model: no"),
        (StorageError("code: gone"), "node 10.0.0.2: code: gone"),
        (ClusterError("there is no /home/me", cause="environment"), "node 10.0.0.2: there is no /home/me"),
        (ChildProcessError("was killed by SIGKILL"), "on node 10.0.0.2 was killed by SIGKILL"),
        (TimeoutError("has not returned within 9 s"), "on node 10.0.0.2 has not returned within 9 s"),
        (TimeoutError(110, "timed out"), "on node 10.0.0.2 [Errno 110] timed out"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Exception) else "",
)
def test_errors_of_ours_name_the_node_and_stay_what_they_are(cluster: Ray, error: Exception, message: str) -> None:
    cluster.outcomes, about = [error], vars(error).copy()
    if isinstance(error, LauncherError):
        about["node"] = "10.0.0.2"

    with pytest.raises(type(error)) as caught:
        make_call(cluster)

    assert (type(caught.value), str(caught.value), vars(caught.value)) == (type(error), message, about)
    assert (len(cluster.calls), cluster.reserved) == (1, [])


def test_what_is_no_error_of_ours_is_one_line(cluster: Ray) -> None:
    cluster.outcomes = [exceptions.RayTaskError("call", "Traceback ...\nKeyError: 'x'", KeyError("x"))]

    with pytest.raises(ClusterError, match="^node 10.0.0.2: KeyError: 'x'$"):
        make_call(cluster)

    assert (len(cluster.calls), cluster.reserved) == (1, [])


def test_what_is_lost_is_tried_again(cluster: Ray) -> None:
    cluster.outcomes, cluster.is_late, told = [lost(), "tried"], True, list[str]()

    assert make_call(cluster, told) == "tried"

    assert told[0] == told[2] == told[4] == WHERE
    assert told[1] == "node 10.0.0.2: processes did not start within workers.start_timeout_s; try 2 of 3"
    assert told[3].startswith("node 10.0.0.2: ")
    assert told[3].endswith("; try 3 of 3")
    assert [reserved for _, reserved in cluster.calls] == [[WORKER.amounts()]] * 2, "one at a time"
    assert cluster.reserved == []


def test_so_is_a_process_that_is_lost_with_its_fork_server(cluster: Ray) -> None:
    cluster.outcomes, told = [fork_server.ServerLostError("was lost with its fork server"), "tried"], list[str]()

    assert make_call(cluster, told) == "tried"

    lost_there = "node 10.0.0.2: the process of the call was lost with its fork server; try 2 of 3"
    assert told == [WHERE, lost_there, WHERE]
    assert cluster.reserved == []


def test_but_not_for_ever_either(cluster: Ray) -> None:
    cluster.outcomes = [lost(), lost(), lost()]

    with pytest.raises(ClusterError) as caught:
        make_call(cluster)

    assert str(caught.value).startswith("node 10.0.0.2: ")
    assert str(caught.value).endswith("; that was try 3 of 3, look at the nodes")
    assert "\n" not in str(caught.value)
    assert cluster.reserved == []


def test_nothing_is_reserved_after_ctrl_c(cluster: Ray) -> None:
    cluster.outcomes = [KeyboardInterrupt()]

    with pytest.raises(KeyboardInterrupt):
        make_call(cluster)

    assert cluster.reserved == []


def test_ray_that_is_gone_hides_no_error(cluster: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(_: object) -> None:
        raise exceptions.RaySystemError("gone")

    monkeypatch.setattr(ray.util, "remove_placement_group", remove)
    cluster.outcomes = [DescriptionError("model: no")]

    with pytest.raises(LauncherError, match="model: no"):
        make_call(cluster)


def test_the_fork_server_of_a_node_is_kept_for_what_comes_later(cluster: Ray) -> None:
    cluster.outcomes, hosts = ["first", "second"], dict[str, Any]()

    assert [make_call(cluster, hosts=hosts) for _ in range(2)] == ["first", "second"]

    ((_, options),) = (actor for actor in cluster.actors if actor[0] == "_Host")
    assert (options["num_cpus"], options["label_selector"]) == (0, {"ray.io/node-id": "b"})
    assert hosts.keys() == {"b"}


def test_one_that_is_lost_is_replaced(cluster: Ray) -> None:
    def die() -> None:
        raise lost()

    cluster.outcomes, hosts = ["tried"], {"b": LocalActor(SimpleNamespace(address=die))}

    assert make_call(cluster, hosts=hosts) == "tried"

    assert [name for name, _ in cluster.actors] == ["_Caller", "_Caller", "_Host"]


def test_beside_the_driver_its_own_is_used(cluster: Ray) -> None:
    cluster.outcomes, cluster.node, told, hosts = ["tried"], "a", list[str](), dict[str, Any]()

    assert make_call(cluster, told, hosts) == "tried"

    assert [name for name, _ in cluster.actors] == ["_Caller"]
    assert (told, hosts) == (["on node 10.0.0.1"], {})
