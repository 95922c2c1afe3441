"""Rehearses what a worker does with its components, in a team of one worker.

It validates the first and the last batch, and takes the first step twice by the code of the training loop: with DDP,
the summation tree, the gradient scaler and the averaged weights, the second time from the bytes of a checkpoint. So
what a worker would refuse is refused before one starts. A second step that differs depends on something that no
checkpoint holds, and a resumed run would train on with other numbers.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import CheckpointError, DescriptionError, LauncherError, TrainingError, in_short
from cluster.host.interfaces import interface_of
from cluster.process.messages import Doing
from jobs.checkpoint.layout import bytes_of, decode, lay_out, memory_of
from jobs.components.build import Components
from jobs.data.loader import seed_draws
from jobs.parallel.worker_team import Team
from jobs.sampling import draw_key
from jobs.spec import JobSpec
from jobs.training.evaluation import evaluate
from jobs.training.step import TrainingStep
from launcher.planning.same_bits import has_same_bits

_MOST_SHARDS = 2
"""Two shards take every path of a step: the first one's gradients are set aside, the last one's are exchanged."""
_PARTS = {
    "forward": "model: forward",
    "backward": "loss: backward, or clipping its gradients,",
    "step": "optimizer: step",
}
"""The part of the description that a phase of a step belongs to."""


class _Snapshot:
    """The state of components as the bytes of a checkpoint's files.

    Attributes:
        size: The number of bytes.
    """

    def __init__(self, components: Components) -> None:
        """Copies the state.

        Raises:
            DescriptionError: The state holds something that a checkpoint cannot hold.
        """
        try:
            layout = lay_out(components.state())
        except CheckpointError as error:
            raise DescriptionError(f"{error}") from error
        self.size = layout.size
        self._data = torch.empty(layout.size, dtype=torch.uint8)
        layout.copy_to(self._data, range(layout.size))
        if components.device.type == "cuda":
            torch.cuda.synchronize(components.device)
        self._ranges = {name: range(parts[0].start, parts[-1].stop) for name, parts in layout.files.items()}

    def load(self, components: Components) -> None:
        """Load the state, as a worker does that resumes.

        Raises:
            DescriptionError: The components do not take back what they gave.
        """
        memory = memory_of(self._data)
        files = {name: bytes(memory[place.start : place.stop]) for name, place in self._ranges.items()}
        try:
            components.load_state(decode(files), step=0)
        except Exception as error:  # model, optimizer and schedule may be the user's own
            raise DescriptionError(
                f"checkpoint: loading the state that was just saved raised {type(error).__name__}: {in_short(error)}; "
                "make the state_dict of model, optimizer and schedule one that their load_state_dict takes"
            ) from error

    def is_state_of(self, components: Components) -> bool:
        """Return whether the components have this state now, bit for bit."""
        now = lay_out(components.state())
        ends = [*now.offsets[1:], now.size]
        return now.size == self.size and all(
            torch.equal(bytes_of(content).cpu(), self._data[begin:end])
            for content, begin, end in zip(now.contents, now.offsets, ends)
        )


def rehearse_training(spec: JobSpec, components: Components, micro_batches: list[Any]) -> int:
    """Take the first step twice, the second time from a checkpoint of the state before it.

    Args:
        spec: The description.
        components: What was built from it; the steps change it.
        micro_batches: (inputs, target) on the device of the components, the smallest first; every shard of the step
            gets the same. Some losses fail on a few samples, so one that fails is no defect if the next does not.

    Returns:
        The bytes of a checkpoint after the step.

    Raises:
        DescriptionError: A part of a step raises, the state cannot be saved or loaded, or the second step differs.
    """
    components.model.train()
    if components.scaler is not None:  # its first scale overflows in many models, and it would skip the update
        components.scaler.load_state_dict(components.scaler.state_dict() | {"scale": 1.0})
    before = _Snapshot(components)
    if spec.train.compile:
        components.model.compile()
    for micro_batch in micro_batches[:-1]:
        try:
            return _take_twice(spec, components, micro_batch, before)
        except (DescriptionError, TrainingError):
            components.optimizer.zero_grad(set_to_none=True)
            before.load(components)
    try:
        return _take_twice(spec, components, micro_batches[-1], before)
    except TrainingError:  # every target of these samples is ignored, which others need not be
        return before.size


def _take_twice(spec: JobSpec, components: Components, micro_batch: Any, before: _Snapshot) -> int:
    """Take the first step, load the state before it, and take it again; return the bytes of a checkpoint after it."""
    shards = min(_MOST_SHARDS, spec.train.shards)
    with _team_of_one(spec, components.device, shards) as team:
        rehearsed = _Step(spec, components, team, [micro_batch] * shards)
        tallies, after = rehearsed.take(0), _Snapshot(components)
        before.load(components)
        is_same = has_same_bits(rehearsed.take(0), tallies) and after.is_state_of(components)
        if spec.train.exact and spec.train.deterministic and not is_same:
            raise DescriptionError(
                f"{_part_that_differs(before, components, rehearsed)} differs when the first step is repeated from a "
                "checkpoint of the state before it: it depends on something that no checkpoint holds, such as a "
                "counter or a generator of its own; keep that in a buffer of the model or in the optimizer's state, "
                "draw from the generators of torch, random and numpy, or write train.exact: false"
            )
        after.load(components)
        last_thaw = max(group.from_step for group in components.groups)
        if last_thaw:
            rehearsed.take(last_thaw)
    return after.size


def rehearse_validation(spec: JobSpec, components: Components, batches: list[Any]) -> None:
    """Validate some batches as a worker does.

    Args:
        spec: The description.
        components: What was built from it.
        batches: (inputs, target) on the device of the components.

    Raises:
        DescriptionError: The model, or its copy with averaged weights, or the loss raises.
    """
    in_order = [(components.in_memory_order(inputs), target) for inputs, target in batches]
    with _team_of_one(spec, components.device, 1) as team, components.autocast():
        try:
            with suppress(TrainingError):  # every target of these batches is ignored, which others need not be
                # Without metrics: some cannot be computed of a few samples.
                evaluate(components.validated_model, components.loss, None, in_order, team, spec.seed)
        except LauncherError:
            raise
        except Exception as error:  # model and loss may be the user's own
            raise DescriptionError(
                f"data.val: validation of its first and last batch raised {type(error).__name__}: {in_short(error)}; "
                "make model and loss fit batches of every length"
            ) from error


class _Step:
    """A step of a worker that is alone, always on the same micro-batches."""

    def __init__(self, spec: JobSpec, components: Components, team: Team, micro_batches: list[Any]) -> None:
        self._spec, self._components, self._team = spec, components, team
        self._micro_batches = micro_batches
        self._phase = "forward"
        components.optimizer.register_step_pre_hook(lambda *_: self._mark("step", 0))
        self._training = TrainingStep(spec, components, team, self._mark)

    def take(self, step: int) -> Tensor:
        """Take a step; return the tallies of its shards.

        Args:
            step: The number of steps completed before it.

        Shapes: float64 [shards, 3].

        Raises:
            TrainingError: Every target is ignored.
            DescriptionError: A part of the step raised an exception.
        """
        try:
            return self._training.take(step, self._micro_batches).tallies
        except LauncherError:
            raise
        except Exception as error:  # model, loss and optimizer may be the user's own
            raise DescriptionError(
                f"{_PARTS[self._phase]} raised {type(error).__name__} in a worker's step: {in_short(error)}"
            ) from error

    def parts(self) -> dict[str, Any]:
        """Return what the parts of a step make of the first shard, by the name of the part."""
        components, (inputs, target) = self._components, self._micro_batches[0]
        seed_draws(draw_key("step", self._spec.seed, 0, 0), self._team.device)
        with components.autocast():
            output = components.model(components.in_memory_order(inputs))
            loss, _ = components.loss.numerator(output, target)
        trained = [parameter for parameter in components.model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, trained)
        return {"model: the output": output, "loss: its value": loss, "model: the gradient": gradients}

    def _mark(self, phase: Doing | Literal["step"], _: int) -> None:
        self._phase = phase


def _part_that_differs(before: _Snapshot, components: Components, step: _Step) -> str:
    """Return the part of a step whose result differs when it is repeated."""
    before.load(components)
    first = step.parts()
    before.load(components)
    second = step.parts()
    different = (name for name, result in first.items() if not has_same_bits(result, second[name]))
    return next(different, "optimizer: its update")


@contextmanager
def _team_of_one(spec: JobSpec, device: torch.device, shards: int) -> Iterator[Team]:
    """Open the process groups of a worker that is alone."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[name] = interface_of("127.0.0.1")  # by default, the one that the host's name resolves to
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    team = Team(rank=0, world_size=1, shards=shards, exact=spec.train.exact, device=device)
    try:
        yield team
    finally:
        team.close()
