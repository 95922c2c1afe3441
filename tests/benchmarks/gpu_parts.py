"""The parts of the GPU benchmark. Each runs in a process of its own, prints a table and returns its figures."""

import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cluster.process import fork_server
from cluster.process.activity import Activity
from cluster.process.messages import Report, ShareWritten
from cluster.process.orders import Task
from cluster.run.checkpoints import Checkpoints
from cluster.run.manifest import join
from cluster.run.run_directory import RunDirectory
from jobs.checkpoint.loop_state import LoopState
from jobs.checkpoint.saver import Saver
from jobs.components.build import build_parts
from jobs.spec import Target
from jobs.training.restore import restore_newest
from launcher.planning.dry_run import try_out
from tests.benchmarks.arms import Gate, Quartiles
from tests.benchmarks.gpu_arms import Arm, Scale, Times, launched, loop_of, measure, naive, open_team, tuned
from tests.memory import free_in_this_thread, measured_memory

Figures = dict[str, Any]
_MIB = 2**20
_LEAST_SAVES, _RESTORES = 4, 3
_STEPS_OF_MEMORY = 4
_WRITE_S = 60.0


def step_time(scale: Scale, deadline: float) -> Figures:
    """The step of the product beside a first script and beside a loop that is tuned by hand."""
    team_of = open_team(scale)
    arms = {
        "ours": launched(scale, team_of),
        "tuned": tuned(scale),
        "tuned again": tuned(scale),
        "naive": naive(scale),
        "naive, no TF32": naive(scale, tf32=False),
    }
    times = measure(scale, arms, deadline)
    figures = _report(scale, times, to="tuned")
    speedup, overhead = times["naive"].over(times["ours"]), times["ours"].over(times["tuned"])
    print(f"a first script takes {speedup:.2f} of our time (goal: 4 or more)")
    print(f"we take {overhead:.4f} of the time of the tuned loop (goal: 1.02 or less)")
    return figures | {"naive_over_ours": _figures(speedup), "ours_over_tuned": _figures(overhead)}


def exactness(scale: Scale, deadline: float) -> Figures:
    """What sums in a fixed order cost, and micro-batches."""
    team_of = open_team(scale)
    arms = {
        "1 shard, exact": launched(scale, team_of),
        "1 shard": launched(scale, team_of, exact=False),
        "1 shard, exact, again": launched(scale, team_of),
        "4 shards, exact": launched(scale, team_of, shards=4),
        "4 shards": launched(scale, team_of, shards=4, exact=False),
    }
    times = measure(scale, arms, deadline)
    figures = _report(scale, times, to="1 shard")
    cost = times["4 shards, exact"].over(times["4 shards"])
    print(f"4 shards in a fixed order take {cost:.4f} of the time without one")
    return figures | {"exact_over_inexact_4_shards": _figures(cost)}


def determinism(scale: Scale, deadline: float) -> Figures:
    """What deterministic kernels cost."""
    team_of = open_team(scale)
    arms = {
        "deterministic": launched(scale, team_of),
        "deterministic, again": launched(scale, team_of),
        "not": launched(scale, team_of, deterministic=False),
    }
    return _report(scale, measure(scale, arms, deadline), to="deterministic")


def cudnn(scale: Scale, deadline: float) -> Figures:
    """What ``train.cudnn_benchmark`` gives.

    Apart from the arm of the same kernels without it: what cuDNN has chosen for a shape is kept for the process, also
    if ``benchmark`` changes.
    """
    team_of = open_team(scale)
    arms = {
        "deterministic": launched(scale, team_of),
        "cudnn_benchmark": launched(scale, team_of, deterministic=False, cudnn_benchmark=True),
    }
    return _report(scale, measure(scale, arms, deadline), to="deterministic")


def compiling(scale: Scale, deadline: float) -> Figures:
    """What ``train.compile`` gives, and what its first step takes."""
    team_of = open_team(scale)
    arms = {"eager": launched(scale, team_of), "compiled": launched(scale, team_of, compile=True)}
    return _report(scale, measure(scale, arms, deadline), to="eager")


