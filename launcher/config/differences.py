"""The keys at which two job specs differ."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from jobs.spec import JobSpec, PlanValue, Target
from launcher.config.keys import leaves, show


class _Missing:
    def __repr__(self) -> str:
        return "(absent)"


MISSING: Final = _Missing()
"""The value in a ``Difference`` of a spec that does not have the key."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A key whose values differ between two specs."""

    key: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.key}: {show(self.old)} -> {show(self.new)}"


def flatten(spec: JobSpec) -> dict[str, object]:
    """Return the plain value of each full key: ``optimizer.lr``, ``model._target_``, ``optimizer.groups[0].match``."""
    return dict(leaves(_plain(spec), ""))


def differences(old: JobSpec, new: JobSpec) -> list[Difference]:
    """Return the keys whose values differ, in the order of the job language."""
    before, after = flatten(old), flatten(new)
    pairs = ((key, before.get(key, MISSING), after.get(key, MISSING)) for key in {**before, **after})
    return [Difference(key, was, now) for key, was, now in pairs if was != now]


def _plain(value: Any) -> Any:
    """Convert dataclasses to plain data, as YAML has it."""
    if isinstance(value, PlanValue):
        return str(value)
    if isinstance(value, Target):
        partial = {"_partial_": True} if value.partial else {}
        return {"_target_": value.path, **partial, **_plain(value.args)}
    if dataclasses.is_dataclass(value):
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            item = _plain(getattr(value, field.name))
            plain.update(item if field.name in ("factory", "args") else {field.name: item})
        return plain
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
