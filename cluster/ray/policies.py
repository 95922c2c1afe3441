"""Steering Ray Train: how many agents there are, and when they are replaced, is for the driver to say.

Ray Train has no public way to be told; its policies are made for that, and they are not public. They run in Ray
Train's controller and speak with the driver through its switchboard.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

from cluster.errors import one_line
from cluster.process.messages import AgentsLost, AgentsPlaced, AgentsUnplaced
from cluster.ray.cluster import last_line

_CONTROLLER_WAIT_S = 0.5
_RENEWAL_INTERVAL_S = 45.0
"""How often the autoscaler is asked again; a request expires after three minutes."""
_generation = 0
_room: Any = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """The agents that the driver wants.

    Attributes:
        generation: Another number means other agents, even if they are as many.
        num_workers: How many; 0: none for now, and no room is held.
        without: The nodes, by id, that are to hold none.
        is_asked_for: An autoscaler is to be asked for room for as many as there may be.
        is_over: None any more.
    """

    generation: int = 0
    num_workers: int = 0
    without: frozenset[str] = frozenset()
    is_asked_for: bool = False
    is_over: bool = False


def own_generation() -> int:
    """The generation of this agent; in Ray Train's controller, that of the agents it has begun to start last."""
    return _generation


def be_of_generation(generation: int) -> None:
    """Sets it. The controller does so when it decides to start agents, and has each of them do so before it runs.

    Ray copies each of the classes below into the controller by itself, globals included; a function of this module it
    imports. So the classes share one number, as long as they reach it through these functions.
    """
    global _generation
    _generation = generation


def hold_room(room: Any) -> None:
    """In Ray Train's controller, keeps the placement group of the agents; None: there is none any more."""
    global _room
    _room = room


def let_go_of_room() -> None:
    """In Ray Train's controller, removes the placement group of the agents, and with it the agents, if there is one."""
    if _room is not None:
        _room.shutdown()
    hold_room(None)


