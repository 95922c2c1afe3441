"""Groups of agents that the driver starts one after the other, and what Ray Train's controller says of them.

Ray itself does not run: its actors are objects of one process, which ends with the test.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.capacity import Node, Places, WorkerResources
from cluster.process import fork_server
from cluster.process.orders import Task
from cluster.process.placement_messages import AgentsLost, AgentsPlaced, AgentsUnplaced
from cluster.ray import worker_group
from cluster.ray.policies import Wanted, steered_trainer
from tests.processes import state, wait_until

HERE = __name__


class LocalActor:
    """A handle of an object in this process: calls return what they come to, and not a promise of it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)
        return SimpleNamespace(remote=lambda *args: asyncio.run(method(*args)))


def local_group() -> worker_group.WorkerGroup:
    """The product's own, in a process that gets no Ray any more."""
    modules: Any = sys.modules
    modules["ray"] = SimpleNamespace(
        get=lambda answer: answer,
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "here"),
        remote=lambda **_: lambda actor: SimpleNamespace(remote=lambda: LocalActor(actor())),
    )
    modules["ray.train"] = SimpleNamespace(RunConfig=SimpleNamespace, ScalingConfig=SimpleNamespace)
    replaced: Any = worker_group
    replaced.steered_trainer = lambda *_: lambda *_, **__: SimpleNamespace(fit=lambda: None)
    replaced.host_on = lambda node, modules: hosts.append((node, modules))
    task = Task(entry=f"{HERE}:fork_from", run_url="", import_paths=(), working_directory=".")
    places = Places(resources=WorkerResources(cpus=1.0, gpus=0, accelerator=None), least=1, most=1, placement="pack")
    group = worker_group.WorkerGroup(task.entry, places, {}, is_shared=False, may_grow=False)
    group.assign(task)
    return group


hosts: list[tuple[str, list[str]]] = []
"""The nodes that were given a fork server, and what it imports."""


def node(name: str, cpus: float) -> Node:
    resources = {"CPU": cpus}
    return Node(id=name, address=name, resources=resources, free=resources, drains_at=None, is_here=name == "here")


def server_of() -> int:
    return os.getppid()


def fork_from(address: str) -> int:
    """The server that another process finds at an address."""
    fork_server.use(address)
    return fork_server.call(f"{HERE}:server_of")


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: state(pid) == "")


def lose_server_between_groups() -> tuple[list[int], list[int], list[int]]:
    """Of two groups the generations, the servers of this process, and those that agents find where they are told."""
    group = local_group()
    group.prepare([node("here", cpus=1.0)])
    generations, own, found = list[int](), list[int](), list[int]()
    for _ in range(2):
        generations.append(group.start(1, frozenset()))
        own.append(fork_server.call(f"{HERE}:server_of"))
        found.append(fork_server.call(f"{HERE}:fork_from", group._switchboard.task.remote().fork_server))
        kill(own[-1])
    group.close()
    return generations, own, found


def test_each_group_has_a_generation_and_a_server_that_lives() -> None:
    fork_server.start([HERE])
    generations, own, found = fork_server.call(f"{HERE}:lose_server_between_groups")

    assert generations == [1, 2]
    assert own[0] != own[1]
    assert found == own


def prepare_nodes() -> tuple[list[tuple[str, list[str]]], str | None]:
    """The nodes that a group has import ahead, each once; and the server that agents beside the driver are told of."""
    group = local_group()
    for _ in range(2):
        group.prepare([node("here", cpus=0.0), node("a", cpus=2.0), node("small", cpus=0.5)])
    group.start(1, frozenset())
    group.close()
    return hosts, group._switchboard.task.remote().fork_server


def test_only_nodes_that_can_hold_agents_import_ahead() -> None:
    fork_server.start([HERE])
    prepared, server = fork_server.call(f"{HERE}:prepare_nodes")

    assert prepared == [("a", [HERE, "cluster.process.agent"])]
    assert server is None, "none live beside the driver"


