"""Parameter groups: which parameter is in which, and what is refused."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from cluster.errors import DescriptionError
from jobs.components.optimizers import ParameterGroup, build_optimizer, group_parameters, set_trainable
from jobs.components.targets import Builder, resolve
from jobs.spec import GroupSpec, OptimizerSpec, Target
from tests.states import decode, encode

STEPS_PER_EPOCH = 10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
        self.scale = nn.Parameter(torch.ones(1))
        self.constant = nn.Parameter(torch.ones(1), requires_grad=False)


def groups(*specs: GroupSpec) -> list[ParameterGroup]:
    return group_parameters(Net(), specs, STEPS_PER_EPOCH)


def build(name: str = "SGD", *specs: GroupSpec, model: nn.Module | None = None, **args: Any) -> torch.optim.Optimizer:
    model = model or Net()
    spec = OptimizerSpec(factory=Target(name, args), groups=specs)
    return build_optimizer(spec, model, group_parameters(model, specs, STEPS_PER_EPOCH), Builder())


class TestGroups:
    def test_without_groups_all_trainable_parameters_are_one(self) -> None:
        (rest,) = groups()

        assert rest.pattern == "(rest)"
        assert rest.names == tuple(name for name, _ in Net().named_parameters() if name != "constant")

    def test_the_first_match_wins_and_the_rest_is_last(self) -> None:
        found = groups(GroupSpec(match="*.bias"), GroupSpec(match="head.*"))

        assert [(group.pattern, group.names) for group in found] == [
            ("*.bias", ("conv.bias", "norm.bias", "head.0.bias", "head.1.bias")),
            ("head.*", ("head.0.weight", "head.1.weight", "head.2.weight")),
            ("(rest)", ("scale", "conv.weight", "norm.weight")),
        ]

    def test_when_the_patterns_match_everything_there_is_no_rest(self) -> None:
        assert [group.pattern for group in groups(GroupSpec(match="*"))] == ["*"]

    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("type:BatchNorm*", ("norm.weight", "norm.bias")),
            ("type:_NormBase", ("norm.weight", "norm.bias")),
            ("type:*Norm*", ("norm.weight", "norm.bias", "head.1.weight", "head.1.bias")),
            ("type:Linear", ("head.0.weight", "head.0.bias", "head.2.weight")),
            ("type:Net", ("scale",)),
        ],
    )
    def test_a_type_matches_the_own_parameters_of_its_modules(self, pattern: str, names: tuple[str, ...]) -> None:
        """By the name of a class or of one it is derived from; ``type:Net`` has none of its modules' parameters."""
        assert groups(GroupSpec(match=pattern))[0].names == names

    def test_names_are_matched_to_the_letter(self) -> None:
        assert groups(GroupSpec(match="head.[02].weight"))[0].names == ("head.0.weight", "head.2.weight")
        with pytest.raises(DescriptionError):
            groups(GroupSpec(match="HEAD.*"))

    @pytest.mark.parametrize(
        ("specs", "message"),
        [
            (
                [GroupSpec(match="*.bias"), GroupSpec(match="head.0.weigth")],
                "optimizer.groups[1].match matches no parameter, got 'head.0.weigth' (did you mean 'head.0.weight'?); "
                "the model has scale, constant, conv.weight, conv.bias ...",
            ),
            (
                [GroupSpec(match="head.*"), GroupSpec(match="head.0.*")],
                "optimizer.groups[1].match 'head.0.*' matches only parameters that an earlier group has; "
                "move it up or drop it",
            ),
            (
                [GroupSpec(match="constant")],
                "optimizer.groups[0].match 'constant' matches only parameters that the model freezes itself; "
                "drop it, or let them train",
            ),
            (
                [GroupSpec(match="type:GroupNorm")],
                "optimizer.groups[0].match matches no parameter, got 'type:GroupNorm'; "
                "the model has scale, constant, conv.weight, conv.bias ...",
            ),
        ],
        ids=["a spelling", "an earlier group", "frozen by the model", "a type"],
    )
    def test_a_pattern_that_gets_nothing_is_an_error(self, specs: list[GroupSpec], message: str) -> None:
        with pytest.raises(DescriptionError) as caught:
            groups(*specs)
        assert str(caught.value) == message