def loader_share(scale: Scale, deadline: float) -> Figures:
    """What a step takes longer because loader processes decode its images, by their number."""
    team_of = open_team(scale)
    print(f"{'loaders':>8} {'step ms':>9} {'quartiles':>17} {'images/s':>9} {'lost':>6} {'blocks':>7}")
    share_s = (deadline - time.monotonic()) / (1 + len(scale.decoders))
    figures: Figures = {}
    fed_s = 0.0
    for name, images, number in [
        ("fed", "Pictures", scale.loaders),
        *((f"{number}", "Photographs", number) for number in scale.decoders),
    ]:
        until = time.monotonic() + share_s
        steps = _steps_in_a_row(scale, launched(scale, team_of, images=images, loaders=number), number, until)
        fed_s = fed_s or median(steps)
        steps_ms, lost = Quartiles.of([1000 * seconds for seconds in steps]), max(0.0, 1 - fed_s / median(steps))
        rate = round(scale.batch / median(steps))
        print(f"{name:>8} {steps_ms:9.2f} {rate:9} {lost:6.1%} {len(steps):7}")
        figures[name] = {"step_ms": _figures(steps_ms), "images_per_s": rate, "lost": round(lost, 4), "n": len(steps)}
    return figures


def _steps_in_a_row(scale: Scale, arm: Arm, loaders: int, until: float) -> list[float]:
    """The seconds of a step, block by block without a pause: in a pause loaders would make batches ready.

    The first steps use up what they have made ready while the GPU warmed up.
    """
    gate, steps = Gate(arm.train), []
    arm.take_over()
    gate.run_block(2 * loaders + scale.warm_up)
    scale.synchronize()
    while len(steps) < 2 or time.monotonic() < until:
        began = time.perf_counter()
        gate.run_block(scale.block)
        scale.synchronize()
        steps.append((time.perf_counter() - began) / scale.block)
    gate.end()
    return steps


def saving(scale: Scale, deadline: float) -> Figures:
    """How long a save blocks the loop, how fast it is written meanwhile, and how long a restore takes."""
    team_of = open_team(scale)
    with tempfile.TemporaryDirectory(prefix="launcher-benchmark-") as folder:
        spec = scale.job(
            store=folder, optimizer=Target("AdamW", {"lr": 1e-4, "fused": True}), ema_decay=0.999,
            every_steps=2 * scale.block,
        )  # fmt: skip
        team, components, state = team_of(spec), build_parts(spec, scale.device), LoopState()
        run = RunDirectory(f"{folder}/run")
        link: Any = _Driver(run.checkpoints)
        saver = Saver(components, state, run.checkpoints, link, team, None)
        blocked: list[float] = []

        def save(metrics: Mapping[str, float], *, is_needed: bool) -> None:
            began = time.perf_counter()
            saver.save(metrics, is_needed=is_needed)
            blocked.append(1000 * (time.perf_counter() - began))

        def train(gate: Gate) -> None:
            loop_of(
                spec, components, team, state=state, save=save, stop_wanted=gate, after_step=saver.start_waiting
            ).run()

        gate = Gate(train)
        gate.run_block(scale.block)
        # A gate comes before the save of its step, which so falls into the block behind every second gate.
        blocks: dict[bool, list[float]] = {True: [], False: []}
        while len(blocked) < _LEAST_SAVES or time.monotonic() < deadline:
            for has_save in (False, True):
                scale.synchronize()
                began = time.perf_counter()
                gate.run_block(scale.block)
                scale.synchronize()
                blocks[has_save].append(time.perf_counter() - began)
            link.wait_for(len(blocked))  # else the next save would wait for this one's write
        gate.end()
        saver.wait()
        restores = []
        for _ in range(_RESTORES):
            fresh = build_parts(spec, scale.device)
            scale.synchronize()
            began = time.perf_counter()
            manifest = restore_newest(link, run, fresh, LoopState(), team)
            scale.synchronize()
            restores.append(time.perf_counter() - began)
        assert manifest is not None
        first, *others, _ = blocked  # the last one was made at the stop, and waited for
        ratio = Quartiles.of([a / b for a, b in zip(blocks[True][1:], blocks[False][1:])])
    print(f"a state of {manifest.size / 1e6:.1f} MB; the first save blocks for {first:.1f} ms, {len(others)} others:")
    found = {
        "blocked_ms": Quartiles.of(others),
        "write_mb_per_s": Quartiles.of([size / seconds / 1e6 for size, seconds in link.written[1:]]),
        "block_with_save_over_without": ratio,
        "restore_s": Quartiles.of(restores),
    }
    for name, quartiles in found.items():
        print(f"{name:30} {quartiles:9.3f}")
    return {name: _figures(quartiles) for name, quartiles in found.items()} | {
        "state_mb": round(manifest.size / 1e6, 1), "first_blocked_ms": round(first, 2), "n": len(others),
    }  # fmt: skip


