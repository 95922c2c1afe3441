"""What the workers compute together is what plain torch computes: exactness alone could be exactly wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.data.loader import seed_host_draws
from jobs.sampling import StepPlan, draw_key
from jobs.spec import JobSpec, LossSpec, Target
from jobs.training.worker import meet
from tests.distributed.small_job import SAMPLES, VAL_SAMPLES, Images, Net, images, plain_job
from tests.distributed.team_process import TIMEOUT_S, Outcome, newest_state, run_job, run_processes, train_job

# Sums of float32 in another order differ in the last bits, 6e-8 of a term, and steps of momentum carry that on.
# A gradient off by a factor, or the buffers of another shard, would show in the second digit.
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}


def initial_net(spec: JobSpec) -> Net:
    seed_host_draws(draw_key("model", spec.seed))
    return Net(**spec.model.args)


def buffers_of(net: Net) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def stacked(dataset: Images, numbers: Any) -> tuple[Tensor, Tensor]:
    samples = [dataset[int(number)] for number in numbers]
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def train_with_plain_ddp(link: AgentLink, task: Task) -> dict[str, np.ndarray]:
    """The loop of a tutorial: a micro-batch per rank, and DDP's own buckets, mean and broadcast of buffers."""
    spec: JobSpec = task.content
    torch.set_num_threads(1)
    meet(link, task, TIMEOUT_S)
    dataset = Images(**spec.data.train.args)
    steps = StepPlan(len(dataset), spec.train.global_batch, spec.train.shards, spec.train.epochs)
    model = DistributedDataParallel(initial_net(spec))
    optimizer = torch.optim.SGD(model.parameters(), **spec.optimizer.factory.args)
    for step in range(steps.total_steps):
        images_N188, labels_N = stacked(dataset, steps.samples(spec.seed, step, shard=task.rank))
        optimizer.zero_grad()
        cross_entropy(model(images_N188), labels_N).backward()
        optimizer.step()
    dist.barrier()
    return {name: tensor.numpy() for name, tensor in model.module.state_dict().items()}


@pytest.mark.parametrize("workers", [2, 4])
def test_with_a_worker_per_shard_the_state_is_that_of_plain_ddp(tmp_path: Path, workers: int) -> None:
    job = plain_job(tmp_path, "plain", shards=workers)
    plain = run_processes(train_with_plain_ddp, job, workers)
    assert not plain.failures, "\n".join(plain.failures.values())
    plain_state = {name: torch.from_numpy(array) for name, array in plain.results[0].items()}

    for exact in (False, True):
        ours = replace(job, name=f"exact-{exact}", train=replace(job.train, exact=exact))
        run_job(ours, workers)
        torch.testing.assert_close(newest_state(ours)["model"], plain_state, **ROUNDING)


def test_a_weighted_loss_is_the_mean_over_the_global_batch(tmp_path: Path) -> None:
    """Class weights and ignored labels, which the shards have different shares of."""
    loss = {"weight": [0.2, 3.0, 1.0, 0.5, 2.0], "ignore_index": -100}
    job = plain_job(tmp_path, "run", epochs=1, max_steps=1)
    job = replace(job, data=images(ignored=3), loss=LossSpec(factory=Target("CrossEntropyLoss", loss)))
    outcomes = [run_job(replace(job, name=f"run-{workers}"), workers) for workers in (1, 2, 4)]

    net, dataset, steps = initial_net(job), Images(**job.data.train.args), StepPlan(SAMPLES, 12, 4, 1)
    shards = [stacked(dataset, steps.samples(job.seed, 0, shard)) for shard in range(4)]
    assert len({int((labels_N == -100).sum()) for _, labels_N in shards}) > 1
    # The net sees a shard at a time, each from the same buffers; everything after the logits sees the whole batch.
    logits_NK = torch.cat([functional_call(net, buffers_of(net), images_N188) for images_N188, _ in shards])
    labels_N = torch.cat([labels_N for _, labels_N in shards])
    whole = cross_entropy(logits_NK, labels_N, torch.tensor(loss["weight"]), ignore_index=-100)
    whole.backward()
    torch.optim.SGD(net.parameters(), **job.optimizer.factory.args).step()

    assert len({outcome.digest for outcome in outcomes}) == 1
    assert outcomes[0].rows[0]["train/loss"] == pytest.approx(whole.item(), rel=1e-6)  # float32 holds 7 digits
    trained = newest_state(replace(job, name="run-4"))["model"]
    torch.testing.assert_close(
        {name: trained[name] for name, _ in net.named_parameters()}, dict(net.named_parameters()), **ROUNDING
    )


def test_validation_is_one_plain_pass_over_all_samples(undisturbed: Outcome, full: JobSpec) -> None:
    """The averaged weights validate, on 17 samples, which no number of workers divides."""
    net, dataset = Net(), Images(VAL_SAMPLES)
    averaged = newest_state(full)["ema"]
    net.load_state_dict({name.removeprefix("module."): averaged[name] for name in averaged if name != "n_averaged"})
    net.eval()
    images_N188, labels_N = stacked(dataset, range(VAL_SAMPLES))
    with torch.no_grad():
        logits_NK = net(images_N188)

    last = undisturbed.rows[-1]
    loss = cross_entropy(logits_NK, labels_N, label_smoothing=0.1).item()
    assert last["val/loss"] == pytest.approx(loss, rel=1e-6)  # float32 holds 7 digits
    assert last["val/accuracy"] == (logits_NK.argmax(dim=1) == labels_N).sum().item() / VAL_SAMPLES


def test_a_nan_ends_the_run_on_every_rank_with_the_step_and_its_samples_named(tmp_path: Path) -> None:
    """It appears in one sample of one shard; its gradient would spoil all others a step later."""
    job = plain_job(tmp_path, "run")
    steps = StepPlan(SAMPLES, 12, 4, 2)
    samples = steps.samples(job.seed, batch=2, shard=3)
    named, broken = ", ".join(map(str, samples)), int(samples[1])
    job = replace(job, data=images(broken=broken))

    outcome = run_processes(train_job, job, world_size=3)

    assert [row["step"] for row in outcome.rows] == [1, 2]
    assert outcome.failures.keys() == {0, 1, 2}
    for message in outcome.failures.values():
        assert message.startswith(f"step 3: the loss is nan, in shard 3: samples {named} of data.train; lower")
