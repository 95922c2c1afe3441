"""Parameter groups: which parameter is in which, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from cluster.errors import DescriptionError
from jobs.optimizers import ParameterGroup, build_optimizer, group_parameters, set_trainable
from jobs.spec import GroupSpec, OptimizerSpec, Target
from jobs.targets import Builder


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
        self.scale = nn.Parameter(torch.ones(1))
        self.constant = nn.Parameter(torch.ones(1), requires_grad=False)


def groups(*specs: GroupSpec) -> list[ParameterGroup]:
    return group_parameters(Net(), specs)


def build(name: str = "SGD", *specs: GroupSpec, model: nn.Module | None = None, **args: Any) -> torch.optim.Optimizer:
    model = model or Net()
    spec = OptimizerSpec(factory=Target(name, args), groups=specs)
    return build_optimizer(spec, model, group_parameters(model, specs), Builder())


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
                [GroupSpec(match="type:GroupNorm")],
                "optimizer.groups[0].match matches no parameter, got 'type:GroupNorm'; "
                "the model has scale, constant, conv.weight, conv.bias ...",
            ),
        ],
        ids=["a spelling", "an earlier group", "a type"],
    )
    def test_a_pattern_that_gets_nothing_is_an_error(self, specs: list[GroupSpec], message: str) -> None:
        with pytest.raises(DescriptionError) as caught:
            groups(*specs)
        assert str(caught.value) == message


class TestOptimizer:
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
    def test_a_group_is_frozen_until_its_epoch(self) -> None:
        model = Net()
        found = group_parameters(
            model, (GroupSpec(match="conv.*", from_epoch=2), GroupSpec(match="norm.*", from_epoch=1))
        )

        changed, frozen = [], []
        for epoch in range(4):
            changed.append(set_trainable(model, found, epoch))
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

        set_trainable(model, group_parameters(model, specs), epoch=0)
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        optimizer.step()

        kept = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
        assert kept == {"conv.weight", "conv.bias", "constant"} | {"norm.bias", "head.1.bias"}  # the last two are 0
