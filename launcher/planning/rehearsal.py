"""Rehearses a worker's first step, in a team of one worker.

The step is taken twice by the code of the training loop, with DDP, the summation tree, the gradient scaler and the
averaged weights, the second time from a checkpoint of the state before it. So what a worker would refuse is refused
before one starts. A step that differs the second time depends on something that no checkpoint holds, and a resumed run
would train on with other numbers.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.collectives.groups import open_default_group
from cluster.errors import CheckpointError, ClusterError, DescriptionError, LauncherError, in_short
from cluster.host.interfaces import choose_interface
from cluster.process.orders import LOOPBACK
from jobs.checkpoint.layout import lay_out
from jobs.checkpoint.state_tree import pack, unpack
from jobs.components.build import Components
from jobs.data.loader import LoadedBatch, seed_draws
from jobs.parallel.worker_team import Team
from jobs.sampling import draw_key
from jobs.spec import JobSpec
from jobs.training.failure_causes import message_of
from jobs.training.step import TrainingStep
from jobs.training.step_batches import StepBatch
from launcher.planning.memory import StateBytes
from launcher.planning.same_bits import has_same_bits
from launcher.planning.state_bytes import measure_state

_WHAT_TO_DO = (
    "a checkpoint holds the weights and buffers of the model and the state_dict of the optimizer; keep it there, draw "
    "from the generators of torch, random and numpy, which are seeded for every step, or write train.exact: false"
)


class Snapshot:
    """A copy of the state of components, on the CPU, as a checkpoint holds it.

    Attributes:
        size: The bytes of a checkpoint.
    """

    def __init__(self, components: Components) -> None:
        """Copies the state.

        Raises:
            DescriptionError: The state holds something that a checkpoint cannot hold.
        """
        self._trees, tensors, self.size = _packed(components)
        self._tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def weight(self, name: str) -> Tensor | None:
        """Return a parameter of the model; None if the model's state dict does not hold it by its name."""
        return self._tensors.get(f"model.{name}")

    def load(self, components: Components) -> None:
        """Load the state, as a worker does that resumes.

        Raises:
            DescriptionError: The components do not take back what they gave.
        """
        tensors = {  # a model copies what it loads, and others may keep it
            name: tensor if name.startswith("model.") else tensor.clone() for name, tensor in self._tensors.items()
        }
        try:
            state = {key: unpack(json.loads(tree), tensors) for key, tree in self._trees.items()}
            components.load_state(state, step=0)
        except Exception as error:  # model, optimizer and schedule may be the user's own
            raise DescriptionError(
                f"checkpoint: loading the state that was just saved raised {type(error).__name__}: {in_short(error)}; "
                "make the state_dict of model, optimizer and schedule one that their load_state_dict takes"
            ) from error

    def first_difference(self, components: Components) -> str | None:
        """Return the name of a value that components have otherwise than here; None if all have the same bits."""
        trees, tensors, _ = _packed(components)
        if trees != self._trees:
            return next(key for key in self._trees.keys() | trees.keys() if self._trees.get(key) != trees.get(key))
        different = (name for name, tensor in tensors.items() if not has_same_bits(tensor.cpu(), self._tensors[name]))
        return next(different, None)


def rehearse(spec: JobSpec, components: Components, before: Snapshot, micro_batch: Any) -> StateBytes:
    """Take the first step twice, the second time from a checkpoint of the state before it.

    Args:
        spec: The description.
        components: What was built from it; the steps change it.
        before: Their state at the beginning.
        micro_batch: (inputs, target) on the device of the components.

    Returns:
        What the components take once all groups are unfrozen, with the activations of a step on a GPU.

    Raises:
        DescriptionError: A part of a step raises, a parameter gets no gradient, the state cannot be saved or loaded, or
            the second step differs.
    """
    before.load(components)
    if components.scaler is not None:  # its first scale overflows in many models, and it would skip the update
        components.scaler.load_state_dict(components.scaler.state_dict() | {"scale": 1.0})
        before = Snapshot(components)
    if spec.train.compile and components.device.type == "cuda":  # another machine may compile nothing, and need not
        components.model.compile()
    is_exact = spec.train.exact and spec.train.deterministic
    with _team_of_one(components.device, exact=spec.train.exact, bucket_mb=spec.train.bucket_mb) as team:
        rehearsed = _Step(spec, components, team, micro_batch)
        tallies, after = rehearsed.take(0), Snapshot(components)
        before.load(components)
        is_same = has_same_bits(rehearsed.take(0), tallies) and after.first_difference(components) is None
        if is_exact and not is_same:
            raise DescriptionError(
                f"{_part_that_differs(before, components, rehearsed)} differs when the first step is repeated from a "
                f"checkpoint: it depends on a counter, a generator or something else; {_WHAT_TO_DO}"
            )
        after.load(components)
        different = after.first_difference(components)
        if is_exact and different is not None:
            raise DescriptionError(
                f"checkpoint: {different} differs after it was saved and loaded, so a resume would train on with other "
                f"numbers; {_WHAT_TO_DO}"
            )
        activations = rehearsed.activations  # of a step for which DDP has its buckets already
        last_thaw = max(group.from_step for group in components.groups)
        if last_thaw:
            rehearsed.take(last_thaw)
    return measure_state(components, _packed(components)[2], activations)


