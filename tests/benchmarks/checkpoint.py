"""What a checkpoint costs the training loop: ``python -m tests.benchmarks.checkpoint``.

Two things are measured, with the same 100 MB of state (a ResNet-18 with 3,300 classes, SGD with momentum), two gloo
workers, and a local folder as the store.

*Blocked*: how long the loop stands still for one checkpoint. In the launched loop it is the time inside of
``jobs.checkpoint.saver.Saver.save``, on the slowest worker. Beside it a stock ``TorchTrainer``, as Ray's documentation
has it: rank 0 writes the state with ``torch.save`` into a temporary folder and calls ``ray.train.report`` with it, the
others call it without; the time is that of both calls, on rank 0, its settings the defaults.

*Overhead*: how much longer training takes with a checkpoint every five seconds. Every worker process holds three arms
of the product's ``jobs.training.loop.Loop`` that take turns in blocks of five seconds: one that saves once in each
block, early enough for everything behind the loop's back to fall into the same block; one that never does; and that one
once more (A/A), which shows what of a difference is noise.

Reported: medians with quartiles, and n; ratios are of blocks of the same round. The last line is JSON.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.benchmarks.arms import Gate, Quartiles, join_team, side_by_side

_JOB = """
name: checkpoint
store: {store}
model: {{_target_: torchvision.models.resnet18, num_classes: 3300}}
data:
  train: {{_target_: jobs.data.synthetic_images, length: {length}, num_classes: 3300, image_size: 32}}
loss: {{_target_: CrossEntropyLoss}}
optimizer: {{_target_: SGD, lr: 0.01, momentum: 0.9}}
train: {{global_batch: 16, shards: 2}}
workers: {{num: 2}}
checkpoint: {{every_steps: {every_steps}}}
"""
_SCRIPT = """
import json
import tempfile
import time
from pathlib import Path

import ray
import ray.train
import torch
import torchvision
from ray.train import Checkpoint, CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train():
    torch.set_num_threads(1)
    model = torchvision.models.resnet18(num_classes=3300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    blocked = []
    for step in range(COUNT):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        began = time.perf_counter()
        if ray.train.get_context().get_world_rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            with tempfile.TemporaryDirectory() as folder:
                torch.save(state, Path(folder, "state.pt"))
                ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))
            blocked.append(time.perf_counter() - began)
            Path(STORAGE, "blocked.json").write_text(json.dumps(blocked))
        else:
            ray.train.report({"step": step})


if __name__ == "__main__":
    ray.init(address="local")
    run_config = RunConfig(name="stock", storage_path=STORAGE, checkpoint_config=CheckpointConfig(num_to_keep=3))
    TorchTrainer(train, scaling_config=ScalingConfig(num_workers=2), run_config=run_config).fit()
