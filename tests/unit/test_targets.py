"""From a name in the description to an object, and what a person reads when that does not work."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cluster.errors import DescriptionError, StorageError
from jobs.components.targets import Builder, resolve
from jobs.spec import PlanValue, Target

HERE = __name__


class Box:
    """Takes anything that has a place in a description."""

    def __init__(self, content: Any, *, lid: bool = False) -> None:
        if content == "fire":
            raise ValueError("cannot hold\n   fire")
        if content == "away":
            raise StorageError("s3://bucket: does not answer")
        self.content = content
        self.lid = lid

    @classmethod
    def empty(cls) -> "Box":
        return cls(None)


def record(*args: Any, **kwargs: Any) -> Any:
    return SimpleNamespace(args=args, kwargs=kwargs)


not_callable = 5


def build(path: str, *positional: Any, key: str = "model", partial: bool = False, **args: Any) -> Any:
    return Builder().build(Target(path, args, partial), key, *positional, bare_names=[nn])


class TestBuild:
    def test_a_bare_name_and_an_import_path_name_the_same(self) -> None:
        assert resolve("Linear", "model", [nn]) is resolve("torch.nn.Linear", "model") is nn.Linear

    def test_arguments_arrive_as_written(self) -> None:
        box = build(f"{HERE}.Box", content=[1, (2.5, "x"), {"a": None}], lid=True)

        assert (box.content, box.lid) == ([1, [2.5, "x"], {"a": None}], True)

    def test_a_store_that_does_not_answer_is_no_mistake_in_the_description(self) -> None:
        with pytest.raises(StorageError) as caught:
            build(f"{HERE}.Box", key="data.train", content="away")

        assert str(caught.value) == "data.train: s3://bucket: does not answer"

    def test_positional_arguments_come_first(self) -> None:
        made = build(f"{HERE}.record", "given", 2, name="x")

        assert (made.args, made.kwargs) == (("given", 2), {"name": "x"})

    def test_targets_nest_in_arguments_lists_and_mappings(self) -> None:
        inner = Target(f"{HERE}.Box", {"content": 1})
        box = build(f"{HERE}.Box", content={"list": [inner, Target(f"{HERE}.Box.empty")], "one": inner})

        assert [item.content for item in (*box.content["list"], box.content["one"])] == [1, None, 1]

    def test_a_partial_target_is_passed_on_uncalled(self) -> None:
        box = build(f"{HERE}.Box", content=Target("torch.nn.LayerNorm", {"eps": 0.1}, partial=True))

        assert isinstance(box.content, functools.partial)
        assert box.content(4).eps == 0.1

    def test_plan_values_become_numbers_wherever_they_stand(self) -> None:
        builder = Builder(lambda value: {"total_steps": 40, "steps": 10}[value.name])
        target = Target(f"{HERE}.Box", {"content": [PlanValue("total_steps"), {"warm": PlanValue("steps", 1.0)}]})

        assert builder.build(target, "scheduler").content == [40, {"warm": 10}]

    def test_a_module_beside_the_job_file_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "users_own_nets.py").write_text(
            "from torch.nn import Linear\ndef net(width): return Linear(width, 1)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)

        assert build("users_own_nets.net", width=3).in_features == 3


MISTAKES = {
    "a bare name that is close to one": (
        Target("CrossEntropyLos"),
        "model._target_ names nothing in torch.nn, got 'CrossEntropyLos' (did you mean 'CrossEntropyLoss'?); "
        "write one of its names, or the import path of your own",
    ),
    "a bare name that is close to none": (
        Target("zzzz"),
        "model._target_ names nothing in torch.nn, got 'zzzz'; write one of its names, or the import path of your own",
    ),
    "a module that does not exist": (
        Target("nets.Net"),
        "model._target_ 'nets.Net': there is no module 'nets' beside the job file, in the working directory or "
        "installed; check the spelling",
    ),
    "a module that does not exist in a package": (
        Target("torch.nm.functional.Net"),
        "model._target_ 'torch.nm.functional.Net': there is no module 'torch.nm' beside the job file, in the working "
        "directory or installed; check the spelling",
    ),
    "a name that the module has not": (
        Target(f"{HERE}.Bax"),
        f"model._target_ '{HERE}.Bax': {HERE} has no 'Bax' (did you mean 'Box'?)",
    ),
    "a method that the class has not": (
        Target(f"{HERE}.Box.emty"),
        f"model._target_ '{HERE}.Box.emty': {HERE}.Box has no 'emty' (did you mean 'empty'?)",
    ),
    "a name of no callable": (
        Target(f"{HERE}.not_callable"),
        f"model._target_ '{HERE}.not_callable' must be a class or a function, got int",
    ),
    "an unknown argument": (
        Target("torch.nn.Linear", {"in_features": 2, "out_feature": 2}),
        "model.out_feature is no argument of Linear (did you mean 'out_features'?); "
        "it takes in_features, out_features, bias, device, dtype",
    ),
    "an argument where none is taken": (
        Target(f"{HERE}.Box.empty", {"size": 2}),
        "model.size is no argument of Box.empty; it takes no arguments",
    ),
    "a missing argument": (
        Target(f"{HERE}.Box", {"lid": True}),
        "model.content is missing: Box needs it; add it",
    ),
    "a value that the constructor refuses": (
        Target(f"{HERE}.Box", {"content": "fire"}),
        "model: Box raised ValueError: cannot hold fire",
    ),
    "a mistake in a nested target": (
        Target(f"{HERE}.Box", {"content": [1, {"in": Target("torch.nn.Linear", {"in_features": 1})}]}),
        "model.content[1].in.out_features is missing: Linear needs it; add it",
    ),
    "a bare name in a nested target": (
        Target(f"{HERE}.Box", {"content": Target("Linear")}),
        "model.content._target_ must be an import path such as package.module.Name, got 'Linear'",
    ),
    "a number that only the schedule knows": (
        Target(f"{HERE}.Box", {"content": PlanValue("total_steps")}),
        "model.content: ${plan...} is not known here; it can be used in the scheduler",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("target", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_that_begins_with_its_key(target: Target, message: str) -> None:
    with pytest.raises(DescriptionError) as caught:
        Builder().build(target, "model", bare_names=[nn])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        (
            "broken_1",
            "raise RuntimeError('no such\\n  setting')",
            ": importing broken_1 raised RuntimeError: no such setting",
        ),
        ("broken_2", "def net(:", ": importing broken_2 raised SyntaxError: invalid syntax (broken_2.py, line 1)"),
        (
            "broken_3",
            "import not_installed_anywhere",
            " imports 'not_installed_anywhere', which is not installed; install it",
        ),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, message: str
) -> None:
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(DescriptionError) as caught:
        build(f"{name}.net")

    assert str(caught.value) == f"model._target_ '{name}.net'{message}"
    assert caught.value.__cause__ is not None


def test_given_arguments_are_not_asked_for_and_cannot_be_named() -> None:
    assert build("torch.optim.SGD", [torch.zeros(1)], lr=0.1).defaults["lr"] == 0.1
    with pytest.raises(DescriptionError, match=r"^model\.params is no argument of SGD"):
        build("torch.optim.SGD", [torch.zeros(1)], params=[])


def decorated(*args: Any, **kwargs: Any) -> Any:
    return record(*args, **kwargs)


def test_a_callable_that_takes_everything_is_given_everything() -> None:
    """As decorators that forget the signature are."""
    assert build(f"{HERE}.decorated", 1, 2, scale=3).kwargs == {"scale": 3}
