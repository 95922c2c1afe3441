"""Losses in real training on two workers are what plain torch makes of the whole batch and the whole dataset."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from jobs.sampling import StepPlan
from jobs.spec import DataSpec, LossSpec, Target
from tests.distributed.small_job import CLASSES, SAMPLES, VAL_SAMPLES, Images, images, plain_job
from tests.distributed.team_process import newest_state, run_job
from tests.distributed.test_meaning import buffers_of, initial_net, stacked

WEIGHT = [0.2, 3.0, 1.0, 0.5, 2.0]
POS_WEIGHT = [4.0, 4.0, 2.0, 4.0, 4.0]


def one_hot(labels_N: Tensor) -> Tensor:
    return functional.one_hot(labels_N, CLASSES).float()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "L1Loss": (
        {"output": "sigmoid", "target": "one_hot"},
        {},
        lambda z, y: (z.sigmoid() - one_hot(y)).abs().mean(),
    ),
    "MSELoss": (
        {"output": "softmax", "target": "one_hot"},
        {"reduction": "none"},
        lambda z, y: (z.softmax(1) - one_hot(y)).square().mean(),
    ),
    "CrossEntropyLoss": (
        {"target": "index"},
        {"weight": WEIGHT, "ignore_index": 0, "label_smoothing": 0.1},
        lambda z, y: functional.cross_entropy(z, y, torch.tensor(WEIGHT), ignore_index=0, label_smoothing=0.1),
    ),
    "KLDivLoss": (
        {"output": "log_softmax", "target": "one_hot"},
        {"reduction": "batchmean"},
        lambda z, y: functional.kl_div(z.log_softmax(1), one_hot(y), reduction="batchmean"),
    ),
    "BCELoss": (
        {"output": "sigmoid", "target": "one_hot"},
        {"weight": WEIGHT},
        lambda z, y: functional.binary_cross_entropy(z.sigmoid(), one_hot(y), torch.tensor(WEIGHT)),
    ),
    "BCEWithLogitsLoss": (
        {"target": "one_hot"},
        {"pos_weight": POS_WEIGHT, "reduction": "sum"},
        lambda z, y: functional.binary_cross_entropy_with_logits(
            z, one_hot(y), pos_weight=torch.tensor(POS_WEIGHT), reduction="sum"
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_trains_and_validates_as_in_plain_torch(name: str, tmp_path: Path) -> None:
    fields, args, plain = CASES[name]
    val = Target("tests.distributed.small_job.Images", {"length": VAL_SAMPLES})
    job = plain_job(tmp_path, "run", epochs=1)
    job = replace(
        job, loss=LossSpec(factory=Target(name, args), **fields), data=DataSpec(train=images().train, val=val)
    )
    rows = run_job(job, world_size=2).rows

    # The net sees a shard at a time, each from the same buffers; everything after the logits sees the whole batch.
    net, dataset, steps = initial_net(job), Images(SAMPLES), StepPlan(SAMPLES, 12, 4, 1)
    shards = [stacked(dataset, steps.samples(job.seed, 0, shard)) for shard in range(4)]
    logits_NK = torch.cat([functional_call(net, buffers_of(net), images_N188) for images_N188, _ in shards])
    first = plain(logits_NK, torch.cat([labels_N for _, labels_N in shards]))
    assert rows[0]["train/loss"] == pytest.approx(first.item(), rel=1e-6)  # float32 holds 7 digits

    net.load_state_dict(newest_state(job)["model"])
    net.eval()
    images_N188, labels_N = stacked(Images(VAL_SAMPLES), range(VAL_SAMPLES))
    with torch.no_grad():
        whole = plain(net(images_N188), labels_N)
    assert rows[-1]["val/loss"] == pytest.approx(whole.item(), rel=1e-5)  # the batches of a sum of 17 round apart
    assert 0 < rows[-1]["val/accuracy"] <= 1
