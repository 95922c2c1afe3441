"""The share of the time that trains while processes are killed: ``python -m tests.benchmarks.goodput``.

Two arms, one after the other, each for ten minutes from the command: ``launcher run`` on a small description, and a
stock ``TorchTrainer`` with ``FailureConfig`` that reports a checkpoint and resumes from it, its settings otherwise the
defaults. Both train the reference CNN on the digits with two gloo workers, and save about every five seconds: before
its ten minutes each arm trains for a while without a save, and its median step time there makes steps of seconds.

In the second half of every minute one training process gets a SIGKILL, at a moment and of a rank that are drawn by a
seed, the same for both arms. A kill whose moment comes while no training goes on, for it begins or recovers, waits
until it does.

Goodput is measured from outside in the same way for both: steps that were done, each counted once however often it was
done, times the median time of a step of that arm, by the wall time. Steps are timed from one to the next of the same
process, with those of the time before the ten minutes; few of them have a save to wait for. Both arms use one optimizer
class that counts steps and writes down when each was done. For the launcher its own account is printed too, with where
the rest of the time went; it begins once the run is planned. The last line is JSON.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cluster.run.run_directory import RunDirectory
from tests.benchmarks.twins import LAUNCHER_RUN, NUM_WORKERS, Step, Twin, launcher, running, stock

_SAVE_INTERVAL_S = 5.0
_ALONE_S = 15.0
_NEVER = 10**9


def _launcher(every_steps: int) -> Twin:
    return launcher(f"checkpoint.every_steps={every_steps}")


def _stock(every_steps: int) -> Twin:
    return stock(every_steps=every_steps, address="local")


_ARMS: dict[str, Callable[[int], Twin]] = {"launcher": _launcher, "stock": _stock}


@dataclass(frozen=True, slots=True)
class Kill:
    """A SIGKILL that is due so many seconds after the command."""

    at_s: float
    rank: int


def draw_kills(duration_s: float, every_s: float, seed: int) -> list[Kill]:
    """One at a random moment in the second half of each interval."""
    draw = random.Random(seed)
    return [
        Kill((number + draw.uniform(0.5, 1)) * every_s, draw.randrange(NUM_WORKERS))
        for number in range(int(duration_s / every_s))
    ]


def run_once(
    twin: Twin, duration_s: float, kills: Sequence[Kill], undisturbed: Sequence[Sequence[Step]]
) -> dict[str, Any]:
    """Trains for so long under these kills; what came of it. ``undisturbed``: steps of the same arm, left alone."""
    begun = time.time()
    end = begun + duration_s
    num_kills = 0
    with running(twin) as training:
        before: frozenset[Any] = frozenset()
        for kill in kills:
            _sleep_until(begun + kill.at_s)
            training.wait_until_it_trains(before)
            if time.time() > end:
                break
            before = training.stamps()
            os.kill(training.newest_stamp(kill.rank).pid, signal.SIGKILL)
            num_kills += 1
        _sleep_until(end)
        processes = training.steps(rank=0)
        training.end()
        status = RunDirectory(str(training.folder / LAUNCHER_RUN)).read_status() or {}  # stock has none
    steps = {step.number for process in processes for step in process if step.time <= end}
    step_s = median_step_s([*undisturbed, *processes])
    return {
        "kills": num_kills,
        "steps": len(steps),
        "step_s": round(step_s, 5),
        "goodput": round(len(steps) * step_s / duration_s, 4),
    } | {f"own_{name}": status[name] for name in ("goodput", "time") if name in status}


def median_step_s(processes: Sequence[Sequence[Step]]) -> float:
    """From one step of a process to its next."""
    return statistics.median(after.time - before.time for process in processes for before, after in pairwise(process))


def leave_alone(make_twin: Callable[[int], Twin]) -> list[list[Step]]:
    """Steps of an arm that nobody kills and that does not save."""
    with running(make_twin(_NEVER)) as training:
        time.sleep(_ALONE_S)
        return training.steps(rank=0)


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.time()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of each arm")
    parser.add_argument("--kill-every-s", type=float, default=60.0, help="seconds, in each of which one is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ranks")
    parser.add_argument("--arms", default=list(_ARMS), nargs="+", choices=_ARMS, help="which arms")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind by it either
    duration_s = 60 * arguments.minutes
    kills = draw_kills(duration_s, arguments.kill_every_s, arguments.seed)
    document: dict[str, Any] = {"seconds": duration_s, "seed": arguments.seed}
    for name in arguments.arms:
        undisturbed = leave_alone(_ARMS[name])
        step_s = median_step_s(undisturbed)
        every_steps = max(1, round(_SAVE_INTERVAL_S / step_s))
        print(f"{name}: {1000 * step_s:.1f} ms a step, so it saves every {every_steps} steps", file=sys.stderr)
        found = run_once(_ARMS[name](every_steps), duration_s, kills, undisturbed) | {"every_steps": every_steps}
        print(
            f"{name:9} {found['kills']} kills in {duration_s:.0f} s, a save every {every_steps} steps: "
            f"{found['steps']} steps of {1000 * found['step_s']:.1f} ms, goodput {found['goodput']:.1%}"
        )
        if "own_goodput" in found:
            parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in found["own_time"].items())
            print(f"{name:9} by its own account {found['own_goodput']:.1%}; seconds: {parts}")
        document[name] = found
    print(json.dumps(document))


if __name__ == "__main__":
    main()
