"""A worker on a GPU computes what plain torch computes, to the bit, and the same bits every time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.components.build import numerics, worker_device
from jobs.data.loader import seed_draws
from jobs.sampling import StepPlan, draw_key
from jobs.spec import JobSpec
from tests.distributed.small_job import STEPS, Images, Net, full_job, plain_job, target
from tests.distributed.team_process import Outcome, newest_state
from tests.gpu.workers import run_here, saved_files, train, train_and_die

pytestmark = pytest.mark.gpu

CLIP_NORM = 0.5


def train_with_plain_torch(link: AgentLink, task: Task) -> dict[str, Tensor]:  # noqa: ARG001
    """One process, one gradient a shard by ``torch.autograd.grad``, summed pairwise by hand; nothing of the loop."""
    spec: JobSpec = task.content
    device, train = worker_device(on_gpu=task.on_gpu), spec.train
    numerics(spec, device)
    dataset = Images(**spec.data.train.args)
    seed_draws(draw_key("model", spec.seed), device)
    model = Net(**spec.model.args).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, **spec.optimizer.factory.args)
    steps = StepPlan(len(dataset), train.global_batch, train.shards, train.epochs)
    for step in range(steps.total_steps):
        at_start = [buffer.clone() for buffer in model.buffers()]
        gradients, of_first = [], at_start
        for shard in range(train.shards):
            for buffer, value in zip(model.buffers(), at_start):
                buffer.copy_(value)
            images, labels = zip(*(dataset[int(number)] for number in steps.samples(spec.seed, step, shard)))
            seed_draws(draw_key("step", spec.seed, step, shard), device)  # of dropout
            output_NK = model(torch.stack(images).to(device))
            total = cross_entropy(output_NK, torch.tensor(labels).to(device), reduction="sum")
            gradients.append(torch.autograd.grad(total * (1.0 / train.global_batch), parameters))
            if shard == 0:
                of_first = [buffer.clone() for buffer in model.buffers()]
        for buffer, value in zip(model.buffers(), of_first):
            buffer.copy_(value)
        for parameter, *terms in zip(parameters, *gradients):
            while len(terms) > 1:  # (0 + 1) + (2 + 3)
                terms = [left + right for left, right in zip(terms[::2], terms[1::2])]
            parameter.grad = terms[0].clone()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
    return {name: value.cpu().numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_worker_computes_the_bits_of_plain_torch(device: torch.device, tmp_path: Path, shards: int) -> None:
    """With dropout, BatchNorm and clipping, over the summation tree of its shards."""
    job = plain_job(tmp_path, "run", shards=shards, clip_norm=CLIP_NORM)
    job = replace(job, model=target("Net", dropout=0.3))

    plain = run_here(train_with_plain_torch, job, device).results[0]
    run_here(train, job, device)

    ours = newest_state(job)["model"]
    differing = [name for name, value in plain.items() if not torch.equal(ours[name], torch.from_numpy(value))]
    assert not differing, f"of {len(plain)} tensors"
    assert ours.keys() == plain.keys()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    return full_job(tmp_path_factory.mktemp("full"), "run")


@pytest.fixture(scope="module")
def undisturbed(device: torch.device, full: JobSpec) -> Outcome:
    """The whole of the full job: clipping, EMA, dropout, augmentation, BatchNorm, a group that unfreezes."""
    return run_here(train, full, device)


def assert_same(job: JobSpec, outcome: Outcome, other_job: JobSpec, other: Outcome) -> None:
    assert outcome.digests == other.digests
    assert saved_files(job) == saved_files(other_job)
    by_step = {row["step"]: row for row in outcome.rows}
    assert all(by_step[row["step"]] == row for row in other.rows if row["step"] in by_step)


def test_two_runs_have_equal_bits(device: torch.device, full: JobSpec, undisturbed: Outcome, tmp_path: Path) -> None:
    """Weights, moments, schedule, average and buffers, and every row; and the run learns, or it would prove little."""
    again = full_job(tmp_path, "run")

    outcome = run_here(train, again, device)

    assert_same(again, outcome, full, undisturbed)
    assert len(outcome.rows) == STEPS
    assert outcome.rows[-1]["val/loss"] < outcome.rows[3]["val/loss"]


def test_a_killed_run_goes_on_with_equal_bits(
    device: torch.device, full: JobSpec, undisturbed: Outcome, tmp_path: Path
) -> None:
    """SIGKILL at step 8; another process restores step 6 and trains to the end."""
    job = full_job(tmp_path, "run")

    with pytest.raises(AssertionError, match="a rank died"):
        run_here(train_and_die, job, device, at_step=8, saved_step=6)
    outcome = run_here(train, job, device)

    assert outcome.started == 6
    assert set(outcome.digests) == {9, 12}
    assert_same(job, outcome, full, replace_digests(undisturbed, outcome))


def replace_digests(whole: Outcome, part: Outcome) -> Outcome:
    """What the undisturbed run said of the checkpoints that another one made."""
    return replace(whole, digests={step: whole.digests[step] for step in part.digests})
