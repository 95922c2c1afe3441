"""A validation measures every sample once, and comes to the same bits on any number of workers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.components.losses import build_loss
from jobs.components.metric_values import MetricValues
from jobs.components.metrics import build_metrics
from jobs.components.targets import Builder
from jobs.data.loader import validation_batches
from jobs.parallel.worker_team import Team
from jobs.spec import LossSpec, Target
from jobs.training.evaluation import evaluate
from jobs.training.worker import meet
from tests.distributed.small_job import CLASSES, Images, full_job
from tests.distributed.team_process import TIMEOUT_S, run_processes

SEED, BATCH = 7, 3
WEIGHT = [0.2, 3.0, 1.0, 0.5, 2.0]
K = {"num_classes": CLASSES, "ignore_index": -100}
METRICS = {
    "top2": Target("MulticlassAccuracy", K | {"top_k": 2, "average": "micro"}),
    "recall": Target("MulticlassRecall", K | {"average": "none"}),
    "confusion": Target("MulticlassConfusionMatrix", K),
    "hinge": Target("MulticlassHingeLoss", K),  # a sum of floats
    "calibration": Target("MulticlassCalibrationError", K),  # all samples, then in one
}
CASES: dict[str, tuple[int, int, dict[str, Any], tuple[int, ...]]] = {
    # samples, every so many-th of them ignored, arguments of the loss, bad samples
    "17 samples": (17, 0, {}, ()),
    "2 samples, which are one batch": (2, 0, {}, ()),
    "17 samples, weighed and some ignored": (17, 4, {"weight": WEIGHT, "ignore_index": -100}, ()),
    "17 samples, summed": (17, 0, {"reduction": "sum"}, ()),
    "17 samples, some bad": (17, 0, {"weight": WEIGHT}, (4, 16)),
    "17 samples, with bad batches": (17, 0, {}, (0, 1, 2, 4, 9, 10, 11)),
    "6 samples, of which rank 0 has none": (6, 0, {}, (0, 1, 2)),
}


class Linear(nn.Module):
    """Draws even when it is validated."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.linear = nn.Linear(64, CLASSES)
        self.drop = drop

    def forward(self, images_N188: Tensor) -> Tensor:
        return self.linear(dropout(images_N188.flatten(1), self.drop))


def build_model(drop: float) -> Linear:
    torch.manual_seed(SEED)
    return Linear(drop)


def validate(link: AgentLink, task: Task) -> dict[str, MetricValues]:
    """Every case, one after the other, with one set of metrics."""
    meet(link, task, TIMEOUT_S)
    device = torch.device("cpu")
    team = Team(rank=task.rank, world_size=task.world_size, shards=4, exact=True, device=device)
    metrics = build_metrics(METRICS, Builder())
    results = {}
    for drop in (0.0, 0.5):
        for name, (samples, ignored, args, bad) in CASES.items():
            loss = build_loss(LossSpec(factory=Target("CrossEntropyLoss", args)), Builder()).to(device)
            batches = validation_batches(
                Images(samples, ignored=ignored, bad=bad), batch_size=BATCH, seed=SEED, rank=team.rank,
                world_size=team.world_size, loaders=0, device=device, weigh=loss.target_weights(),
                on_bad_sample="skip",
            )  # fmt: skip
            # As a list: what a loader has seeded last, which depends on the worker, must not reach the model.
            results[f"{name}, drop {drop}"] = evaluate(build_model(drop), loss, metrics, list(batches), team, SEED)
    team.barrier()
    team.close()
    return results


@pytest.fixture(scope="module")
def by_world_size(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[int, dict[str, MetricValues]]]:
    """For each number of workers, what each rank came to."""
    return {size: validated(tmp_path_factory.mktemp("run"), size) for size in (1, 2, 3, 4)}


def validated(store: Path, world_size: int) -> dict[int, dict[str, MetricValues]]:
    outcome = run_processes(validate, full_job(store, "run"), world_size)
    assert not outcome.failures, "\n".join(outcome.failures.values())
    return outcome.results


def test_any_number_of_workers_measures_the_same_bits(by_world_size: dict[int, Any]) -> None:
    alone = by_world_size[1][0]
    assert len(alone) == 2 * len(CASES)
    for world_size, ranks in by_world_size.items():
        assert ranks == dict.fromkeys(range(world_size), alone)


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_one_process_measures_on_the_whole(by_world_size: dict[int, Any], case: str) -> None:
    """Sums of at most 17 floats in another order: equal to a few units in the last place of 32 bits."""
    samples, ignored, args, bad = CASES[case]
    images = Images(samples, ignored=ignored)
    good = [number for number in range(samples) if number not in bad]
    weight = torch.tensor(args["weight"]) if "weight" in args else None
    with torch.no_grad():
        logits_NK = build_model(drop=0.0)(images.images_N188[good])
    labels_N = images.labels_N[good]
    counted = labels_N != -100
    said_N = logits_NK.argmax(1)
    measured = by_world_size[4][0][f"{case}, drop 0.0"]

    loss = cross_entropy(logits_NK, labels_N, weight, reduction=args.get("reduction", "mean"))
    assert measured.numbers["val/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert measured.numbers["val/accuracy"] == int((said_N == labels_N).sum()) / int(counted.sum())
    counts = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for true, said in zip(labels_N[counted], said_N[counted]):
        counts[true, said] += 1
    assert measured.matrices["val/confusion"].values == counts.tolist()
    recalls = (counts.diag() / counts.sum(1).clamp(min=1)).tolist()
    assert [measured.numbers[f"val/recall/{k}"] for k in range(CLASSES)] == pytest.approx(recalls)
    assert measured.numbers.keys() >= {"val/top2", "val/hinge", "val/calibration"}


def test_every_forward_pass_draws_by_its_batch_alone(by_world_size: dict[int, Any]) -> None:
    """What the test of the bits compares is worth it: these models do draw."""
    still, drawing = (by_world_size[1][0][f"17 samples, drop {drop}"] for drop in (0.0, 0.5))
    assert still.numbers["val/loss"] != drawing.numbers["val/loss"]
