"""From a SIGKILL to the first new training step: ``python -m tests.benchmarks.recovery``.

Two arms take turns, each as a fresh process in a fresh folder: ``launcher run`` on a small description, and a script
as Ray's documentation has it, a stock ``TorchTrainer`` with ``FailureConfig`` that reports a checkpoint and resumes
from it, its settings otherwise the defaults. Both train the reference CNN on the digits with two gloo workers, and
save every 20 steps, of which they keep three. Whenever there is a new checkpoint, rank 1 is killed, in each run twice
for each kind of kill: in the stock script its one process, which is a Ray worker; in the launcher in turn the training
process, and the Ray worker that holds it, the agent.

The clock starts at the kill, and stops when every rank has taken an optimizer step in a process that did not exist at
the kill: both arms use one optimizer class that writes down the steps of each process that has a process group.
That step may repeat one from before the kill, in both arms alike: what lies behind the checkpoint is lost, and is no
part of the time.

Reported for each kind of kill: median, least and most seconds, and n; for the launcher also where they went, by its
event log. The last line is JSON.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.benchmarks.twins import LAUNCHER_RUN, Training, Twin, launcher, running, seconds_to, stock
from tests.e2e.command import events

_KILLS_PER_RUN = 2
"""Of each kind: a start takes longer than a recovery."""
_VICTIM = 1
_LONGEST_PAUSE_S = 2.0
_PHASES = ("worker_lost", "attempt_started", "training")


def _training_process(training: Training) -> int:
    return training.newest_stamp(_VICTIM).pid


def _agent(training: Training) -> int:
    """The Ray worker of the rank that is killed, as the launcher's event log tells."""
    run, num_attempts = training.folder / LAUNCHER_RUN, sum(stamp.rank == _VICTIM for stamp in training.stamps())
    # An event may be readable after it happened: until then the newest would be of a former attempt.
    started = training.wait_for(lambda: found if len(found := events(run, "attempt_started")) >= num_attempts else [])
    (pid,) = [worker["pid"] for worker in started[-1]["workers"] if worker["rank"] == _VICTIM]
    return int(pid)


@dataclass(frozen=True, slots=True)
class _Arm:
    """A twin, and the kinds of process of it that are killed."""

    twin: Twin
    victims: dict[str, Callable[[Training], int]]
    """Kind of kill -> the process that it hits."""


_ARMS = {
    "launcher": _Arm(launcher(), {"training_process": _training_process, "agent": _agent}),
    "stock": _Arm(stock(address="local"), {"worker": _training_process}),
}


def _kill(training: Training, find_victim: Callable[[Training], int]) -> tuple[float, float]:
    """Kills once; returns when that was, and when every rank had taken a step in a new process."""
    training.wait_for_checkpoint()
    # A stock controller looks at its workers every 2 s, and commits a checkpoint when it does: a kill at that
    # moment would always find it at the beginning of its longest wait.
    time.sleep(random.uniform(0, _LONGEST_PAUSE_S))
    victim = find_victim(training)
    before = training.stamps()
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    return killed, training.wait_until_it_trains(before)


def run_once(arm: _Arm) -> list[tuple[str, dict[str, float]]]:
    """For each kill its kind, and the seconds from it to the first new step and to what the launcher's events tell."""
    with running(arm.twin) as training:
        kinds = list(arm.victims) * _KILLS_PER_RUN
        kills = [(kind, *_kill(training, arm.victims[kind])) for kind in kinds]
        training.end()  # all events are readable now
        return [
            (kind, seconds_to(training, killed, _PHASES) | {"first_step": stepped - killed})
            for kind, killed, stepped in kills
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help=f"each has {_KILLS_PER_RUN} kills of each kind")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind by it either
    found: dict[tuple[str, str], list[dict[str, float]]] = {
        (name, kind): [] for name, arm in _ARMS.items() for kind in arm.victims
    }
    for number in range(arguments.rounds):
        for name, arm in _ARMS.items():
            for kind, moments in run_once(arm):
                found[name, kind].append(moments)
                times = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in moments.items())
                print(f"{number} {name} {kind}: {times}", file=sys.stderr)
    num_kills = arguments.rounds * _KILLS_PER_RUN
    document: dict[str, float] = {"n": num_kills}
    print(f"small CNN, 2 workers, seconds from SIGKILL, n={num_kills} of each kind: median (least-most)")
    for (name, kind), rounds in found.items():
        for phase in (*_PHASES, "first_step"):
            seconds = [moments[phase] for moments in rounds if phase in moments]
            if seconds:
                median = statistics.median(seconds)
                print(f"{name:9} {kind:17} {phase:16} {median:6.2f} ({min(seconds):.2f}-{max(seconds):.2f})")
                document[f"{name}_{kind}_{phase}"] = round(median, 3)
    stock = document["stock_worker_first_step"]
    for kind in _ARMS["launcher"].victims:
        document[f"{kind}_ratio"] = round(document[f"launcher_{kind}_first_step"] / stock, 3)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