"""
_WORKERS = 2
_EVERY_S = 5.0
_ARMS = ("without", "saving", "aa")
_CALIBRATION_STEPS = 20


@dataclass(frozen=True, slots=True)
class _Settings:
    store: str
    rounds: int

    def job(self, steps: int, every_steps: int) -> Any:
        from launcher.config.description import parse

        text = _JOB.format(store=self.store, length=16 * steps, every_steps=every_steps)
        return parse(text, "checkpoint.yaml").spec


@dataclass(frozen=True, slots=True)
class _Told:
    """What a worker says of a block: its arm, its seconds, and the seconds that the saves in it stood in the way."""

    arm: str
    seconds: float
    blocked: list[float]


def _work(settings: _Settings, rank: int, folder: str, results: Connection, messages: Connection) -> None:
    """One worker: all arms, block by block."""
    import torch
    import torch.distributed as dist

    join_team(rank, _WORKERS, folder)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    blocked: list[float] = []
    every_steps = torch.tensor([0])
    calibration, _ = _arm(settings, messages, 2 * _CALIBRATION_STEPS + 4, every_steps=10**9, blocked=blocked)
    calibration.run_block(_CALIBRATION_STEPS)
    every_steps[0] = round(_EVERY_S * _CALIBRATION_STEPS / sum(calibration.run_block(_CALIBRATION_STEPS)))
    dist.broadcast(every_steps, src=0)  # the clocks of two workers may differ
    calibration.end()
    every = int(every_steps)
    # A save comes with the steps divisible by `every`: after a tenth of each block.
    warm_up = every - every // 10
    steps = warm_up + settings.rounds * every + 4
    arms = {name: _arm(settings, messages, steps, every if name == "saving" else 10**9, blocked) for name in _ARMS}

    def run_block(arm: str, count: int) -> list[float]:
        dist.barrier()
        return arms[arm][0].run_block(count)

    for arm in _ARMS:
        run_block(arm, warm_up)
    for number in range(settings.rounds):
        for arm in random.Random(number).sample(_ARMS, len(_ARMS)):
            blocked.clear()
            seconds = sum(run_block(arm, every))
            results.send(_Told(arm, seconds, list(blocked)))
            arms[arm][1]()
    for gate, _ in arms.values():
        gate.end()
    results.close()
    dist.destroy_process_group()


def _arm(
    settings: _Settings, messages: Connection, steps: int, every_steps: int, blocked: list[float]
) -> tuple[Gate, Callable[[], None]]:
    """A launched loop, put together as ``jobs.training.worker.train`` does; and a function that waits for its saves."""
    import torch

    from cluster.process.activity import Activity
    from cluster.process.agent_link import AgentLink
    from cluster.process.messages import RowLogged
    from cluster.run.run_directory import RunDirectory
    from jobs.checkpoint.loop_state import LoopState
    from jobs.checkpoint.saver import Saver
    from jobs.components.build import build_parts
    from jobs.parallel.worker_team import Team
    from jobs.training.loop import Loop

    spec, device = settings.job(steps, every_steps), torch.device("cpu")
    import torch.distributed as dist

    team = Team(rank=dist.get_rank(), world_size=_WORKERS, shards=spec.train.shards, exact=True, device=device)
    parts, progress, link = build_parts(spec, device), LoopState(), AgentLink(messages, Activity())
    saver = Saver(parts, progress, RunDirectory(f"{settings.store}/run").checkpoints, link, team, None)

    def save(metrics: dict[str, float], *, is_needed: bool) -> None:
        began = time.perf_counter()
        saver.save(metrics, is_needed=is_needed)
        blocked.append(time.perf_counter() - began)

    def log(row: Mapping[str, float]) -> None:
        if team.rank == 0:
            link.send(RowLogged(row=row, time=time.time(), spent=link.activity.spent()))

    def train(gate: Gate) -> None:
        loop = Loop(spec, parts, progress, team, metrics={}, log=log, tell=link.send, save=save, stop_wanted=gate)
        loop.run()

    return Gate(train), saver.wait


def stock_blocked(folder: Path, count: int) -> list[float]:
    """What each checkpoint of a stock script kept its rank 0 from training, in seconds; the first is not counted."""
    text = _SCRIPT.replace("COUNT", repr(count + 1)).replace("STORAGE", repr(str(folder)))
    (folder / "stock.py").write_text(text)
    subprocess.run(
        [sys.executable, "stock.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    blocked: list[float] = json.loads((folder / "blocked.json").read_text())
    return blocked[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each arm")
    parser.add_argument("--count", type=int, default=12, help="checkpoints of the stock script")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {arm: [] for arm in _ARMS}
    ours: list[float] = []
    with tempfile.TemporaryDirectory(prefix="launcher-benchmark-") as folder:
        stock = stock_blocked(Path(folder), arguments.count // 2)
        work = partial(_work, _Settings(f"{folder}/runs", arguments.rounds))
        for told in side_by_side(work, _WORKERS, arguments.rounds * len(_ARMS)):
            seconds[told[0].arm].append(max(worker.seconds for worker in told))
            ours += [max(saves) for saves in zip(*(worker.blocked for worker in told))]
        stock += stock_blocked(Path(folder), arguments.count - arguments.count // 2)
    blocked, stock_time = Quartiles.of([1000 * s for s in ours]), Quartiles.of([1000 * s for s in stock])
    print(f"blocked   launcher {blocked:8.1f} ms, n = {len(ours)}")
    print(f"          stock    {stock_time:8.1f} ms, n = {len(stock)}; ratio {blocked.median / stock_time.median:.4f}")
    document: dict[str, Any] = {
        "blocked_ms": round(blocked.median, 2),
        "stock_blocked_ms": round(stock_time.median, 1),
        "blocked_ratio": round(blocked.median / stock_time.median, 5),
    }
    for arm in ("saving", "aa"):
        ratio = Quartiles.of([a / b for a, b in zip(seconds[arm], seconds["without"])])
        print(f"{arm:9} {ratio:.4f} of the time without, n = {arguments.rounds}")
        document[arm] = round(ratio.median, 4)
        document[f"{arm}_quartiles"] = [round(ratio.low, 4), round(ratio.high, 4)]
    print(json.dumps(document | {"n": len(ours), "rounds": arguments.rounds, "workers": _WORKERS}))


if __name__ == "__main__":
    main()
