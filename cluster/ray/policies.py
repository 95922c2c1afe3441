"""Policies that let the driver steer Ray Train: how many agents there are, and when they are replaced.

Ray Train has no public interface for that. Its policies have that purpose and are private; ``private_train`` says what
these subclasses rely on. They run in Ray Train's controller, and reach the driver through its switchboard.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

from cluster.errors import one_line
from cluster.process.placement_messages import AgentsLost, AgentsPlaced, AgentsUnplaced
from cluster.ray.cluster import last_line

_CONTROLLER_WAIT_S = 0.5
_RENEWAL_INTERVAL_S = 45.0
"""Interval at which a request to the autoscaler is renewed; Ray expires it after three minutes."""
_generation = 0
_room: Any = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """The agents that the driver wants.

    Attributes:
        generation: A new number asks for new agents, even if their number is the same.
        num_workers: The number of agents; 0: none for now, and no resources stay reserved.
        without: The ids of nodes that must hold no agents.
        is_asked_for: Ask the autoscaler for room for the largest number of agents that there may be.
        is_over: The run is over; start no more agents.
    """

    generation: int = 0
    num_workers: int = 0
    without: frozenset[str] = frozenset()
    is_asked_for: bool = False
    is_over: bool = False


def own_generation() -> int:
    """Return this agent's generation; in Ray Train's controller, the generation that it started last."""
    return _generation


def be_of_generation(generation: int) -> None:
    """Set the generation: the controller calls this when it decides to start agents, and in each agent before it runs.

    Ray pickles each class below by value into the controller, with a copy of the globals that the class uses, but
    imports the functions of this module. So the classes share one number only if they use these functions.
    """
    global _generation
    _generation = generation


def hold_room(room: Any) -> None:
    """In Ray Train's controller, keep the placement group of the agents; None: it was removed."""
    global _room
    _room = room


def let_go_of_room() -> None:
    """In Ray Train's controller, remove the placement group of the agents if there is one, and with it the agents."""
    if _room is not None:
        _room.shutdown()
    hold_room(None)


def steered_trainer(switchboard: Any) -> type:
    """Return a Ray Train trainer class whose policies ask the driver, without torch and without two unused callbacks.

    Args:
        switchboard: The actor that connects the policies to the driver.
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

    class DriverScaling(FixedScalingPolicy):
        """Starts new agents when the driver wants another generation, and renews requests to the autoscaler."""

        context: Any = None
        asked_at = -math.inf
        """When the autoscaler was last asked, by the monotonic clock."""

        def after_controller_start(self, train_run_context: Any) -> None:
            self.context = train_run_context  # the base class would ask the autoscaler now

        def make_decision_for_non_running_worker_group(self) -> Any:
            return self._decide(_CONTROLLER_WAIT_S)

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:  # noqa: ARG002  # Ray passes them by name
            # A request names what the whole cluster must hold, including nodes in use. If running runs did not renew
            # their requests, the nodes that they use would satisfy the request of a waiting run.
            return self._decide(0.0)

        def _ask_autoscaler(self) -> None:
            # A failed request waits for the same interval: each blocks the controller for five seconds.
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
                if self._has_asked:  # Ray 2.55 skips before_controller_shutdown after an error
                    self._cancel_resource_request()
                raise RuntimeError("the run is over, and no agents are there to end with it")
            if wanted.is_asked_for:
                self._ask_autoscaler()
            if wanted.is_over or wanted.generation == own_generation():
                return NoopDecision()
            be_of_generation(wanted.generation)
            if wanted.num_workers:
                return ResizeDecision(wanted.num_workers, self.scaling_config._resources_per_worker_not_none)
            let_go_of_room()  # Ray Train is without agents only after a failure, so let it find these dead
            return NoopDecision()

        async def before_controller_shutdown(self) -> None:
            if self._has_asked:
                await super().before_controller_shutdown()

    class LossReporting(FailurePolicy):
        """Reports lost agents to the driver, and leaves every decision to it."""

        def make_decision(self, training_failed_error: BaseException) -> Any:
            is_over = ray.get(switchboard.post_of_controller.remote([self._report(training_failed_error)]))
            return FailureDecision.RAISE if is_over else FailureDecision.RETRY

        def _report(self, error: BaseException) -> AgentsLost | AgentsUnplaced:
            cause = error.controller_failure if isinstance(error, ControllerError) else error
            if isinstance(cause, WorkerGroupStartupTimeoutError):
                return AgentsUnplaced(generation=own_generation())
            failures = getattr(error, "worker_failures", {})
            lost = {rank: why_lost(failure) for rank, failure in failures.items()}
            reason = "" if isinstance(error, WorkerGroupError) else one_line(error)
            return AgentsLost(generation=own_generation(), lost=lost, reason=reason)

    class PlacementReporting(ControllerCallback, WorkerGroupCallback):
        """Reports to the driver on which nodes agents hold room, from before their first message until they are gone.

        It also excludes nodes from Ray's placement, and gives each agent its generation.
        """

        def on_controller_start_worker_group(self, **_: Any) -> dict[str, str] | None:
            wanted = ray.get(switchboard.wanted_after.remote(0, 0.0))
            return {"ray.io/node-id": f"!in({','.join(sorted(wanted.without))})"} if wanted.without else None

        def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:  # noqa: ARG002  # Ray passes it by name
            # Ray Train would release the other agents' room only when it starts new ones, for which the driver waits
            # for room. Until then, Ray would reserve resources for a lost agent on any node that has them.
            let_go_of_room()
            self._report([])

        def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
            # Report before anything runs on the agents, so that the driver knows also nodes without our packages.
            self._report([worker.metadata.node_id for worker in workers])
            # The agents do not ask for it: one that asks late would get the generation of its replacement.
            answers = [worker.execute_async(be_of_generation, own_generation()) for worker in workers]
            failures = dict[int, Exception]()
            for rank, answer in enumerate(answers):
                try:
                    ray.get(answer)
                except RayError as error:  # the error itself does not name the rank
                    failures[rank] = error
            if failures:
                raise WorkerGroupError("agents did not start", failures)
            return {}

        def after_worker_group_start(self, worker_group: Any) -> None:
            hold_room(worker_group.get_worker_group_state().placement_group_handle)

        def after_worker_group_shutdown(self, worker_group_context: Any) -> None:  # noqa: ARG002  # Ray passes it by name
            hold_room(None)
            self._report([])

        def _report(self, nodes: list[str]) -> None:
            ray.get(switchboard.post.remote([AgentsPlaced(generation=own_generation(), nodes=nodes)]))

    class SteeredTrainer(DataParallelTrainer):
        # If Ray drops this hook, this method is never called, and the unused callbacks run again.
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            used = (callback for callback in callbacks if type(callback).__name__ not in unused)
            return [PlacementReporting(), *used]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            scaling = DriverScaling(parts["scaling_policy"].scaling_config)
            policies = {"scaling_policy": scaling, "failure_policy": LossReporting(FailureConfig())}
            return super()._initialize_and_run_controller(**(parts | policies))

    return SteeredTrainer


_REASON_WORDS = ("running low on memory", "has been hanging")
"""Words of the line that names the reason, where that is not the last line: Ray's memory monitor, a hanging worker."""


def why_lost(error: BaseException) -> str:
    """Return Ray's reason for the loss of an actor in one line, without Ray's advice after it."""
    reasons = (line for line in str(error).splitlines() if any(sign in line for sign in _REASON_WORDS))
    line = next(reasons, last_line(error))
    reason = line.partition(" Some common causes")[0].partition("Worker exit detail: ")
    return (reason[2] or reason[0]).rstrip(".")
