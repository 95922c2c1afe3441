"""Every key that may change memory order, precision or the order of sums, with every other: the same bits, and right.

The cases cover all pairs of the values below. In each, the run is trained by one worker, and by others that take over
from each other in the middle; both must end with the same bits. Then one process of plain torch, which keeps all
tensors in torch's own memory order, must come to the same weights but for rounding.
"""

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from jobs.data.loader import seed_draws, seed_host_draws
from jobs.sampling import StepPlan, draw_key
from jobs.spec import GroupSpec, JobSpec, LossSpec, OptimizerSpec, Target
from tests.distributed.small_job import SAMPLES, Images, OddNet, full_job, images, target
from tests.distributed.team_process import newest_state, run_job

STEPS, RESUMED_AT, THAWED_AT = 5, 3, 2
CPU = torch.device("cpu")

KEYS: dict[str, Sequence[Any]] = {
    "precision": ("fp32", "bf16", "fp16"),
    "workers": ((2, 3), (3, 4), (4, 2)),
    "clip": ({}, {"clip_norm": 0.1}, {"clip_value": 0.01}),
    "channels_last": (True, False),
    "shards": (4, 6),
    "optimizer": (
        Target("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
        Target(
            "AdamW", {"lr": 0.01, "eps": 1e-3, "fused": True}
        ),  # so large that a gradient of nothing but rounding moves nothing
    ),
    "loss": ({}, {"weight": [0.2, 3.0, 1.0, 0.5, 2.0], "ignore_index": -100}),
    "thaws": (True, False),
    "ema_decay": (0.9, None),
    "dropout": (0.3, 0.0),
    "norm": (True, False),
    "on_nonfinite": ("stop", "skip"),
    "loaders": (0, 2),
    "bucket_mb": (None, 0.01),
}
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.2}
"""How far the change of a tensor may be from that of plain torch, as a part of its length. Rounding comes to 2e-5 and
0.1 of it, as between plain torch in 16 and in 32 bits; gradients at the wrong places to about 1."""


