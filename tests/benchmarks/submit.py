"""From a laptop's command to the first step on a cluster: ``python -m tests.benchmarks.submit``; needs root.

The cluster has one host, which is up and warm, and serves its Jobs API; the laptop is a host beside it and no member.
Both are namespaces of this machine that share its files. Two arms take turns, each in a fresh folder: ``launcher
submit`` of a small description, and ``ray job submit`` of a script as Ray's documentation has it, with a stock
``TorchTrainer``; job and script are those of ``tests.benchmarks.startup``, ResNet-18 on the same images with two
workers, and end after one step. Both commands take the code along from the folder they are started in, and wait until
the job has ended, so that the next one finds the cluster at rest. The script is told the network interface; the
launcher finds it. Rounds that come first warm the cluster up, and are not counted.

The clock starts just before the command, and stops when the slowest worker has taken its first optimizer step: both
arms use one optimizer class that writes down when that was. What ``launcher submit`` checks before it hands a run over,
here and on the host of the cluster, is part of the time.

Reported for each arm: median, least and most seconds, and n; for the launcher also where they went, by its submission
and its event log; for both the seconds until the command had ended. The last line is JSON.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.run.run_directory import RunDirectory
from tests.benchmarks.startup import JOB, SCRIPT
from tests.benchmarks.twins import NUM_WORKERS, stamps_in, stock, write_optimizer
from tests.e2e.command import events
from tests.faults.hosts import JOBS_API, NETWORK_INTERFACE, RAY, Host, hosts, wait_for_jobs_api, why_there_can_be_none

_NUM_CPUS = 4
"""That Ray hands out: for two workers of one CPU, and what a trainer may reserve beside them."""
_EVENTS = ("attempt_started", "training")
_MOMENTS = ("submitted", *_EVENTS, "first_step", "end")
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a measurement is made.

    Attributes:
        folder: The one that the command is started in; only what it takes along lies there.
        results: Where the run, or what the stock script stores, goes.
        url: Of the Jobs API.
    """

    folder: Path
    results: Path
    url: str


def _launcher(place: Place) -> list[str]:
    (place.folder / "twin.yaml").write_text(JOB)
    program = str(Path(sys.executable).with_name("launcher"))
    cluster = ["--cluster", place.url, f"cluster.venv={sys.prefix}"]
    return [program, "submit", "twin.yaml", f"store={place.results}", "workers.cpus=1", *cluster, "--wait", "--json"]


def _stock(place: Place) -> list[str]:
    # Else it would store where it is made, and that folder is taken along.
    command = stock(script=SCRIPT.replace("STORAGE", repr(str(place.results)))).make_command(place.folder)
    runtime_env = json.dumps({"env_vars": {"GLOO_SOCKET_IFNAME": NETWORK_INTERFACE}})
    options = ["--address", place.url, "--working-dir", ".", "--runtime-env-json", runtime_env]
    return [RAY, "job", "submit", *options, "--", *command]


_ARMS: dict[str, Callable[[Place], list[str]]] = {"launcher": _launcher, "stock": _stock}


def run_once(arm: str, laptop: Host, url: str) -> dict[str, float]:
    """Seconds from the command to the first step, to its end, and to what the launcher wrote down on the way."""
    with tempfile.TemporaryDirectory(prefix="launcher-benchmark-", ignore_cleanup_errors=True) as name:
        home = Path(name)
        place = Place(folder=home / "job", results=home / "results", url=url)
        stamps = home / "stamps"
        for folder in (place.folder, place.results, stamps):
            folder.mkdir()
        write_optimizer(place.folder, stamps)
        command = laptop.command(_ARMS[arm](place), place.folder, {"XDG_CACHE_HOME": str(home / "cache")})
        with open(home / "output", "wb") as output:
            began_at = time.time()
            ended = subprocess.run(
                command, env=_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=_TIMEOUT_S
            )
            end = time.time()
        first_steps = [stamp.time for stamp in stamps_in(stamps)]
        if ended.returncode != 0 or len(first_steps) != NUM_WORKERS:
            said = (home / "output").read_text(errors="replace")[-4000:]
            raise SystemExit(f"{arm} ended with {ended.returncode}, {len(first_steps)} workers took a step:\n{said}")
        found = {"first_step": max(first_steps) - began_at, "end": end - began_at}
        return found | (_written_down(place.results / "twin", began_at) if arm == "launcher" else {})


def _written_down(run: Path, began_at: float) -> dict[str, float]:
    """Seconds from the command to what the launcher wrote down of a run."""
    submissions = RunDirectory(str(run)).submissions
    newest = submissions.newest()
    assert newest is not None, f"{run} was never submitted"
    times = {kind: [event["time"] for event in events(run, kind)] for kind in _EVENTS}
    found = {kind: min(moments) - began_at for kind, moments in times.items() if moments}
    return {"submitted": submissions.read(newest.id).time - began_at, **found}


def _environment() -> dict[str, str]:
    """Without what may name another cluster of this machine."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def _start(head: Host, laptop: Host, cache: Path) -> str:
    """Starts the cluster; returns the URL of its Jobs API, as soon as that is served."""
    head.start_ray(num_cpus=_NUM_CPUS, environment={"XDG_CACHE_HOME": str(cache)}, options=JOBS_API)
    head.wait_for_ray()
    wait_for_jobs_api(head, laptop, cache)
    return head.jobs_url


def _report(found: dict[str, list[dict[str, float]]], num_runs: int) -> dict[str, float]:
    document: dict[str, float] = {"n": num_runs}
    print(f"ResNet-18, 2 workers, one host, seconds from the command, n={num_runs}: median (least-most)")
    for arm, rounds in found.items():
        for kind in _MOMENTS:
            seconds = [moments[kind] for moments in rounds if kind in moments]
            if seconds:
                median = statistics.median(seconds)
                print(f"{arm:9} {kind:16} {median:6.2f} ({min(seconds):.2f}-{max(seconds):.2f})")
                document |= {f"{arm}_{kind}": round(median, 3)}
                document |= {
                    f"{arm}_{kind}_least": round(min(seconds), 3),
                    f"{arm}_{kind}_most": round(max(seconds), 3),
                }
    if len(found) == len(_ARMS):
        ratios = [ours["first_step"] / other["first_step"] for ours, other in zip(found["launcher"], found["stock"])]
        document["ratio"] = round(document["launcher_first_step"] / document["stock_first_step"], 3)
        document["pairwise"] = round(statistics.median(ratios), 3)
    return document


def _arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each arm")
    parser.add_argument("--warm-ups", type=int, default=1, help="rounds that come first and are not counted")
    parser.add_argument("--arms", default=list(_ARMS), nargs="+", choices=_ARMS, help="which arms")
    return parser.parse_args(words)


def main() -> None:
    arguments = _arguments()
    if reason := why_there_can_be_none():
        raise SystemExit(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up after that too
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arguments.arms}
    cache = tempfile.TemporaryDirectory(prefix="launcher-benchmark-", ignore_cleanup_errors=True)
    with cache as name, hosts("head", "laptop") as (head, laptop):
        url = _start(head, laptop, Path(name))
        for number in range(-arguments.warm_ups, arguments.runs):
            for arm, rounds in found.items():
                moments = run_once(arm, laptop, url)
                if number >= 0:
                    rounds.append(moments)
                times = ", ".join(f"{kind} {moments[kind]:.2f}" for kind in _MOMENTS if kind in moments)
                print(f"{number if number >= 0 else 'warm-up'} {arm}: {times}", file=sys.stderr)
    print(json.dumps(_report(found, arguments.runs)))


if __name__ == "__main__":
    main()
