"""Resolves ``${...}`` in a description: other keys, environment variables, and numbers that only the plan knows.

OmegaConf resolves; its errors become ``FieldError`` with the full key and the words of the job language.
"""

import os
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from omegaconf.resolvers import oc

from cluster.errors import FieldError, nearest
from jobs.spec import PlanValue
from launcher.config.keys import leaves

_PLAN = {name: f"${{plan.steps:{name}}}" for name in ("total_steps", "steps_per_epoch")}
"""Added to the job as key ``plan`` while it is resolved, so that ``${plan.total_steps}`` finds a value."""


def _plan_steps(epochs: Any) -> PlanValue:
    if isinstance(epochs, str) and epochs in _PLAN:
        return PlanValue(epochs)
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 <= epochs < float("inf"):
        raise ValueError(f"plan.steps takes a number of epochs, got {epochs}")
    return PlanValue("steps", epochs)


def _environment_variable(name: str, *default: Any, _root_: DictConfig) -> str | None:
    """Like ``oc.env``, and record the name of each variable that is set in OmegaConf's cache of the root."""
    if name in os.environ:
        OmegaConf.get_cache(_root_)["oc.env"][name] = None
    return oc.env(name, *default)


OmegaConf.register_resolver("oc.env", _environment_variable, replace=True)
OmegaConf.register_resolver("plan.steps", _plan_steps, replace=True)  # replace: this module may be imported twice


def resolve(job: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the job with each interpolation replaced by its value or a ``PlanValue``, and the variables it reads."""
    try:
        config = OmegaConf.create({"plan": _PLAN, **job})
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise field_error(error, job) from error
    assert isinstance(values, dict)
    return {str(name): values[name] for name in job}, tuple(OmegaConf.get_cache(config)["oc.env"])


def field_error(error: OmegaConfBaseException, job: dict[str, Any]) -> FieldError:
    """Translate an error of OmegaConf."""
    key = error.full_key or "a key"
    written = next((str(value) for name, value in leaves(job, "") if name == key), "an interpolation")
    reason = str(error).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        return FieldError(key, "is still '???'; write its value")
    if isinstance(error, InterpolationKeyError) and (missing := re.match("Interpolation key '(.*?)'", reason)):
        known = [name for name, _ in leaves(job, "")] + [f"plan.{name}" for name in (*_PLAN, "steps:EPOCHS")]
        suggestion = nearest(missing[1], known) or "; write one of the keys of this file"
        return FieldError(key, f"is {written}, but there is no key {missing[1]!r}{suggestion}")
    if variable := re.search("Environment variable '(.*)' not found", reason):
        name = variable[1]
        return FieldError(key, f"is {written}, but {name} is not set; set it, or write ${{oc.env:{name},DEFAULT}}")
    if isinstance(error, UnsupportedInterpolationType):
        resolver = reason.rpartition(" ")[2]
        known = ["oc.env", "oc.decode", "oc.select", "plan.steps"]
        return FieldError(key, f"is {written}, but there is no resolver {resolver!r}{nearest(resolver, known)}")
    if isinstance(error, GrammarParseError):
        return FieldError(key, f"is not a well-formed interpolation: {reason}; write ${{key}} or ${{oc.env:NAME}}")
    if "ecursive interpolation" in reason or "parent node" in reason:
        return FieldError(key, f"is {written}, which leads back to itself; write the value in one place")
    if isinstance(error, InterpolationResolutionError):
        return FieldError(key, f"is {written}: {reason.rpartition(' while resolving interpolation: ')[2]}")
    return FieldError(key, f"cannot be read: {reason}")
