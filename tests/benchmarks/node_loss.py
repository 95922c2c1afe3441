"""From the loss of a host to the first new training step: ``python -m tests.benchmarks.node_loss``; needs root.

Each measurement has a Ray cluster of its own: three hosts of one CPU each, which are namespaces on this machine, wired
to a switch. The first is the head, and the driver runs there; two hold a worker, one is a spare. Once there is a new
checkpoint, the host that holds a worker and is not the head is lost: in turn its cable is cut, or its power goes.
Nobody is told; that it is gone has to be noticed.

The arms take turns: ``launcher run --cluster`` with the head started as the README says; a stock ``TorchTrainer`` with
``FailureConfig`` on a head with Ray's defaults, its own settings the defaults too; and the same script on a head as the
launcher's, which tells what the head's settings alone do. A folder that all hosts see is the store of each. The script
is told the network interface, without which its workers do not find each other; the launcher finds it.

The clock starts at the loss, and stops when every rank has taken an optimizer step in a process that did not exist
then. That step may repeat one from before the loss, in all arms alike.

Reported for each arm and loss: median, least and most seconds, and n; for the launcher also where they went, by its
event log. The last line is JSON.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.twins import Training, Twin, launcher, seconds_to, stock
from tests.faults.hosts import HEAD_SETTINGS, NETWORK_INTERFACE, hosts, start_ray, why_there_can_be_none

_LOSSES = ("cut", "power_off")
_PHASES = ("agents_lost", "attempt_started", "training")
_LONGEST_PAUSE_S = 3.0
_LAST_EVENTS_S = 1.0
"""What the launcher's events may be behind its steps."""


@dataclass(frozen=True, slots=True)
class _Arm:
    """A twin, given the address of the cluster, and how the head of the cluster is started."""

    make_twin: Callable[[str], Twin]
    head_settings: Mapping[str, str] = field(default_factory=dict)


def _launcher(cluster: str) -> Twin:
    return launcher("--cluster", cluster, "workers.cpus=1")


def _stock(cluster: str) -> Twin:
    return stock(address=cluster, runtime_env={"env_vars": {"GLOO_SOCKET_IFNAME": NETWORK_INTERFACE}})


_ARMS = {
    "launcher": _Arm(_launcher, HEAD_SETTINGS),
    "stock": _Arm(_stock),
    "stock_quick_head": _Arm(_stock, HEAD_SETTINGS),
}


def run_once(arm: _Arm, loss: str) -> dict[str, float]:
    """Loses one host; the seconds from that to the first new step, and to what the launcher's events tell."""
    folder = tempfile.TemporaryDirectory(prefix="launcher-benchmark-", ignore_cleanup_errors=True)
    with folder as name, hosts("head", "second", "third") as (head, *others):
        start_ray(head, *others, head_settings=arm.head_settings)
        home = Path(name)
        training = Training(arm.make_twin(head.ray_address), home, lambda command: head.command(command, home))
        training.wait_until_it_trains()
        training.wait_for_checkpoint()
        time.sleep(random.uniform(0, _LONGEST_PAUSE_S))  # health checks and looks of controllers have periods
        before = training.stamps()
        holders = {stamp.host for stamp in before}
        victim = next(host for host in others if host.name in holders)
        lost = time.time()
        {"cut": victim.cut, "power_off": victim.power_off}[loss]()
        stepped = training.wait_until_it_trains(before)
        time.sleep(_LAST_EVENTS_S)
        head.end()
        training.process.wait()
        return seconds_to(training, lost, _PHASES) | {"first_step": stepped - lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="each has one loss of each kind in each arm")
    parser.add_argument("--arms", default=list(_ARMS), nargs="+", choices=_ARMS, help="which arms")
    arguments = parser.parse_args()
    if reason := why_there_can_be_none():
        raise SystemExit(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up after that too
    found: dict[tuple[str, str], list[dict[str, float]]] = {
        (arm, loss): [] for arm in arguments.arms for loss in _LOSSES
    }
    for number in range(arguments.rounds):
        for (arm, loss), rounds in found.items():
            rounds.append(run_once(_ARMS[arm], loss))
            times = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in rounds[-1].items())
            print(f"{number} {arm}, {loss}: {times}", file=sys.stderr)
    document: dict[str, float] = {"n": arguments.rounds}
    print(f"small CNN, 2 workers on 3 hosts, seconds from the loss, n={arguments.rounds} each: median (least-most)")
    for (arm, loss), rounds in found.items():
        for phase in (*_PHASES, "first_step"):
            seconds = [moments[phase] for moments in rounds if phase in moments]
            if seconds:
                median = statistics.median(seconds)
                print(f"{arm:18} {loss:10} {phase:16} {median:7.2f} ({min(seconds):.2f}-{max(seconds):.2f})")
                document[f"{arm}_{loss}_{phase}"] = round(median, 3)
    for loss in _LOSSES:
        if {"launcher", "stock"} <= set(arguments.arms):
            ratio = document[f"launcher_{loss}_first_step"] / document[f"stock_{loss}_first_step"]
            document[f"{loss}_ratio"] = round(ratio, 3)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