class Tied(nn.Module):
    """One tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3)
        self.head.weight = self.embed.weight


class TestTiedParameters:
    @pytest.mark.parametrize("pattern", ["*.weight", "type:Linear", "*"])
    def test_a_pattern_for_both_names_has_the_tensor_once(self, pattern: str) -> None:
        (found, *_) = group_parameters(Tied(), (GroupSpec(match=pattern),), STEPS_PER_EPOCH)

        assert [name for name in found.names if name.endswith("weight")] == ["embed.weight"]

    @pytest.mark.parametrize("pattern", ["embed.*", "head.*"])
    def test_in_two_groups_it_is_refused(self, pattern: str) -> None:
        with pytest.raises(DescriptionError) as caught:
            group_parameters(Tied(), (GroupSpec(match=pattern),), STEPS_PER_EPOCH)
        assert str(caught.value) == (
            "optimizer.groups put one tensor in two groups, got embed.weight and head.weight, which are tied; "
            "write a pattern for both"
        )


class TestOptimizer:
    def test_a_rate_can_be_a_multiple_of_the_optimizers(self) -> None:
        specs = (GroupSpec(match="conv.*", lr_scale=0.1), GroupSpec(match="norm.*", lr_scale=3.0))

        assert [group["lr"] for group in build("SGD", *specs, lr=0.5).param_groups] == [0.05, 1.5, 0.5]
        assert [group["lr"] for group in build("Adam", *specs).param_groups] == [1e-4, 3e-3, 1e-3]

    def test_a_group_has_its_own_arguments_and_the_optimizers_for_the_rest(self) -> None:
        optimizer = build(
            "AdamW",
            GroupSpec(match="*.bias", args={"weight_decay": 0.0, "betas": [0.5, 0.9]}),
            GroupSpec(match="head.*", args={"lr": 0.5}, from_epoch=3),
            lr=0.1,
            weight_decay=0.2,
        )

        assert [(group["lr"], group["weight_decay"], tuple(group["betas"])) for group in optimizer.param_groups] == [
            (0.1, 0.0, (0.5, 0.9)),
            (0.5, 0.2, (0.9, 0.999)),
            (0.1, 0.2, (0.9, 0.999)),
        ]

    def test_every_trainable_parameter_is_in_it_once(self) -> None:
        model = Net()
        optimizer = build("SGD", GroupSpec(match="head.*"), model=model, lr=0.1)

        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)

    @pytest.mark.parametrize(
        ("name", "args", "group", "message"),
        [
            (
                "SDG",
                {},
                {},
                "optimizer._target_ names nothing in torch.optim, got 'SDG' (did you mean 'SGD'?); "
                "write one of its names, or the import path of your own",
            ),
            (
                "SGD",
                {"momentun": 0.9},
                {},
                "optimizer.momentun is no argument of SGD (did you mean 'momentum'?); it takes lr, ",
            ),
            (
                "SGD",
                {},
                {"betas": [0.9, 0.9]},
                "optimizer.groups[0].betas is no argument of SGD; it takes lr, ",
            ),
            (
                "SGD",
                {"momentum": -1.0},
                {},
                "optimizer: SGD raised ValueError: Invalid momentum value: -1.0",
            ),
            (
                "LBFGS",
                {},
                {},
                "optimizer._target_ LBFGS evaluates the model several times in a step, which the loop does not offer; "
                "use a first-order optimizer",
            ),
        ],
    )
    def test_a_mistake_is_one_line(self, name: str, args: dict[str, Any], group: dict[str, Any], message: str) -> None:
        specs = [GroupSpec(match="*.bias", args=group)] if group else []
        with pytest.raises(DescriptionError) as caught:
            build(name, *specs, **args)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


class TestFreezing:
    def test_a_group_is_frozen_until_its_epoch_or_step(self) -> None:
        model = Net()
        specs = (GroupSpec(match="conv.*", from_epoch=1), GroupSpec(match="norm.*", from_step=7))
        found = group_parameters(model, specs, STEPS_PER_EPOCH)

        changed, frozen = [], []
        for step in (6, 7, 10, 11):
            changed.append(set_trainable(model, found, step))
            frozen.append(
                {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
            )

        assert changed == [True, True, True, False]
        assert frozen == [{"conv", "norm", "constant"}, {"conv", "constant"}, {"constant"}, {"constant"}]

    def test_a_frozen_group_keeps_its_bits_though_it_decays(self) -> None:
        model = Net()
        specs = (GroupSpec(match="conv.*", from_epoch=1),)
        optimizer = build("SGD", *specs, model=model, lr=0.1, momentum=0.9, weight_decay=0.1)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

        set_trainable(model, group_parameters(model, specs, STEPS_PER_EPOCH), step=0)
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        optimizer.step()

        kept = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
        assert kept == {"conv.weight", "conv.bias", "constant"} | {"norm.bias", "head.1.bias"}  # the last two are 0


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.1, "t0": 2.0, "lambd": 0.1},
    "Adadelta": {"lr": 0.5},
    "Adafactor": {"lr": 0.1, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
    "Adam": {"lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-6, "amsgrad": True},
    "AdamW": {"lr": 0.1, "weight_decay": 0.3},
    "Adamax": {"lr": 0.1},
    "Muon": {"lr": 0.1, "momentum": 0.8},
    "NAdam": {"lr": 0.1, "momentum_decay": 0.1},
    "RAdam": {"lr": 0.1},
    "RMSprop": {"lr": 0.1, "momentum": 0.9, "centered": True},
    "Rprop": {"lr": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.1},
    f"{__name__}.Signs": {"lr": 0.1},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *OPTIMIZERS.items(),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),
    ("Adam", {"lr": 0.1, "fused": True}),
    ("AdamW", {"lr": 0.1, "foreach": True}),
    ("Adagrad", {"lr": 0.1, "fused": True}),
]
NOT_FOR_A_LOOP = {
    "LBFGS": "needs a closure",
    "SparseAdam": "takes sparse gradients alone, which DDP does not sum",
    "Optimizer": "is the base of the others",
}
STEPS, JOINS_AT, STOPS_AT = 8, 3, 5


class Signs(torch.optim.Optimizer):
    """A user's own: steps by the sign of a running mean, and passes over parameters without a gradient."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.mul_(0.5).add_(parameter.grad)
                    parameter.sub_(group["lr"] * mean.sign())


