"""From the command to the first training step: ``python -m tests.benchmarks.startup``.

Two arms take turns, each as a fresh process in a fresh folder: ``launcher run`` on a small description, and a script
as Ray's documentation has it, ``ray.init`` and a stock ``TorchTrainer`` with their defaults. Both train ResNet-18 on
the same images with two workers and end after one step. The clock starts just before the process, and stops when the
slowest worker has taken its first optimizer step: both arms use one optimizer class that writes down when that was, in
a process that has a process group (the launcher's trial in its own process is no training, and is part of the time).
The stock script names the address ``local`` only so that it cannot join another cluster of this machine.

Reported for each arm: median, least and most seconds; for the launcher also where they went, by its event log; for both
the seconds until the process had ended. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.twins import NUM_WORKERS, Training, Twin, launcher, seconds_to, stock

JOB = """
name: twin
store: runs
model: {_target_: torchvision.models.resnet18, num_classes: 100}
data:
  train: {_target_: jobs.data.synthetic_images, length: 640, num_classes: 100, image_size: 64}
loss: {_target_: CrossEntropyLoss}
optimizer: {_target_: stamped.StampedSGD, lr: 0.01, momentum: 0.9}
train: {global_batch: 64, shards: 2, max_steps: 1}
workers: {num: 2}
tracking: {mode: disabled}
"""
SCRIPT = """
import ray
import ray.train
import ray.train.torch
import torch
import torchvision
from jobs.data import synthetic_images
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from stamped import StampedSGD
from torch.utils.data import DataLoader


def train():
    model = ray.train.torch.prepare_model(torchvision.models.resnet18(num_classes=100))
    images = synthetic_images(length=640, num_classes=100, image_size=64)
    loader = ray.train.torch.prepare_data_loader(DataLoader(images, batch_size=32, shuffle=True))
    loss = torch.nn.CrossEntropyLoss()
    optimizer = StampedSGD(model.parameters(), lr=0.01, momentum=0.9)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
        break


if __name__ == "__main__":
    ray.init(**RAY_INIT)
    TorchTrainer(
        train, scaling_config=ScalingConfig(num_workers=2), run_config=RunConfig(storage_path=STORAGE)
    ).fit()
"""
_TIMEOUT_S = 300.0
_PHASES = ("attempt_started", "training")
_ARMS = {"launcher": launcher(job=JOB), "stock": stock(script=SCRIPT, address="local")}


def run_once(twin: Twin) -> dict[str, float]:
    """Seconds from the command to the first step, to the end, and to what the launcher's events tell."""
    with tempfile.TemporaryDirectory(prefix="launcher-benchmark-") as folder:
        start = time.time()
        training = Training(twin, Path(folder))
        exit_code = training.process.wait(_TIMEOUT_S)
        end = time.time()
        first_steps = [stamp.time for stamp in training.stamps()]
        if exit_code != 0 or len(first_steps) != NUM_WORKERS:
            raise SystemExit(f"it ended with {exit_code}:\n{training.output()}")
        return {"first_step": max(first_steps) - start, "end": end - start} | seconds_to(training, start, _PHASES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each arm")
    parser.add_argument("--arms", default=",".join(_ARMS), help="which arms, with commas between")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arguments.arms.split(",")}
    for number in range(arguments.runs):
        for arm, moments in found.items():
            moments.append(run_once(_ARMS[arm]))
            times = ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in sorted(moments[-1].items(), key=_second))
            print(f"{number} {arm}: {times}", file=sys.stderr)
    document: dict[str, Any] = {"n": arguments.runs}
    print(f"ResNet-18, 2 workers, seconds from the command, n={arguments.runs}: median (least-most)")
    for arm, moments in found.items():
        for kind in (*_PHASES, "first_step", "end"):
            seconds = [moment[kind] for moment in moments if kind in moment]
            if seconds:
                median = statistics.median(seconds)
                print(f"{arm:9} {kind:16} {median:6.2f} ({min(seconds):.2f}-{max(seconds):.2f})")
                document[f"{arm}_{kind}"] = round(median, 3)
    if len(found) == len(_ARMS):
        pairs = zip(found["launcher"], found["stock"])
        document["ratio"] = round(document["launcher_first_step"] / document["stock_first_step"], 3)
        document["pairwise"] = round(statistics.median(a["first_step"] / b["first_step"] for a, b in pairs), 3)
    print(json.dumps(document))


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


if __name__ == "__main__":
    main()
