"""The job language as a person meets it: what is read, what is refused and in which words, what is written back."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import DescriptionError
from jobs import spec as language
from jobs.spec import (
    EarlyStopSpec,
    GroupSpec,
    InitSpec,
    JobSpec,
    LossSpec,
    OptimizerSpec,
    PlanValue,
    SchedulerSpec,
    Target,
    TrainSpec,
)
from launcher.config import reference as schema
from launcher.config.description import MISSING, Description, Difference, differences, flatten, load, parse

BASE = """\
model: {_target_: jobs.models.Net, width: 8}
data: {train: {_target_: jobs.data.digits}}
loss: CrossEntropyLoss
optimizer: {_target_: SGD, lr: 0.1}
"""

FULL = """\
name: digits
seed: 7
store: ${oc.env:STORE}
model: {_target_: jobs.models.Net, num_classes: 10}
data:
  train: {_target_: jobs.data.digits, split: train}
  val: {_target_: jobs.data.digits, split: val}
loss: {_target_: CrossEntropyLoss, label_smoothing: 0.1}
optimizer:
  _target_: SGD
  lr: 5e-2
  groups:
    - {match: "*.bias", weight_decay: 0.0}
    - {match: "fc3.*", lr: 0.01, from_epoch: 2}
scheduler:
  _target_: SequentialLR
  interval: step
  milestones: ["${plan.steps:0.5}"]
  schedulers:
    - {_target_: LinearLR, total_iters: "${plan.steps:0.5}"}
    - {_target_: CosineAnnealingLR, T_max: "${plan.total_steps}", last: "${scheduler.milestones[0]}"}