class _Driver:
    """A link at whose other end a driver commits each checkpoint."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.activity = Activity()
        self.written: list[tuple[int, float]] = []
        """The bytes of each save, and the seconds that it took to write them."""
        self._checkpoints = checkpoints
        self._news = threading.Condition()

    def send(self, report: Report) -> None:
        if isinstance(report, ShareWritten):
            manifest = join([report.share])
            assert manifest is not None, "there is one worker"
            self._checkpoints.commit(manifest)
            with self._news:
                self.written.append((sum(part.size for part in report.share.parts.values()), report.seconds))
                self._news.notify_all()

    def wait_for(self, saves: int) -> None:
        """Waits until so many saves are written."""
        with self._news:
            if not self._news.wait_for(lambda: len(self.written) >= saves, _WRITE_S):
                raise TimeoutError(f"save {saves} is not written after {_WRITE_S:.0f} s")


def memory(scale: Scale, deadline: float) -> Figures:  # noqa: ARG001  # it takes as long as it takes
    """The peak of memory of some steps, beside what the plan says."""
    cases: dict[str, dict[str, Any]] = {
        "1 shard": {},
        "4 shards": {"shards": 4},
        "fp32": {"precision": "fp32", "channels_last": False},
    }
    if not scale.on_gpu:
        free_in_this_thread()
    planned = {name: _planned_memory(scale, train) for name, train in cases.items()}
    team_of = open_team(scale)
    figures: Figures = {}
    print(f"{'case':10} {'plan MiB':>10} {'peak MiB':>10} {'reserved':>10}")
    for name, train in cases.items():
        peak, reserved = _taken_memory(scale, team_of, train)
        in_mib = [round(size / _MIB, 2) for size in (planned[name], peak, reserved)]
        print(f"{name:10} {in_mib[0]:10.2f} {in_mib[1]:10.2f} {in_mib[2]:10.2f}")
        figures[name] = dict(zip(("plan_mib", "peak_mib", "reserved_mib"), in_mib))
    return figures


def _planned_memory(scale: Scale, train: Mapping[str, Any]) -> int:
    task = Task(
        entry="", run_url="runs/gpu", import_paths=(), working_directory=".", on_gpu=scale.on_gpu,
        content=scale.job(loaders=0, **train),
    )  # fmt: skip
    return try_out(task).memory.total


def _taken_memory(scale: Scale, team_of: Callable[..., Any], train: Mapping[str, Any]) -> tuple[int, int]:
    """The peak of what torch has allocated and, on a GPU, reserved."""
    spec = scale.job(loaders=0, max_steps=_STEPS_OF_MEMORY, **train)

    def run() -> None:
        loop_of(spec, build_parts(spec, scale.device), team_of(spec)).run()

    gc.collect()
    if not scale.on_gpu:
        with measured_memory() as measured:
            run()
        return measured.peak, measured.peak
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved()


PARTS: dict[str, tuple[Callable[[Scale, float], Figures], float]] = {
    "step": (step_time, 0.22),
    "exactness": (exactness, 0.12),
    "determinism": (determinism, 0.07),
    "cudnn": (cudnn, 0.06),
    "loader": (loader_share, 0.12),
    "saver": (saving, 0.06),
    "memory": (memory, 0.08),
    "compile": (compiling, 0.27),
}
"""Each part, and its share of the time. The last one compiles, which takes longest, and gets what the others leave."""


def run_part(name: str, device: str, deadline: float) -> Figures:
    """Runs a part in this process, which does nothing else; it measures up to a deadline of ``time.monotonic``."""
    root = str(Path(__file__).parents[2])  # the fork server searches no working directory
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    fork_server.start(["tests.benchmarks.gpu_arms"])
    function, _ = PARTS[name]
    return function(Scale.of(device), deadline)


def _report(scale: Scale, times: Mapping[str, Times], to: str) -> Figures:
    """Prints and returns the steps of some arms, with ratios to one of them."""
    columns = f"{'step ms':>9} {'quartiles':>17} {'images/s':>9} {'ratio':>7} {'quartiles':>15}"
    print(f"{'arm':22} {columns} {'blocks':>7} {'first s':>8}")
    figures: Figures = {}
    for name, of_arm in times.items():
        steps_ms, ratio = Quartiles.of([1000 * seconds for seconds in of_arm.steps]), of_arm.over(times[to])
        rate = scale.batch / of_arm.median
        print(f"{name:22} {steps_ms:9.2f} {rate:9.0f} {ratio:7.4f} {len(of_arm.steps):7} {of_arm.first:8.1f}")
        figures[name] = {
            "step_ms": _figures(steps_ms), "images_per_s": round(rate), "ratio": _figures(ratio),
            "n": len(of_arm.steps), "first_s": round(of_arm.first, 2),
        }  # fmt: skip
    return figures | {"ratios_to": to}


def _figures(quartiles: Quartiles) -> dict[str, float]:
    return {
        "median": round(quartiles.median, 5),
        "low": round(quartiles.low, 5),
        "high": round(quartiles.high, 5),
    }