class _Step:
    """A step of a worker that is alone, always on the same micro-batch."""

    def __init__(self, spec: JobSpec, components: Components, team: Team, micro_batch: Any) -> None:
        self._spec, self._components, self._team, self._micro_batch = spec, components, team, micro_batch
        self._training = TrainingStep(spec, components, team, lambda *_: None)
        self._is_on_gpu = team.device.type == "cuda"
        self._taken_before = 0
        self._is_updating = False
        self.activations: int | None = None  # what forward and backward of the last step have taken of the GPU
        self._update = components.optimizer.step
        components.optimizer.step = self._marked_update  # type: ignore[method-assign]

    def take(self, step: int) -> Tensor:
        """Take a step; return the tally of its shard.

        Args:
            step: The number of steps completed before it.

        Shapes: float64 [1, 3].

        Raises:
            DescriptionError: A part of the step raised an exception.
        """
        inputs, target = self._micro_batch
        weigh = self._components.loss.target_weights()
        batch = StepBatch([LoadedBatch(inputs, target)], None if weigh is None else partial(weigh, target))
        if self._is_on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._taken_before = torch.cuda.memory_allocated()
        try:
            return self._training.take(step, batch).tallies
        except LauncherError as error:
            raise DescriptionError(f"{error}") from error
        except Exception as error:  # model, loss and optimizer may be the user's own
            part = "optimizer: step" if self._is_updating else "model: forward, loss or backward"
            raise DescriptionError(
                f"{part} raised {type(error).__name__} in a worker's step: {in_short(error)}"
            ) from error

    def parts(self) -> Mapping[str, Any]:
        """Return what the parts of a step make of the micro-batch, by the name of the part."""
        components, (inputs, target) = self._components, self._micro_batch
        seed_draws(draw_key("step", self._spec.seed, 0, 0), self._team.device)
        with components.autocast():
            output = components.model(components.in_memory_order(inputs))
            loss, _ = components.loss.numerator(output, target)
        loss.backward()
        gradients = [parameter.grad for parameter in components.model.parameters()]
        components.optimizer.zero_grad(set_to_none=True)
        return {"model: the output": output, "loss: its value": loss, "model: the gradient": gradients}

    def _marked_update(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_on_gpu:
            self.activations = torch.cuda.max_memory_allocated() - self._taken_before
        _check_gradients(self._components.model)
        self._is_updating = True
        result = self._update(*args, **kwargs)
        self._is_updating = False
        return result


def _check_gradients(model: nn.Module) -> None:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    without = [name for name, parameter in trained if parameter.grad is None]
    if without:
        raise DescriptionError(
            f"model: {without[0]} gets no gradient from the loss"
            + (f", nor do {len(without) - 1} more" if len(without) > 1 else "")
            + "; use it in forward, or set its requires_grad to False in the model"
        )
    sparse = [name for name, parameter in trained if parameter.grad is not None and parameter.grad.is_sparse]
    if sparse:
        raise DescriptionError(
            f"model: {sparse[0]} gets a sparse gradient, which workers cannot sum in one order; write sparse=False in "
            "its layer"
        )


def _part_that_differs(before: Snapshot, components: Components, step: _Step) -> str:
    """Return the part of a step whose result differs when it is repeated."""
    results = []
    for _ in range(2):
        before.load(components)
        try:
            results.append(step.parts())
        except Exception:  # the user's own code runs here without DDP, and something is wrong with it
            return "model: a part of it"
    first, second = results
    different = (name for name, result in first.items() if not has_same_bits(result, second[name]))
    return next(different, "optimizer: its update")


@contextmanager
def _team_of_one(device: torch.device, *, exact: bool, bucket_mb: float | None) -> Iterator[Team]:
    """Open the process groups of a worker that is alone and has one shard.

    Raises:
        ClusterError: They cannot be opened on this host.
    """
    try:
        choose_interface(LOOPBACK)
        open_default_group(dist.HashStore(), rank=0, world_size=1, on_gpu=device.type == "cuda")
    except (OSError, RuntimeError) as error:
        raise ClusterError(
            f"a worker cannot open its process group here: {message_of(error)}; check GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME on this host",
            cause="environment",
        ) from error
    with ExitStack() as on_exit:
        on_exit.callback(dist.destroy_process_group)
        team = Team(rank=0, world_size=1, shards=1, exact=exact, device=device, bucket_mb=bucket_mb)
        on_exit.pop_all()
        on_exit.callback(team.close)
        yield team


def _packed(components: Components) -> tuple[dict[str, str], dict[str, Tensor], int]:
    """Return the state of components as JSON by key, with a name in place of each tensor; its tensors; its bytes.

    Raises:
        DescriptionError: The state holds something that a checkpoint cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    try:
        state = components.state()
        trees = {key: json.dumps(pack(value, key, tensors), sort_keys=True) for key, value in state.items()}
        return trees, tensors, lay_out(state).size
    except CheckpointError as error:
        raise DescriptionError(f"{error}") from error