train: {epochs: 10, global_batch: 64, shards: 4, clip_norm: 1}
workers: {num: 2, gpus: 0}
checkpoint: {every_steps: 50, best: {metric: val/accuracy, mode: max}}
tracking: {project: digits, tags: [a, b]}
"""


def read(extra: str = "", *overrides: str) -> Description:
    return parse(BASE + extra, "digits.yaml", overrides, default_name="digits")


def message(extra: str = "", *overrides: str, base: str = BASE) -> str:
    with pytest.raises(DescriptionError) as caught:
        parse(base + extra, "digits.yaml", overrides, default_name="digits")
    return str(caught.value)


DECODE = "remove the quotes, or write ${oc.decode:${oc.env:NAME}} for a number from the environment"
PLAN_ONLY = "only arguments of model, data, loss, optimizer and scheduler can wait for the plan"
TOP_KEYS = (
    "name, model, data, loss, optimizer, scheduler, train, workers, checkpoint, tracking, "
    "metrics, init_from, seed, store"
)
DECIMAL = "which YAML reads in another base than 10; write it in decimal, or quote it if it is text"

FILE_MISTAKES = {
    # keys
    "trian: {}": "trian is not a known key (did you mean 'train'?)",
    "plan: {}": f"plan is not a known key; the keys here are {TOP_KEYS}",
    "train: {epoch: 3}": "train.epoch is not a known key (did you mean 'epochs'?)",
    "checkpoint: {best: {metrik: val/loss, mode: min}}": (
        "checkpoint.best.metrik is not a known key (did you mean 'metric'?)"
    ),
    "checkpoint: {best: {metric: val/loss}}": "checkpoint.best.mode is missing; write min or max",
    "null: 3": "a key cannot be read: Incompatible key type 'NoneType'",
    '"a\\nb": 3': f"a b is not a known key; the keys here are {TOP_KEYS}",
    # types
    "train:": "train must be a mapping, got null; write it, or remove the key",
    "train: [1]": "train must be a mapping, got [1]",
    "train: {epochs: '3'}": f"train.epochs must be a whole number, got '3'; {DECODE}",
    "train: {epochs: 1.5}": "train.epochs must be a whole number, got 1.5; write a whole number",
    "train: {epochs: 2.0}": "train.epochs must be a whole number, got 2.0; write 2",
    "train: {epochs: true}": "train.epochs must be a whole number, got true",
    "train: {exact: 1}": "train.exact must be true or false, got 1",
    "train: {clip_norm: big}": "train.clip_norm must be a number or null, got 'big'",
    "seed: 2024-01-01": "seed must be a whole number, got '2024-01-01'",
    "name: 1e5": "name must be text, got 100000.0; quote it",
    "name: true": "name must be text, got true; quote it",
    "name: null": "name must be text, got null; write it, or remove the key",
    "tracking: {tags: x}": "tracking.tags must be a list of text, got 'x'",
    "tracking: {tags: [x, 3]}": "tracking.tags[1] must be text, got 3; quote it",
    "workers: {num: [1]}": "workers.num must be a number or the least and the most, such as [1, 4], got [1]",
    "workers: {num: [4, 1]}": "workers.num must be at least 1, the least first, got [4, 1]",
    "workers: {num: [1, 5]}": (
        "workers.num must be at most train.shards=4, got 5; lower it, or give a new run more shards"
    ),
    "workers: {num: [1, 1.5]}": "workers.num[1] must be a whole number, got 1.5; write a whole number",
    "workers: {max_worker_hours: 0}": "workers.max_worker_hours must be finite and above 0, got 0.0",
    "workers: {start_timeout_s: 0}": "workers.start_timeout_s must be finite and above 0 seconds, got 0.0",
    "workers: {first_step_timeout_s: 0}": (
        "workers.first_step_timeout_s must be finite and above 0, got 0.0; null turns it off"
    ),
    "workers: {max_failures: 3}": "workers.max_failures must be a mapping, got 3",
    "workers: {max_failures: {code: -1}}": "workers.max_failures.code must be at least 0, got -1",
    # choices
    "train: {precision: fp12}": "train.precision must be fp32, bf16 or fp16, got 'fp12' (did you mean 'fp32'?)",
    "tracking: {mode: 3}": "tracking.mode must be online, offline or disabled, got 3",
    "workers: {gpus: atuo}": "workers.gpus must be a whole number or auto, got 'atuo' (did you mean 'auto'?)",
    # what YAML 1.1 reads otherwise than it looks
    "name: 010": f"name is written 010, {DECIMAL}",
    "workers: {timeout_s: 1:30}": f"workers.timeout_s is written 1:30, {DECIMAL}",
    "tracking: {tags: [a, 1:30.5]}": f"tracking.tags[1] is written 1:30.5, {DECIMAL}",
    "train: {exact: yes}": (
        "train.exact is written yes, which YAML reads as true or false; write that, or quote it if it is text"
    ),
    # values
    "train: {epochs: 0}": "train.epochs must be at least 1, got 0",
    "train: {clip_norm: .nan}": "train.clip_norm must be finite and above 0, got nan; null turns clipping off",
    "train: {bucket_mb: 0}": ("train.bucket_mb must lie between 0.001 and 1000000, got 0.0; null chooses a size"),
    "train: {bucket_mb: .inf}": ("train.bucket_mb must lie between 0.001 and 1000000, got inf; null chooses a size"),
    "train: {bucket_mb: .nan}": ("train.bucket_mb must lie between 0.001 and 1000000, got nan; null chooses a size"),
    "train: {bucket_mb: 0.5, compile: true}": (
        "train.bucket_mb must be at least 1 while train.compile is true, got 0.5; null chooses a size"
    ),
    "train: {bucket_mb: big}": "train.bucket_mb must be a number or null, got 'big'",
    "train: {global_batch: 63}": "train.global_batch must divide by train.shards=4, got 63; write 64 or 60",
    "seed: -1": "seed must lie between 0 and 2**63 - 1, got -1",
    "name: a/b": "name must be a plain directory name, got 'a/b'",
    "store: ''": "store must be a URL or a folder, got ''; write for example runs or s3://bucket/runs",
    "workers: {num: 5}": ("workers.num must be at most train.shards=4, got 5; lower it, or give a new run more shards"),
    "checkpoint: {best: {metric: val/loss, mode: min}}": (
        "checkpoint.best.metric needs data.val to measure 'val/loss'; declare data.val"
    ),
    # targets
    "scheduler: {step_size: 3}": "scheduler has no _target_; write what to build, an import path such as package.Name",
    "scheduler: {_targt_: StepLR}": "scheduler._targt_ is not a known key (did you mean '_target_'?)",
    "scheduler: {_target_: 3}": "scheduler._target_ must be an import path such as package.Name, got 3",
    "scheduler: {_target_: a b}": "scheduler._target_ must be an import path such as package.Name, got 'a b'",
    "scheduler: a..b": "scheduler._target_ must be an import path such as package.Name, got 'a..b'",
    "scheduler: 3": "scheduler must be a mapping with _target_ or null, got 3",
    "scheduler: {_target_: StepLR, _args_: [3]}": (
        "scheduler._args_ is not supported; write every argument by its name"
    ),
    "scheduler: {_target_: StepLR, _partial_: 1}": "scheduler._partial_ must be true or false, got 1",
    "scheduler: {_target_: StepLR, step size: 1}": (
        "scheduler.step size cannot be an argument, got 'step size'; write a Python name"
    ),
    "scheduler: {_target_: StepLR, x: [{_targt_: a}]}": (
        "scheduler.x[0]._targt_ stands in a mapping without _target_ (did you mean '_target_'?)"
    ),
    # interpolations
    "seed: ???": "seed is still '???'; write its value",
    "store: ${oc.env:NOPE}": "store is ${oc.env:NOPE}, but NOPE is not set; set it, or write ${oc.env:NOPE,DEFAULT}",
    "train: {epochs: '${oc.env:EPOCHS}'}": f"train.epochs must be a whole number, got '3'; {DECODE}",
    "store: ${optimiser.lr}": (
        "store is ${optimiser.lr}, but there is no key 'optimiser.lr' (did you mean 'optimizer.lr'?)"
    ),
    "store: ${zzz}": "store is ${zzz}, but there is no key 'zzz'; write one of the keys of this file",
    "store: ${env:HOME}": "store is ${env:HOME}, but there is no resolver 'env' (did you mean 'oc.env'?)",
    "store: ${store}": "store is ${store}, which leads back to itself; write the value in one place",
    "store: a${name}${store}": "store is a${name}${store}, which leads back to itself; write the value in one place",
    "store: '${seed'": (
        "store is not a well-formed interpolation: no viable alternative at input '${seed'; "
        "write ${key} or ${oc.env:NAME}"
    ),
    # what only the plan knows
    "store: ${plan.total_steps}": f"store must be text, got ${{plan.total_steps}}; {PLAN_ONLY}",
    "train: {epochs: '${plan.steps:3}'}": f"train.epochs must be a whole number, got ${{plan.steps:3}}; {PLAN_ONLY}",
    "store: a/${plan.total_steps}": (
        "store cannot be part of a text, got 'a/${plan.total_steps}'; write ${plan...} alone"
    ),
    "scheduler: {_target_: X, n: '${plan.totl_steps}'}": (
        "scheduler.n is ${plan.totl_steps}, but there is no key 'plan.totl_steps' (did you mean 'plan.total_steps'?)"
    ),
    "scheduler: {_target_: X, n: '${plan.steps:x}'}": (
        "scheduler.n is ${plan.steps:x}: plan.steps takes a number of epochs, got x"
    ),
    # YAML itself
    "seed: 1\nseed: 2": "line 6, column 1: found duplicate key seed; keep one of them",
    "a: b: c": "line 5, column 5: mapping values are not allowed here",
    "train:\n\tepochs: 3": (
        "line 6, column 1: found character '\\t' that cannot start any token; indent with spaces, not tabs"
    ),
    "train: {epochs: ${seed}}": (
        "line 5, column 18: expected ',' or '}', but got '{'; "
        'between braces or brackets, quote an interpolation: "${...}"'
    ),
    "seed: \x01": "is not text at character 154: special characters are not allowed",
    "seed: !!int x": "line 5, column 7: the tag !!int is not supported",
    "seed: !!python/name:os.system": "line 5, column 7: the tag !!python/name:os.system is not supported",
    "x: &a [*a]": "line 5, column 4: YAML recursive aliases are not supported.",
    "---\nseed: 3": "line 5, column 1: a second document begins; a job file holds one",
    "x: " + "[" * 500 + "]" * 500: "lists or mappings are nested too deeply",
}


@pytest.mark.parametrize(("written", "expected"), FILE_MISTAKES.items(), ids=lambda text: text[:60])
def test_mistake_in_the_file(written: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOPE", raising=False)
    monkeypatch.setenv("EPOCHS", "3")
    assert message(written) == f"digits.yaml: {expected}"


WHOLE_FILES = {
    "": "is empty; it needs model, data.train, loss and optimizer",
    "# nothing": "is empty; it needs model, data.train, loss and optimizer",
    "[1]": "must be a mapping, got [1]; it needs model, data.train, loss and optimizer",
    "model": "must be a mapping, got 'model'; it needs model, data.train, loss and optimizer",
    "seed: 3": "model is missing; write a mapping with _target_",
    "model: a.B\nloss: L\noptimizer: SGD": "data.train is missing; write a mapping with _target_",
    "model: a.B\ndata: {train: a.b}\noptimizer: SGD": "loss is missing; write a mapping with _target_",
    "model: a.B\ndata: {train: a.b}\nloss: L": "optimizer is missing; write a mapping with _target_",
}


@pytest.mark.parametrize(("written", "expected"), WHOLE_FILES.items())
def test_file_that_lacks_something(written: str, expected: str) -> None:
    assert message(base=written) == f"digits.yaml: {expected}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    {
        "lr: 0": "optimizer.lr must be finite and above 0, got 0; write a learning rate such as 0.1",
        "lr: .inf": "optimizer.lr must be finite and above 0, got inf; write a learning rate such as 0.1",
        "lr: '0.1'": f"optimizer.lr must be a number, got '0.1'; {DECODE}",
        "weight_decay: .nan": "optimizer.weight_decay must be a finite number, got nan",
        "betas: [0.9, .inf]": "optimizer.betas[1] must be a finite number, got inf",
        "groups: {match: a}": "optimizer.groups must be a list of mappings, got a mapping",
        "groups: [a]": "optimizer.groups[0] must be a mapping, got 'a'",
        "groups: [{match: a}, {lr: 1}]": "optimizer.groups[1].match is missing; write text",
        "groups: [{match: a}, {match: b, lr: .nan}]": (
            "optimizer.groups[1].lr must be finite and above 0, got nan; write a learning rate such as 0.1"
        ),
        "groups: [{match: a, from_epoch: -1}]": "optimizer.groups[0].from_epoch must be at least 0, got -1",
    }.items(),
)
def test_mistake_in_the_optimizer(arguments: str, expected: str) -> None:
    written = BASE[: BASE.index("optimizer")] + f"optimizer: {{_target_: SGD, {arguments}}}"
    assert message(base=written) == f"digits.yaml: {expected}"


OVERRIDE_MISTAKES = {
    "train.epochs": "an override must be key=value, got 'train.epochs'",
    "=3": "an override must be key=value, got '=3'",
    "a..b=3": "an override must be key=value, got 'a..b=3'",
    "train.epochs=": "train.epochs has no value; write train.epochs=null for none",
    "train.epochs=[": (
        "train.epochs must be a YAML value, got '[': expected the node content, but found '<stream end>'; quote it"
    ),
    "tracking.group=#team": "tracking.group must be one YAML value, got '#team'; quote it",
    "train.epochs=1\nseed: 2": "train.epochs must be one YAML value, got '1\\nseed: 2'; quote it",
    "train.epochs=010": f"train.epochs is written 010, {DECIMAL}",
    "train.epochs=0": "train.epochs must be at least 1, got 0",
    "train.epoch=1": "train.epoch is not a known key (did you mean 'epochs'?)",
    "+train.epochs=1": "+train is not a known key (did you mean 'train'?)",
    "train.shards=3": "train.global_batch must divide by train.shards=3, got 64; write 66 or 63",
    "train.epochs.x=3": "train.epochs is 1, which has nothing in it to set; write the whole of train.epochs",
    "name=1e5": "name must be text, got 100000.0; quote it",
    "model=null": "model must be a mapping with _target_, got null; write it, or remove the key",
    "data.val.split=x": "data.val has no _target_; write what to build, an import path such as package.Name",
    "optimizer.groups[0].lr=0.1": (
        "optimizer.groups[0] does not exist, optimizer.groups has 0 items; write the whole list"
    ),
    "store=${oc.env:NOPE}": "store is ${oc.env:NOPE}, but NOPE is not set; set it, or write ${oc.env:NOPE,DEFAULT}",
    "checkpoint.best.mode=max": "checkpoint.best.metric is missing; write text",
    "model.x={null: 3}": "model.x cannot be read: Incompatible key type 'NoneType'",
}


@pytest.mark.parametrize(("override", "expected"), OVERRIDE_MISTAKES.items())
def test_mistake_on_the_command_line(override: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOPE", raising=False)
    assert message("", override) == f"command line: {expected}"


def test_a_mistake_of_the_file_is_not_blamed_on_an_override() -> None:
    assert message("train: {epochs: 0}", "seed=3") == "digits.yaml: train.epochs must be at least 1, got 0"


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    for name, expected in {
        "nope.yaml": f"nope.yaml: there is no such file, looked at {tmp_path / 'nope.yaml'}",
        "folder.yaml": f"folder.yaml: is a directory, {tmp_path / 'folder.yaml'}; name a YAML file in it",
        "folder.yaml/x.yaml": f"x.yaml: there is no such file, looked at {tmp_path / 'folder.yaml/x.yaml'}",
        "latin.yaml/x.yaml": f"x.yaml: cannot be read, Not a directory: {tmp_path / 'latin.yaml/x.yaml'}",
        "latin.yaml": "latin.yaml: is not UTF-8 text at byte 9; save it as UTF-8",
    }.items():
        with pytest.raises(DescriptionError) as caught:
            load(name)
        assert str(caught.value) == expected


def test_the_smallest_file_gets_every_default() -> None:
    spec = read().spec
    assert spec == JobSpec(
        name="digits",
        model=Target("jobs.models.Net", {"width": 8}),
        data=language.DataSpec(train=Target("jobs.data.digits")),
        loss=LossSpec(factory=Target("CrossEntropyLoss")),
        optimizer=OptimizerSpec(factory=Target("SGD", {"lr": 0.1})),
    )


def test_everything_that_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", "s3://key:secret@bucket")
    spec = parse(FULL, "digits.yaml").spec
    assert (spec.name, spec.seed, spec.store) == ("digits", 7, "s3://key:secret@bucket")
    assert spec.optimizer == OptimizerSpec(
        factory=Target("SGD", {"lr": 0.05}),
        groups=(
            GroupSpec(match="*.bias", args={"weight_decay": 0.0}),
            GroupSpec(match="fc3.*", args={"lr": 0.01}, from_epoch=2),
        ),
    )
    half = PlanValue("steps", 0.5)
    cosine = Target("CosineAnnealingLR", {"T_max": PlanValue("total_steps"), "last": half})
    assert spec.scheduler == SchedulerSpec(
        factory=Target(
            "SequentialLR", {"milestones": [half], "schedulers": [Target("LinearLR", {"total_iters": half}), cosine]}
        ),
        interval="step",
    )
    assert spec.train == TrainSpec(epochs=10, clip_norm=1.0)
    assert isinstance(spec.train.clip_norm, float)
    assert spec.tracking.tags == ("a", "b")
    assert spec.workers.gpus == 0


def test_nested_targets_and_mappings() -> None:
    written = "scheduler: {_target_: X, a: {_target_: p.Y, _partial_: true, b: 1}, c: {0: {_target_: Z}, k: [null]}}"
    scheduler = read(written).spec.scheduler
    assert scheduler is not None
    assert scheduler.factory.args == {"a": Target("p.Y", {"b": 1}, partial=True), "c": {0: Target("Z"), "k": [None]}}


def test_the_environment_supplies_text_numbers_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPOCHS", "3")
    monkeypatch.delenv("NOPE", raising=False)
    spec = read("train: {epochs: '${oc.decode:${oc.env:EPOCHS}}'}\nstore: ${oc.env:NOPE,here}/${name}").spec
    assert (spec.train.epochs, spec.store) == (3, "here/digits")


def test_overrides_set_add_and_remove() -> None:
    groups = "optimizer: {_target_: SGD, lr: 0.1, groups: [{match: a, lr: 0.1}, {match: b}]}"
    written = BASE[: BASE.index("optimizer")] + groups
    spec = parse(
        written,
        "digits.yaml",
        [
            "name='1e5'",
            "model._target_=my.Net",
            "loss.label_smoothing=1e-1",
            "data.val._target_=my.data",
            "optimizer.groups[0].lr=1e-3",
            "optimizer.groups.1.from_epoch=2",
            "scheduler._target_=StepLR",
            "scheduler.step_size=5",
            "checkpoint.best={metric: val/loss, mode: min}",
            "store=s3://bucket/${seed}",
        ],
    ).spec
    assert spec.name == "1e5"
    assert spec.model == Target("my.Net", {"width": 8})
    assert spec.loss == LossSpec(factory=Target("CrossEntropyLoss", {"label_smoothing": 0.1}))
    assert spec.data.val == Target("my.data")
    assert spec.optimizer.groups == (GroupSpec(match="a", args={"lr": 0.001}), GroupSpec(match="b", from_epoch=2))
    assert spec.scheduler == SchedulerSpec(factory=Target("StepLR", {"step_size": 5}))
    assert spec.checkpoint.best == language.BestSpec(metric="val/loss", mode="min")
    assert spec.store == "s3://bucket/0"
    assert read("scheduler: StepLR", "scheduler=null").spec.scheduler is None


def test_the_text_keeps_interpolations_and_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", "s3://key:secret@bucket")
    description = parse(FULL, "digits.yaml", ["scheduler.last=${plan.steps:${train.epochs}}"])
    assert "secret" not in description.text
    for kept in (
        "store: ${oc.env:STORE}\n",
        "T_max: ${plan.total_steps}\n",
        "last: ${plan.steps:${train.epochs}}\n",
        "last: ${scheduler.milestones[0]}\n",
        "log_every_steps: 1\n",  # defaults are written out: another version may have others
    ):
        assert kept in description.text
    again = parse(description.text, "job.yaml")
    assert again.spec == description.spec
    assert again.text == description.text


KEYS = [
    "", " ", "x", "on", "No", "null", "~", "010", "1e5", "1e-3", "1:30", "0x1f", ".inf", "2024-01-01", "a: b", "#x",
    "- a", "[a]", "{a}", "!x", "*a", "&a", "%a", "@a", "`a", "\ttab", "'", '"', "é☃🙂", "<<", "=", "\\", "\\n",
    "\\${kept}",
]  # fmt: skip
NUMBERS = [None, True, False, 0, -7, 10**20, 0.0, -0.0, 1e-7, 1e22, 3.5, 1e300]
PIECES = [*KEYS, *NUMBERS, "a\nb\n", "\u0085\u2028", "x" * 300, "word " * 60]  # no line breaks in a key


def arbitrary(draw: random.Random, depth: int = 3) -> object:
    kind = draw.random() if depth else 0
    if kind < 0.5:
        return draw.choice(PIECES)
    values = [arbitrary(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind < 0.7:
        return values
    names = draw.sample(KEYS, len(values))
    return {"_target_": "a.B", "arg": values} if kind < 0.85 else dict(zip(names, values))


@pytest.mark.parametrize("seed", range(40))
def test_any_argument_survives_the_round_trip(seed: int) -> None:
    draw = random.Random(seed)
    args = {f"arg{index}": arbitrary(draw) for index in range(6)}
    job = {"model": {"_target_": "a.B", **args}, "data": {"train": "a.b"}, "loss": "L", "optimizer": "SGD"}
    description = parse(json.dumps(job, ensure_ascii=False), "digits.yaml", default_name="digits")  # JSON is YAML
    again = parse(description.text, "job.yaml")
    assert again.spec == description.spec
    assert repr(again.spec) == repr(description.spec)  # 1 == 1.0 == True
    assert again.text == description.text


def test_flatten_names_every_value() -> None:
    flat = flatten(read("scheduler: {_target_: X, n: '${plan.steps:3}', b: [0.9, 1], s: [{_target_: Y}]}").spec)
    assert flat["optimizer.lr"] == 0.1
    assert flat["model._target_"] == "jobs.models.Net"
    assert flat["scheduler.n"] == "${plan.steps:3}"
    assert flat["scheduler.b"] == [0.9, 1]
    assert flat["scheduler.s[0]._target_"] == "Y"
    assert flat["data.val"] is None
    groups = flatten(read("", "optimizer.groups=[{match: '*.bias', lr: 1}]").spec)
    assert (groups["optimizer.groups[0].match"], groups["optimizer.groups[0].lr"]) == ("*.bias", 1)
    json.dumps(flat)


def test_differences_are_told_key_by_key() -> None:
    old = read().spec
    assert differences(old, read().spec) == []
    changed = differences(old, read("", "train.epochs=2", "model.depth=3", "name=other").spec)
    assert changed == [
        Difference("name", "digits", "other"),
        Difference("train.epochs", 1, 2),
        Difference("model.depth", MISSING, 3),
    ]
    assert [str(change) for change in changed] == [
        "name: 'digits' -> 'other'",
        "train.epochs: 1 -> 2",
        "model.depth: (absent) -> 3",
    ]


def test_load_names_the_run_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my-job.yaml"
    path.write_text(BASE, encoding="utf-8-sig")
    description = load(path, ["seed=3"])
    assert (description.spec.name, description.spec.seed, description.source) == ("my-job", 3, "my-job.yaml")


def test_a_mistake_is_told_without_torch_or_ray() -> None:
    imports = "import sys, launcher.config.description, launcher.config.reference"
    program = f"{imports}; print({{'torch', 'ray'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_a_driver_on_ray_does_without_torch() -> None:
    """It would take seconds and 350 MB of the head of a cluster; processes of their own plan and train."""
    drives = "launcher.runs.begin, launcher.runs.resume, launcher.submission.submit"
    program = f"import sys, {drives}, cluster.ray.worker_group, ray.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.strip() == "False"


def test_schema_lists_every_field_with_its_docstring() -> None:
    reference = schema.describe_json()
    sections = {
        "": JobSpec, "data.": language.DataSpec,
        "data.shuffle.": language.ShuffleSpec, "optimizer.groups[].": GroupSpec, "train.": TrainSpec,
        "loss.": LossSpec, "init_from.": InitSpec, "train.early_stop.": EarlyStopSpec,
        "scheduler.": SchedulerSpec, "workers.": language.WorkersSpec, "checkpoint.": language.CheckpointSpec,
        "workers.max_failures.": language.MaxFailuresSpec,
        "checkpoint.best.": language.BestSpec, "tracking.": language.TrackingSpec, "optimizer.": OptimizerSpec,
    }  # fmt: skip
    written = {"factory": "_target_", "args": "<argument>"}
    expected = {
        prefix + written.get(field.name, field.name)
        for prefix, section in sections.items()
        for field in dataclasses.fields(section)
    }
    assert set(reference) == expected
    assert all(entry["doc"] for entry in reference.values())
    assert {key for key, entry in reference.items() if entry["required"]} == {
        "model", "data.train", "loss", "optimizer", "optimizer._target_", "scheduler._target_",
        "loss._target_", "init_from.url", "train.early_stop.metric", "train.early_stop.mode",
        "train.early_stop.patience", "optimizer.groups[].match", "checkpoint.best.metric", "checkpoint.best.mode",
        "data.shuffle.block", "data.shuffle.buffer",
    }  # fmt: skip
    assert reference["train.epochs"] == {
        "type": "a whole number",
        "default": 1,
        "required": False,
        "doc": "Passes over the training data.",
    }
    json.dumps(reference)


def test_schema_reads_like_an_annotated_job_file() -> None:
    text = schema.describe()
    assert "  # Passes over the training data.\n  epochs: 1  # a whole number\n" in text
    assert "model: ???  # required: a mapping with _target_\n" in text
    assert "  best: null  # a mapping or null\n    # A validation metric" in text
    assert "${plan.steps:EPOCHS}" in text
    assert max(map(len, text.splitlines())) <= schema.WIDTH


VALIDATED = "name: digits\ndata: {train: a.B, val: a.B}\n"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("metrics: {loss: a.B}", "metrics.loss must be a word other than loss, accuracy"),
        ("metrics: {f1: 3}", "metrics.f1 must be a mapping with _target_, got 3"),
        ("train: {early_stop: {metric: val/f2, mode: max, patience: 3}}\nmetrics: {f1: a.B}",
         "train.early_stop.metric must be val/loss, val/accuracy, val/f1, train/loss or train/accuracy, got 'val/f2'"),
        ("train: {early_stop: {metric: val/loss, mode: max, patience: 0}}",
         "train.early_stop.patience must be at least 1, got 0"),
        ("train: {clip_norm: 1, clip_value: 1}", "train.clip_value cannot stand beside clip_norm; keep one of them"),
        ("train: {validate_every_steps: 1, validate_every_epochs: 1}",
         "train.validate_every_steps cannot stand beside validate_every_epochs; keep one of them"),
        ("optimizer: {_target_: SGD, lr: 1, groups: [{match: a, from_epoch: 1, from_step: 1}]}",
         "optimizer.groups[0].from_step cannot stand beside from_epoch; keep one of them"),
        ("optimizer: {_target_: SGD, lr: 1, groups: [{match: a, lr: 1, lr_scale: 2}]}",
         "optimizer.groups[0].lr_scale cannot stand beside lr; keep one of them"),
        ("loss: {_target_: MSELoss, target: onehot}",
         "loss.target must be index, one_hot, float or null, got 'onehot' (did you mean 'one_hot'?)"),
        ("init_from: {url: a, weights: average}", "init_from.weights must be model or ema, got 'average'"),
        ("init_from: ''", "init_from.url must be the URL of a run, a checkpoint or a .safetensors file, got ''"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together(written: str, expected: str) -> None:
    kept = [line for line in BASE.splitlines() if line.partition(":")[0] not in ("data", written.partition(":")[0])]
    with pytest.raises(DescriptionError) as caught:
        parse("\n".join(kept) + f"\n{VALIDATED}{written}\n", "digits.yaml")
    assert str(caught.value) == f"digits.yaml: {expected}"


@pytest.mark.parametrize(
    ("shuffle", "expected"),
    [
        ("{block: 0, buffer: 64}", "data.shuffle.block must be at least 1, got 0"),
        ("{block: 4, buffer: 64, streams: 0}", "data.shuffle.streams must be at least 1, got 0"),
        ("{block: 100, buffer: 64}", "data.shuffle.buffer must be at least block=100, got 64; raise it"),
        ("{block: 4, buffer: 8}", "data.shuffle.buffer must be at least a micro-batch, train.global_batch / "
         "train.shards = 16, got 8; a smaller one mixes nothing"),
    ],
)  # fmt: skip
def test_a_shuffle_that_mixes_nothing(shuffle: str, expected: str) -> None:
    with pytest.raises(DescriptionError) as caught:
        parse(BASE, "digits.yaml", ["name=x", f"data.shuffle={shuffle}"])
    assert str(caught.value).partition(": ")[2] == expected


def test_metrics_and_warm_starts_may_be_written_short() -> None:
    written = BASE.replace("train: {_target_: jobs.data.digits}", "train: a.B, val: a.B")
    spec = parse(written + "name: x\ninit_from: s3://b/x\nmetrics: {mae: MeanAbsoluteError}", "x.yaml").spec
    assert spec.init_from == InitSpec(url="s3://b/x")
    assert spec.metrics == {"mae": Target("MeanAbsoluteError")}
    assert flatten(spec)["metrics.mae._target_"] == "MeanAbsoluteError"