def pairwise(keys: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few cases in which each two values of different keys meet; a case takes the values that are in most new pairs."""
    numbers = {key: range(len(values)) for key, values in keys.items()}
    left = {
        frozenset({(a, i), (b, j)})
        for a, b in itertools.combinations(keys, 2)
        for i, j in itertools.product(numbers[a], numbers[b])
    }
    cases = []
    while left:
        case = dict(min(left, key=sorted))
        for key in [key for key in keys if key not in case]:
            met = {n: sum(frozenset({(key, n), pair}) in left for pair in case.items()) for n in numbers[key]}
            case[key] = max(met, key=met.__getitem__)
        left -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        cases.append({key: keys[key][case[key]] for key in keys})
    return cases


def described(case: Mapping[str, Any], store: Path) -> JobSpec:
    job = full_job(store, "run")
    train = replace(
        job.train,
        **{"clip_norm": None, "clip_value": None} | case["clip"],
        **{key: case[key] for key in ("precision", "channels_last", "shards", "ema_decay", "on_nonfinite")},
        bucket_mb=case["bucket_mb"],
        max_steps=STEPS,
    )
    thawing = (GroupSpec(match="conv2.*", from_step=THAWED_AT),) if case["thaws"] else ()
    return replace(
        job,
        model=target("OddNet", dropout=case["dropout"], norm=case["norm"]),
        data=replace(images(ignored=3 if case["loss"] else 0), loaders=case["loaders"]),
        loss=LossSpec(factory=Target("CrossEntropyLoss", case["loss"])),
        optimizer=OptimizerSpec(factory=case["optimizer"], groups=thawing),
        scheduler=None,
        train=train,
    )


def train_plainly(job: JobSpec) -> dict[str, Any]:
    """The same training in one process, as a tutorial has it but for the order of samples and the draws of dropout."""
    seed_host_draws(draw_key("model", job.seed))
    model = OddNet(**job.model.args)
    begun_with = {name: value.clone() for name, value in model.state_dict().items()}
    dataset, train = Images(**job.data.train.args), job.train
    steps = StepPlan(SAMPLES, train.global_batch, train.shards, train.epochs)
    optimizer = getattr(torch.optim, job.optimizer.factory.path)(model.parameters(), **job.optimizer.factory.args)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay)) if train.ema_decay else None
    scaler = torch.amp.GradScaler("cpu", enabled=train.precision == "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(train.precision)
    loss_args = {name: torch.tensor(v) if name == "weight" else v for name, v in job.loss.factory.args.items()}
    for step in range(STEPS):
        model.conv2.requires_grad_(not job.optimizer.groups or step >= THAWED_AT)
        samples = [steps.samples(job.seed, step, shard) for shard in range(train.shards)]
        labels_N = torch.tensor([dataset[int(number)][1] for shard in samples for number in shard])
        weights_N = torch.ones(len(labels_N))
        if "weight" in loss_args:
            weights_N = torch.where(labels_N == -100, 0.0, loss_args["weight"][labels_N.clamp(min=0)])
        at_start = [buffer.clone() for buffer in model.buffers()]
        after_first: list[Tensor] = []
        for shard, numbers in enumerate(samples):
            for buffer, value in zip(model.buffers(), at_start):
                buffer.copy_(value)
            images_N188 = torch.stack([dataset[int(number)][0] for number in numbers])
            targets_N = torch.tensor([dataset[int(number)][1] for number in numbers])
            seed_draws(draw_key("step", job.seed, step, shard), CPU)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                total = cross_entropy(model(images_N188), targets_N, reduction="sum", **loss_args)
            scaler.scale(total / weights_N.sum()).backward()
            after_first = after_first or [buffer.clone() for buffer in model.buffers()]
        for buffer, value in zip(model.buffers(), after_first):
            buffer.copy_(value)
        scaler.unscale_(optimizer)
        if train.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        if train.clip_value is not None:
            nn.utils.clip_grad_value_(model.parameters(), train.clip_value)
        scaler.step(optimizer)
        scaler.update()
        if average is not None:
            average.update_parameters(model)
        optimizer.zero_grad()
    return {"begun_with": begun_with, "model": model.state_dict(), "ema": average and average.module.state_dict()}


def assert_near(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], begun_with: Mapping[str, Tensor], part: float):
    for name, expected in plain.items():
        update, error = expected - begun_with[name], ours[name] - expected
        assert update.double().norm() > 0, name
        assert error.double().norm() <= part * update.double().norm(), name


def id_of(case: Mapping[str, Any]) -> str:
    words = {
        "clip": next(iter(case["clip"]), "no clip"),
        "workers": "{}, {} workers".format(*case["workers"]),
        "optimizer": case["optimizer"].path,
        "loss": "weighted" if case["loss"] else "",
        "bucket_mb": "small buckets",
    }
    told = {key: words.get(key, key if value is True else value) for key, value in case.items() if value}
    return ", ".join(str(told[key]) for key in told)


CASES = pairwise(KEYS)
QUICK = 4
"""So many cases are in the default tier; each value is in one of them."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=id_of(case), marks=[pytest.mark.slow] * (n >= QUICK)) for n, case in enumerate(CASES)],
)
def test_same_bits_and_right(case: dict[str, Any], tmp_path: Path) -> None:
    job = described(case, tmp_path)
    first, second = case["workers"]

    alone = run_job(replace(job, name="alone", train=replace(job.train, bucket_mb=None)), 1)
    run_job(replace(job, train=replace(job.train, max_steps=RESUMED_AT)), first)
    together = run_job(job, second)

    assert together.started == RESUMED_AT
    assert together.digest == alone.digest
    assert together.rows == alone.rows[RESUMED_AT:]
    plain, ours = train_plainly(job), newest_state(job)
    part = TOLERANCE[case["precision"]]
    assert_near(ours["model"], plain["model"], plain["begun_with"], part)
    if plain["ema"] is not None:
        averaged = {name.removeprefix("module."): value for name, value in ours["ema"].items()}
        assert_near(averaged, plain["ema"], plain["begun_with"], part)


def test_each_value_is_in_a_quick_case() -> None:
    for key, values in KEYS.items():
        assert all(any(case[key] == value for case in CASES[:QUICK]) for value in values), key


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled(tmp_path: Path) -> None:
    """Kernels that torch writes for this model."""
    case = {**CASES[0], "dropout": 0.0, "thaws": False}  # compiled code draws otherwise, and a thaw compiles again
    job = described(case, tmp_path)
    job = replace(job, train=replace(job.train, compile=True))
    alone, together = (run_job(replace(job, name=f"run-{workers}"), workers) for workers in (1, 4))

    assert together.digest == alone.digest
    assert together.rows == alone.rows
    plain = train_plainly(job)
    assert_near(newest_state(replace(job, name="run-4"))["model"], plain["model"], plain["begun_with"], 1e-3)