class Worker:
    """A worker of Ray Train, which keeps in mind what its process would call; that fails if the worker lacks it."""

    def __init__(self, *, lacks: bool = False) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.metadata = SimpleNamespace(node_id="a")
        self._lacks = lacks

    def execute_async(self, function: Any, argument: Any) -> Callable[[], None]:
        """The answer, for the function that stands for ``ray.get``."""
        return partial(self._call, function.__name__, argument)

    def _call(self, name: str, argument: Any) -> None:
        from ray.exceptions import RayTaskError

        if self._lacks:
            raise RayTaskError(name, "No module named 'cluster'", ModuleNotFoundError())
        self.calls.append((name, argument))


class Controller:
    """What Ray Train's controller has of ours, and what the driver is told by that; for a process of its own."""

    def __init__(self, *wanted: Wanted) -> None:
        """``wanted``: what the driver answers, one after the other."""
        import ray
        from ray.train import ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        on_ray: Any = ray
        on_ray.get = lambda answer: answer() if callable(answer) else answer
        trainer_class: Any = DataParallelTrainer
        trainer_class._create_default_callbacks = lambda _: []
        trainer_class._initialize_and_run_controller = lambda _, **parts: parts
        left = list(wanted)
        self.told: list[dict[str, Any]] = []
        switchboard = SimpleNamespace(
            wanted_after=SimpleNamespace(remote=lambda *_: left.pop(0)),
            post=SimpleNamespace(remote=self.told.extend),
            post_of_controller=SimpleNamespace(remote=self.told.extend),
        )
        trainer: Any = object.__new__(steered_trainer(switchboard))
        (self.census,) = trainer._create_default_callbacks()
        scaling = SimpleNamespace(scaling_config=ScalingConfig(num_workers=2))
        parts = trainer._initialize_and_run_controller(scaling_policy=scaling, failure_policy=None)
        self.scaling, self.failing = parts["scaling_policy"], parts["failure_policy"]
        self.rooms_left = 0
        """How many placement groups were removed."""

    def decide(self, *, is_running: bool = False) -> int | None:
        """How many workers the policy starts; None: nothing changes."""
        if is_running:
            decision = self.scaling.make_decision_for_running_worker_group(None, None)
        else:
            decision = self.scaling.make_decision_for_non_running_worker_group()
        return getattr(decision, "num_workers", None)

    def started(self) -> None:
        """The workers of a group have started."""
        handle = SimpleNamespace(shutdown=self._leave_room)
        state = SimpleNamespace(placement_group_handle=handle)
        self.census.after_worker_group_start(SimpleNamespace(get_worker_group_state=lambda: state))

    def failed(self, error: Exception) -> None:
        """As Ray Train goes about a failure."""
        self.failing.make_decision(error)
        self.census.before_controller_execute_failure_decision(None)

    def _leave_room(self) -> None:
        self.rooms_left += 1


def steer_two_groups() -> tuple[list[tuple[str, Any]], list[dict[str, Any]]]:
    """What the workers of two groups are told, and what the driver is told of these: the first is lost.

    Beside the worker of the second group there are two that lack what is called.
    """
    from ray.train.v2.api.exceptions import WorkerGroupError

    controller = Controller(Wanted(1, 2), Wanted(2, 2))
    worker, lacking = Worker(), Worker(lacks=True)
    controller.decide()
    controller.census.before_init_train_context([worker])
    controller.started()
    controller.failing.make_decision(RuntimeError("gone"))
    controller.decide()
    with pytest.raises(WorkerGroupError) as refused:
        controller.census.before_init_train_context([lacking, worker, lacking])
    controller.failing.make_decision(refused.value)
    return worker.calls, controller.told