def steered_trainer(switchboard: Any) -> type:
    """Ray Train's trainer without torch and without helpers that we have no use for, its policies asking the driver.

    Args:
        switchboard: The way to the driver.
    """
    import ray
    from ray.exceptions import RayError

    from cluster.ray.private_train import (
        ControllerCallback,
        ControllerError,
        DataParallelTrainer,
        FailureConfig,
        FailureDecision,
        FailurePolicy,
        FixedScalingPolicy,
        NoopDecision,
        ResizeDecision,
        WorkerGroupCallback,
        WorkerGroupError,
        WorkerGroupStartupTimeoutError,
    )

    unused = {"DatasetsCallback", "PlacementGroupCleanerCallback"}

    class Steering(FixedScalingPolicy):
        """Starts the agents that the driver wants, when it wants others than there are; keeps the autoscaler asked."""

        context: Any = None
        asked_at = -math.inf
        """When the autoscaler was asked last."""

        def after_controller_start(self, train_run_context: Any) -> None:
            self.context = train_run_context  # Ray Train would ask the autoscaler now

        def make_decision_for_non_running_worker_group(self) -> Any:
            return self._decide(_CONTROLLER_WAIT_S)

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:  # noqa: ARG002  # by their names
            # What is asked for is what the whole cluster is to hold, whoever uses it. Without the requests of those
            # that run, that of a run which waits would be met by the nodes that they use.
            return self._decide(0.0)

        def _ask_autoscaler(self) -> None:
            # Also a request that failed is repeated no sooner: each holds up the controller for five seconds.
            if time.monotonic() - self.asked_at <= _RENEWAL_INTERVAL_S:
                return
            is_first = not self._has_asked
            self.asked_at = time.monotonic()
            if is_first:
                super().after_controller_start(self.context)
            else:
                self._send_resource_request()

        @property
        def _has_asked(self) -> bool:
            return self.asked_at > -math.inf

        def _decide(self, wait_s: float) -> Any:
            wanted = ray.get(switchboard.wanted_after.remote(own_generation(), wait_s))
            if wanted.is_over and wait_s:
                if self._has_asked:  # in Ray 2.55 the error ends the controller without before_controller_shutdown
                    self._cancel_resource_request()
                raise RuntimeError("the run is over, and no agents are there to end with it")
            if wanted.is_asked_for:
                self._ask_autoscaler()
            if wanted.is_over or wanted.generation == own_generation():
                return NoopDecision()
            be_of_generation(wanted.generation)
            if wanted.num_workers:
                return ResizeDecision(wanted.num_workers, self.scaling_config._resources_per_worker_not_none)
            let_go_of_room()  # Ray Train cannot be without agents but after a failure: it finds these dead
            return NoopDecision()

        async def before_controller_shutdown(self) -> None:
            if self._has_asked:
                await super().before_controller_shutdown()

    class Telling(FailurePolicy):
        """Tells the driver which agents were lost, and leaves the rest to it."""

        def make_decision(self, training_failed_error: BaseException) -> Any:
            is_over = ray.get(switchboard.post_of_controller.remote([self._told(training_failed_error)]))
            return FailureDecision.RAISE if is_over else FailureDecision.RETRY

        def _told(self, error: BaseException) -> AgentsLost | AgentsUnplaced:
            cause = error.controller_failure if isinstance(error, ControllerError) else error
            if isinstance(cause, WorkerGroupStartupTimeoutError):
                return AgentsUnplaced(generation=own_generation())
            failures = getattr(error, "worker_failures", {})
            lost = {rank: why_lost(failure) for rank, failure in failures.items()}
            reason = "" if isinstance(error, WorkerGroupError) else one_line(error)
            return AgentsLost(generation=own_generation(), lost=lost, reason=reason)

    class Census(ControllerCallback, WorkerGroupCallback):
        """Tells the driver on which nodes room is held for agents: from before they speak until they are gone.

        And it tells Ray on which nodes there is to be none, and each agent its generation.
        """

        def on_controller_start_worker_group(self, **_: Any) -> dict[str, str] | None:
            wanted = ray.get(switchboard.wanted_after.remote(0, 0.0))
            return {"ray.io/node-id": f"!in({','.join(sorted(wanted.without))})"} if wanted.without else None

        def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:  # noqa: ARG002  # by its name
            # Ray Train lets go of the other agents' room when it starts new ones, and for them the driver waits for
            # room. Until then Ray would hold a place for a lost agent wherever it finds one.
            let_go_of_room()
            self._tell([])

        def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
            # First of all, so that the driver knows of the nodes on which nothing of ours can be imported.
            self._tell([worker.metadata.node_id for worker in workers])
            # They do not ask, for one that asks late would be told the generation of those that have replaced it.
            answers = [worker.execute_async(be_of_generation, own_generation()) for worker in workers]
            failures = dict[int, Exception]()
            for rank, answer in enumerate(answers):
                try:
                    ray.get(answer)
                except RayError as error:  # of itself it would not say whose
                    failures[rank] = error
            if failures:
                raise WorkerGroupError("agents did not start", failures)
            return {}

        def after_worker_group_start(self, worker_group: Any) -> None:
            hold_room(worker_group.get_worker_group_state().placement_group_handle)

        def after_worker_group_shutdown(self, worker_group_context: Any) -> None:  # noqa: ARG002  # by its name
            hold_room(None)
            self._tell([])

        def _tell(self, nodes: list[str]) -> None:
            ray.get(switchboard.post.remote([AgentsPlaced(generation=own_generation(), nodes=nodes)]))

    class SteeredTrainer(DataParallelTrainer):
        # Should Ray drop this hook, nobody calls it, and the helpers are back.
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [Census(), *(callback for callback in callbacks if type(callback).__name__ not in unused)]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            steering = Steering(parts["scaling_policy"].scaling_config)
            policies = {"scaling_policy": steering, "failure_policy": Telling(FailureConfig())}
            return super()._initialize_and_run_controller(**(parts | policies))

    return SteeredTrainer


_SAID_FIRST = ("running low on memory", "has been hanging")


def why_lost(error: BaseException) -> str:
    """What Ray says of an actor that it lost, in a line, without the advice that follows."""
    # Ray says the last thing last; but its memory monitor and a worker that does not answer come before much else.
    telling = (line for line in str(error).splitlines() if any(sign in line for sign in _SAID_FIRST))
    line = next(telling, last_line(error))
    reason = line.partition(" Some common causes")[0].partition("Worker exit detail: ")
    return (reason[2] or reason[0]).rstrip(".")
