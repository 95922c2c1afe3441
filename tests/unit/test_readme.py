"""What the README shows can be written."""

import re
from pathlib import Path

import pytest

from launcher.description import parse

README = (Path(__file__).parents[2] / "README.md").read_text()
DECLARED = re.findall(r"^\| [^|]+ \| `([a-z_]+: .+)` \|$", README, flags=re.MULTILINE)
AROUND = """\
name: x
model: a.Model
data: {train: a.data, val: a.data}
loss: MSELoss
"""


def test_there_is_a_table() -> None:
    assert len(DECLARED) >= 14


@pytest.mark.parametrize("line", DECLARED)
def test_a_line_of_the_table_is_a_description(line: str) -> None:
    key = line.partition(":")[0]
    optimizer = f"optimizer: {{_target_: SGD, lr: 1, {line}}}" if key == "groups" else "optimizer: SGD"
    written = [part for part in [*AROUND.splitlines(), optimizer] if part.partition(":")[0] != key]
    spec = parse("\n".join([*written, *([] if key == "groups" else [line])]), "README.md").spec

    assert getattr(spec.optimizer if key == "groups" else spec, key)


def test_the_example_is_a_description() -> None:
    (example,) = re.findall(r"```yaml\n(name: digits\n.+?)```", README, flags=re.DOTALL)
    assert parse(example, "README.md").spec.name == "digits"
