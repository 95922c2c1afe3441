"""What people write as in Python where YAML reads text: tuples, ``None``, numbers; and what is left as text."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from cluster.errors import DescriptionError
from cluster.spec.kinds import KINDS
from jobs.components.optimizers import build_optimizer, group_parameters
from jobs.components.targets import Builder
from jobs.spec import GroupSpec, OptimizerSpec, Target, list_in
from launcher.config.clusters import load_cluster
from launcher.config.description import parse
from launcher.config.reference import Entry, entries
from launcher.config.yaml_reader import read_yaml, refuse_python, to_yaml

BASE = """\
name: x
model: {_target_: mine.Net}
data: {train: mine.data, val: mine.data, shuffle: {block: 8, buffer: 64}}
loss: CrossEntropyLoss
optimizer: {_target_: AdamW, lr: 1e-3, groups: [{match: "*"}]}
scheduler: {_target_: StepLR}
init_from: {url: a}
checkpoint: {best: {metric: val/loss, mode: min}}
train: {early_stop: {metric: val/loss, mode: min, patience: 3}}
"""
RAY = "kind: ray\naddress: h:1\nautoscaler: [{nodes: 1, cpus: 1}]\n"


def message(*overrides: str, **sections: str) -> str:
    kept = [line for line in BASE.splitlines() if line.partition(":")[0] not in sections]
    text = "\n".join([*kept, *(f"{name}:{value}" for name, value in sections.items())])
    with pytest.raises(DescriptionError) as caught:
        parse(text, "x.yaml", overrides)
    return str(caught.value)


def is_key(entry: Entry) -> bool:
    return not entry.key.endswith(("_target_", "<argument>"))


JOB_KEYS = [entry for entry in entries() if is_key(entry)]
RAY_KEYS = [entry for entry in entries(KINDS["ray"]) if is_key(entry) and entry.key != "kind"]


def expected(entry: Entry, value: str) -> str:
    """The line for a word for null; a target names what it is made of."""
    advice = "write null" if "null" in entry.type else "write it, or remove the key"
    return f"must be {entry.type}, got {value!r}; {advice}"


class TestWordsForNull:
    @pytest.mark.parametrize("entry", JOB_KEYS, ids=lambda entry: entry.key)
    def test_none_is_refused_for_every_key_of_a_job(self, entry: Entry) -> None:
        key = entry.key.replace("[]", "[0]")
        assert message(f"{key}=None") == f"command line: {key} {expected(entry, 'None')}"

    @pytest.mark.parametrize("entry", RAY_KEYS, ids=lambda entry: entry.key)
    def test_none_is_refused_for_every_key_of_a_cluster(self, entry: Entry, tmp_path: Path) -> None:
        key = entry.key.replace("[]", "[0]")
        (tmp_path / "lab.yaml").write_text(RAY)
        with pytest.raises(DescriptionError) as caught:
            load_cluster(str(tmp_path / "lab.yaml"), [f"cluster.{key}=None"])
        assert str(caught.value) == f"command line: {key} {expected(entry, 'None')}"

    @pytest.mark.parametrize("word", ["none", "NULL", "nil", "None"])
    @pytest.mark.parametrize(
        "entry", [entry for entry in JOB_KEYS if "null" in entry.type], ids=lambda entry: entry.key
    )
    def test_other_words_are_refused_where_null_may_stand_also_in_quotes(self, entry: Entry, word: str) -> None:
        key = entry.key.replace("[]", "[0]")
        assert message(f"{key}='{word}'") == f"command line: {key} {expected(entry, word)}"

    @pytest.mark.parametrize(
        "key", ["scheduler", "init_from", "checkpoint.best", "train.early_stop", "data.val", "data.shuffle"]
    )
    def test_false_is_not_null_either(self, key: str) -> None:
        assert message(f"{key}=False").endswith(" or null, got false; write null")

    def test_in_files_and_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ENTITY", "None")
        text_or_null = "must be text or null, got 'None'; write null"
        assert message(tracking=" {entity: None}") == f"x.yaml: tracking.entity {text_or_null}"
        assert message(tracking=" {entity: '${oc.env:ENTITY}'}") == f"x.yaml: tracking.entity {text_or_null}"
        assert message(workers="\n  accelerator: None") == f"x.yaml: workers.accelerator {text_or_null}"

    def test_none_among_arguments_is_refused_unless_it_is_quoted(self) -> None:
        problem = "is written None, which YAML reads as text; write null, or quote it if it is text"
        assert message("loss.weight=None") == f"command line: loss.weight {problem}"
        assert message("model.sizes=[1, {a: None}]") == f"command line: model.sizes[1].a {problem}"
        assert message(loss=" {_target_: CrossEntropyLoss, weight: None}") == f"x.yaml: loss.weight {problem}"
        groups = " {_target_: SGD, lr: 1, groups: [{match: a, weight_decay: None}]}"
        assert message(optimizer=groups) == f"x.yaml: optimizer.groups[0].weight_decay {problem}"
        assert message("tracking.tags=[a, None]") == f"command line: tracking.tags[1] {problem}"
        spec = parse(BASE, "x.yaml", ["model.a='None'", "model.b=[none, nil]", "loss.reduction=none", "name=none"]).spec
        assert spec.model.args == {"a": "None", "b": ["none", "nil"]}
        assert (spec.loss.factory.args, spec.name) == ({"reduction": "none"}, "none")


READ_AS_TEXT = {
    "(0.9, 0.95)": "write a list, [0.9, 0.95]",
    "((1, 2), (3,))": "write a list, [[1, 2], [3]]",
    "('a', None)": 'write a list, ["a", null]',
    "(1e-3, -1, True)": "write a list, [0.001, -1, true]",
    "inf": "write .inf",
    "-inf": "write -.inf",
    "nan": "write .nan",
    "-.5": "write -0.5",
    "+.5e-3": "write 0.0005",
    "0o17": "write 15",
}


@pytest.mark.parametrize(("written", "advice"), READ_AS_TEXT.items())
def test_values_of_python_are_refused_unless_they_are_quoted(written: str, advice: str) -> None:
    problem = f"is written {written}, which YAML reads as text; {advice}, or quote it if it is text"
    assert message(f"model.size={written}") == f"command line: model.size {problem}"
    assert message(model=f"\n  _target_: mine.Net\n  size: {written}") == f"x.yaml: model.size {problem}"
    quoted = to_yaml({"size": [written]})
    refuse_python(quoted)  # what is written to the run directory is quoted
    assert read_yaml(quoted) == {"size": [written]}


SPLIT = {
    "model: {_target_: a.B, size: (32, 32)}": "model.size is written (32, 32){}; write a list, [32, 32]",
    "model: {size: ((1, 2), 3), _target_: a.B}": "model.size is written ((1, 2), 3){}; write a list, [[1, 2], 3]",
    "model: {a: [(1, 2), (3, 4)]}": "model.a[0] is written (1, 2){}; write a list, [1, 2]",
    "model: {a: [0, (3, 4)]}": "model.a[1] is written (3, 4){}; write a list, [3, 4]",
    "workers: {num: (1, 4), cpus: 1}": "workers.num is written (1, 4){}; write a list, [1, 4]",
    "model: {a: dict(x=1, y=2)}": (
        "model.a is written dict(x=1, y=2){}; write a list or a mapping, or quote it if it is text"
    ),
    "model: {a: (train, val)}": (
        "model.a is written (train, val){}; write a list or a mapping, or quote it if it is text"
    ),
}


@pytest.mark.parametrize(("written", "expected"), SPLIT.items())
def test_a_tuple_between_braces_is_named_as_it_is_written(written: str, expected: str) -> None:
    key, _, value = written.partition(":")
    assert message(**{key: value}) == f"x.yaml: {expected.format(', which YAML splits at its commas')}"


def test_a_tuple_between_braces_on_the_command_line() -> None:
    assert message("optimizer={_target_: AdamW, betas: (0.9, 0.95)}") == (
        "command line: optimizer.betas is written (0.9, 0.95), which YAML splits at its commas; "
        "write a list, [0.9, 0.95]"
    )


def test_a_tuple_for_a_key_that_takes_a_list() -> None:
    problem = "must be a whole number or a list of whole numbers, got '(1, 4)'; write a list, [1, 4]"
    assert message("workers.num=(1, 4)") == f"command line: workers.num {problem}"
    problem = "must be a list of text, got '(a, b)'; write a list, [a, b]"
    assert message("tracking.tags=(a, b)") == f"command line: tracking.tags {problem}"


MEANT = [
    "(old)/data", "(a)", "(1)", "(a|b)", "img (1)", "[a-z]*", "a, b", "0,1", "1/2", "2024-10-12", "none", "nil", "Inf",
    "lambda", "None of these", "()",
]  # fmt: skip


@pytest.mark.parametrize("text", MEANT)
def test_other_text_stays_text(text: str) -> None:
    if text[0] != "[":
        assert parse(BASE, "x.yaml", [f"model.size={text}"]).spec.model.args == {"size": text}
    assert parse(BASE, "x.yaml", [f"model.size='{text}'"]).spec.model.args == {"size": text}
    assert parse(f"{BASE}store: '{text}'", "x.yaml").spec.store == text
    assert list_in(text) is None


@pytest.mark.parametrize("written", ["[(, )]", "['(1', '2)']", "[smile (, x)]", "[(a, b)]", "{'(1': '2)'}"])
def test_parts_that_may_be_meant_one_by_one_stay(written: str) -> None:
    assert parse(BASE, "x.yaml", [f"model.words={written}"])


@pytest.mark.parametrize(
    "text", ["", "()", "[]", "{}", "['a']", '{"a": 1}', "{0}", "(a, b)", "(1, 2j)", "[b'x']", "(" * 9999, "(1, ...)"]
)
def test_what_may_be_text_is_no_list(text: str) -> None:
    assert list_in(text) is None


class Plain:
    def __init__(self, size, name="x", shape=(1, 1), rate: float = 0.1, flag=False, **more):  # type: ignore[no-untyped-def]
        self.size, self.name, self.shape, self.rate, self.flag, self.more = size, name, shape, rate, flag, more


class Sized:
    def __init__(self, size: "tuple[int, int] | list[int] | dict[int, list[float]] | None", count: "int | None" = 1):
        self.size, self.count = size, count


class Says:
    def __init__(
        self, path: "str | None" = None, sizes: list[str] | None = None, label: str | int = 3,
        items: list[Any] | None = None,
        tag: Any = 0, key: Hashable = 0, count: "int | Quantity" = 3,  # type: ignore[name-defined]  # noqa: F821
    ) -> None:  # fmt: skip
        self.made = (path, sizes, label, items, tag, key, count)


def build(name: str, args: dict[str, Any]) -> Any:
    return Builder().build(Target(f"{__name__}.{name}", args), "model")


DECODE = "${oc.decode:${oc.env:NAME}} for a"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"shape": "(32, 32)"}, "model.shape is text, got '(32, 32)'; write a list, [32, 32], without quotes"),
        ({"shape": ["(1, 2)"]}, "model.shape[0] is text, got '(1, 2)'; write a list, [1, 2], without quotes"),
        ({"rate": "1e-3"},
         f"model.rate is text, got '1e-3'; remove the quotes, or write {DECODE} number from the environment"),
        ({"flag": "False"},
         f"model.flag is text, got 'False'; write false without quotes, or {DECODE} value from the environment"),
    ],
)  # fmt: skip
def test_text_where_a_component_takes_none(args: dict[str, Any], expected: str) -> None:
    with pytest.raises(DescriptionError) as caught:
        build("Plain", {"size": 1, **args})
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"size": "(32, 32)"}, "model.size is text, got '(32, 32)'; write a list, [32, 32], without quotes"),
        ({"size": {0: "[0.9, 1]"}}, "model.size.0 is text, got '[0.9, 1]'; write a list, [0.9, 1], without quotes"),
        ({"size": "{0: 1.5}"}, "model.size is text, got '{0: 1.5}'; write a mapping, {0: 1.5}, without quotes"),
        ({"size": None, "count": "5"},
         f"model.count is text, got '5'; remove the quotes, or write {DECODE} number from the environment"),
    ],
)  # fmt: skip
def test_text_where_an_annotation_names_other_types(args: dict[str, Any], expected: str) -> None:
    with pytest.raises(DescriptionError) as caught:
        build("Sized", args)
    assert str(caught.value) == expected


def test_text_where_a_component_may_take_it() -> None:
    made = build("Plain", {"size": "[1, 2]", "name": "(1, 2)", "other": "(1, 2)"})
    assert (made.size, made.name, made.more) == ("[1, 2]", "(1, 2)", {"other": "(1, 2)"})
    meant = {
        "path": "(1, 2)", "sizes": ["[1]"], "label": "3", "items": ["[1]"], "tag": "5", "key": "007", "count": "3",
    }  # fmt: skip
    assert build("Says", meant).made == tuple(meant.values())


@pytest.mark.parametrize("in_group", [False, True])
def test_text_where_the_optimizer_takes_none(in_group: bool) -> None:
    betas = {"betas": "(0.9, 0.95)"}
    groups = (GroupSpec(match="*", args=betas if in_group else {}),)
    spec = OptimizerSpec(factory=Target("AdamW", {"lr": 0.1, **({} if in_group else betas)}), groups=groups)
    model = nn.Linear(2, 2)
    with pytest.raises(DescriptionError) as caught:
        build_optimizer(spec, model, group_parameters(model, groups, 1), Builder())
    key = "optimizer.groups[0].betas" if in_group else "optimizer.betas"
    assert str(caught.value) == f"{key} is text, got '(0.9, 0.95)'; write a list, [0.9, 0.95], without quotes"