class Matrices(nn.Module):
    """Two matrices, for every optimizer takes matrices."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.trunk = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.head = nn.Parameter(torch.randn(4, 2, generator=generator))

    def backward(self, step: int) -> None:
        inputs_NK = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        (inputs_NK @ self.trunk @ self.head).square().mean().backward()


class TestEveryOptimizer:
    def test_torch_has_no_other(self) -> None:
        """One that a later torch brings is to be tested here, or refused for a reason."""
        known = {
            name
            for name, value in vars(torch.optim).items()
            if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
        }
        assert known <= {*OPTIMIZERS, *NOT_FOR_A_LOOP}

    @pytest.mark.parametrize(("name", "args"), VARIANTS, ids=str)
    def test_a_group_joins_late_as_by_hand_and_stops_do_not_show(self, name: str, args: dict[str, Any]) -> None:
        """Frozen and in the optimizer from the start, is as joining with ``add_param_group``: the same bits."""
        model = Matrices()
        rest, late = {"params": [model.head]}, {"params": [model.trunk], "lr": 0.01}
        by_hand = resolve(name, "optimizer", [torch.optim])([rest], **args)
        model.trunk.requires_grad_(False)
        for step in range(STEPS):
            if step == JOINS_AT:
                by_hand.add_param_group(late)
                model.trunk.requires_grad_(True)
            model.backward(step)
            try:
                by_hand.step()
            except KeyError:
                assert (name, step) == ("Adagrad", JOINS_AT)
                pytest.skip("this torch's own Adagrad cannot step after a group was added")
            by_hand.zero_grad()

        specs = (GroupSpec(match="trunk", args={"lr": 0.01}, from_step=JOINS_AT),)
        ours = Matrices()
        found = group_parameters(ours, specs, STEPS_PER_EPOCH)
        optimizer = build(name, *specs, model=ours, **args)
        for step in range(STEPS):
            if step in (JOINS_AT - 1, STOPS_AT):
                state = encode({"model": ours.state_dict(), "optimizer": optimizer.state_dict()})
                ours = Matrices()
                optimizer = build(name, *specs, model=ours, **args)
                restored = decode(state)
                ours.load_state_dict(restored["model"])
                optimizer.load_state_dict(restored["optimizer"])
            set_trainable(ours, found, step)
            ours.backward(step)
            optimizer.step()
            optimizer.zero_grad()

        assert not torch.equal(ours.trunk, Matrices().trunk)
        assert torch.equal(ours.trunk, model.trunk)
        assert torch.equal(ours.head, model.head)