def steer_without_room() -> tuple[list[int | None], list[int], list[dict[str, Any]]]:
    """What is decided, how many rooms are left by then, and what the driver is told.

    The driver lets go of a group, of which Ray Train then notices that it is dead; the next one finds no room.
    """
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    none = Wanted(2, 0)
    controller = Controller(Wanted(1, 2), none, none, none, Wanted(3, 2))
    decided, rooms = [controller.decide()], list[int]()
    controller.started()
    for is_running in (True, True):
        decided.append(controller.decide(is_running=is_running))
        rooms.append(controller.rooms_left)
    controller.failed(WorkerGroupError("dead", {0: RuntimeError("dead")}))
    rooms.append(controller.rooms_left)
    decided += [controller.decide(), controller.decide()]
    controller.failed(ControllerError(WorkerGroupStartupTimeoutError(2)))
    return decided, rooms, controller.told


def ask_for_room(is_asked_for: bool) -> list[int]:
    """How often an autoscaler was asked by then."""
    from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

    policy: Any = FixedScalingPolicy
    asked = list[None]()
    policy._send_resource_request = lambda _: asked.append(None)
    controller, counts = Controller(*[Wanted(1, 2, is_asked_for=is_asked_for)] * 5), list[int]()
    controller.scaling.after_controller_start(SimpleNamespace(run_id="one"))
    assert not asked, "the run may yet be refused"
    for is_running in (False, True, True):
        controller.decide(is_running=is_running)
        counts.append(len(asked))
    controller.scaling.asked_at -= 60.0  # a minute later
    for is_running in (True, True):
        controller.decide(is_running=is_running)
        counts.append(len(asked))
    return counts


def end_while_waiting(is_asked_for: bool) -> int:
    """How often what was asked of an autoscaler has been taken back, when a run ends before it has workers."""
    from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

    policy: Any = FixedScalingPolicy
    taken_back = list[None]()
    policy._send_resource_request = lambda _: None
    policy._cancel_resource_request = lambda _: taken_back.append(None)
    controller = Controller(Wanted(is_asked_for=is_asked_for), Wanted(is_over=True))
    controller.scaling.after_controller_start(SimpleNamespace(run_id="one"))
    controller.decide()
    with pytest.raises(RuntimeError, match="the run is over"):
        controller.decide()
    return len(taken_back)


def test_the_controller_says_of_which_generation_it_speaks() -> None:
    fork_server.start([HERE])
    calls, told = fork_server.call(f"{HERE}:steer_two_groups")

    assert calls == [("be_of_generation", 1), ("be_of_generation", 2)]
    placed, lost, placed_anew, refused = told
    assert placed == AgentsPlaced(generation=1, nodes=["a"])
    assert lost == AgentsLost(generation=1, lost={}, reason="gone")
    assert placed_anew == AgentsPlaced(generation=2, nodes=["a", "a", "a"])
    assert isinstance(refused, AgentsLost)
    assert (refused.generation, refused.reason) == (2, "")
    assert refused.lost.keys() == {0, 2}
    assert all("No module named 'cluster'" in reason for reason in refused.lost.values())


def test_room_is_let_go_of_when_the_driver_wants_none_and_a_lack_of_it_is_no_loss() -> None:
    fork_server.start([HERE])
    decided, rooms, told = fork_server.call(f"{HERE}:steer_without_room")

    assert decided == [2, None, None, None, 2]
    assert rooms == [1, 1, 1], "once"
    lost, _, unplaced, _ = told
    assert isinstance(lost, AgentsLost)
    assert lost.generation == 2
    assert unplaced == AgentsUnplaced(generation=3)


def test_an_autoscaler_is_asked_again_also_while_workers_run() -> None:
    fork_server.start([HERE])
    assert fork_server.call(f"{HERE}:ask_for_room", True) == [1, 1, 1, 2, 2]
    assert fork_server.call(f"{HERE}:ask_for_room", False) == [0, 0, 0, 0, 0]


def test_a_run_that_ends_while_it_waits_leaves_an_autoscaler_no_request() -> None:
    """Ray Train 2.55 does not shut its controller down after that, and a request lives for three minutes."""
    fork_server.start([HERE])
    assert fork_server.call(f"{HERE}:end_while_waiting", True) == 1
    assert fork_server.call(f"{HERE}:end_while_waiting", False) == 0
