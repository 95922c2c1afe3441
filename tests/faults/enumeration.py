"""A crash, or a lie of the store, at every storage call of a process that trains, and what the next one makes of it.

A point is one call and what happens to it. There the process is made to work from the same beginning, on the store
itself, until it dies or is done; another then goes on from what it has left. This module knows neither our checkpoints
nor anybody else's.

Calls are made one at a time. Nothing is lost by that: a kill while several are under way leaves some of them done and
others not, all are parts that nobody names yet, and which of them are there makes no difference to a manifest.
"""

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest import mock

from fsspec.implementations.memory import MemoryFileSystem

from cluster.run import checkpoints
from cluster.storage import documents
from cluster.storage.store import Store
from tests.crashing import KINDS, Call, Faults, Killed, Kind, crashing

Content = Mapping[str, bytes]
"""The objects of a run, by name."""
GOOD = ("resumed", "fell back", "rows lost")
"""What may come of a point. The next life went on from the newest checkpoint committed. Or the store has lost an object
of that one: it was named with its defect, and the newest whole one was used. Or the store has lost rows of metrics, and
the run went on without them. Only a store that lies makes any but the first."""
BAD = ("accepted", "broken", "older", "cannot start", "unfinished")
"""What must not. Bytes that do not belong together were taken for a checkpoint; a kill left one that is committed and
not whole; an older one was used than there is; none could be used; the run is not like any other in the end."""


class MixedError(Exception):
    """A checkpoint was accepted whose bytes do not belong together."""


@dataclass(frozen=True)
class Begun:
    """Where a life began."""

    step: int
    writer: str
    """Whose checkpoint it was; empty at step 0."""
    named: Mapping[int, str] = field(default_factory=dict)
    """The checkpoints passed over, and why."""


@dataclass(frozen=True)
class Act:
    """A life in which every call is disturbed, and where it stands."""

    name: str
    life: Callable[[str], Begun | None]
    """Given the URL of the run."""
    then_to: int
    """The step to which the next life goes."""
    begin_with: Content = field(default_factory=dict)


class Runs(Protocol):
    """Runs of one kind."""

    name: str
    ends_by: tuple[type[Exception], ...]
    """What a life may end by that meets a store that lies."""

    def acts(self) -> list[Act]: ...

    def live(self, url: str, last: int, by: str) -> Begun:
        """Goes on with a run to a step.

        Raises:
            MixedError: It began with bytes that do not belong together.
        """

    def committed(self, content: Content, before: Content) -> dict[int, bool]:
        """The steps of the checkpoints committed, and whether all is there that belongs to them."""

    def complaint(self, url: str, begun: Begun, last: int, by: str) -> str | None:
        """What is wrong with a run that a life has brought to its last step."""

    def complaint_of_rows(self, url: str, begun: Begun, last: int, by: str) -> str | None:
        """What is wrong with its rows of metrics."""


@dataclass(frozen=True)
class Place:
    """Where runs are made.

    Attributes:
        root: The URL of a folder; each run gets one below it.
        can_tear: Whether a killed writer leaves half of an object. An object store shows it whole or not at all: there
            a torn write is one that was not made, and not counted.
        counts_looks: Whether a process is killed also before and after each call that changes nothing. It leaves what
            it would leave before its next change, so that on a slow store these points are left out.
    """

    name: str
    root: str
    can_tear: bool = True
    counts_looks: bool = True


@dataclass
class Tally:
    """What came of points, by what happened there."""

    outcomes: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)
    """Of the bad ones, where and what."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.outcomes + other.outcomes, self.told + other.told)

    @property
    def num_points(self) -> int:
        return self.outcomes.total()

    def count(self, outcome: str) -> int:
        """How many points came to this."""
        return sum(count for (_, came), count in self.outcomes.items() if came == outcome)

    def as_dict(self) -> dict[str, int]:
        return {"points": self.num_points, **{outcome: self.count(outcome) for outcome in (*GOOD, *BAD)}}


def enumerate_act(runs: Runs, act: Act, place: Place) -> Tally:
    """All points of an act."""
    tally, known = Tally(), dict[object, tuple[str, str]]()
    with (
        mock.patch.object(checkpoints, "CONCURRENT_REQUESTS", 1),
        mock.patch.object(documents, "_SECONDS_BETWEEN_READS", 0),
    ):
        for at, call, kind in _points(runs, act, place):
            outcome, why = _try(runs, act, place, Faults(at, kind), known)
            tally.outcomes[kind, outcome] += 1
            if outcome in BAD:
                tally.told.append(f"{act.name}, {kind} call {at}, {call.verb} {call.path}: {outcome}: {why}")
    return tally


def parsed(data: bytes) -> Any:
    """What a JSON object holds; None if it is torn."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def _points(runs: Runs, act: Act, place: Place) -> Iterator[tuple[int, Call, Kind]]:
    undisturbed = Faults()
    _live(runs, act, _lay_out(act, place), undisturbed)
    for at, call in enumerate(undisturbed.calls):
        for kind in KINDS[call.verb]:
            is_a_look = kind in ("before", "after") and not call.has_changed
            has_effect = call.has_worked or kind in ("before", "after")
            if has_effect and (place.counts_looks or not is_a_look) and (place.can_tear or not _tears(call, kind)):
                yield at, call, kind


def _tears(call: Call, kind: Kind) -> bool:
    return kind == "torn" and call.verb != "read"


def _try(runs: Runs, act: Act, place: Place, faults: Faults, known: dict[object, tuple[str, str]]) -> tuple[str, str]:
    """Disturbs a life, and has the next one go on.

    Args:
        known: The outcomes of the kills so far, by what they have left: the same is not tried again.
    """
    url = _lay_out(act, place)
    try:
        _live(runs, act, url, faults)
    except MixedError as error:
        return "accepted", str(error)
    assert faults.fired == 1, "the life was the same up to there"
    if not faults.is_dead:
        return _judge(runs, act, url, faults)
    left = faults.num_changes, _tears(faults.calls[-1], faults.kind)
    if left not in known:
        known[left] = _judge(runs, act, url, faults)
    return known[left]


def _live(runs: Runs, act: Act, url: str, faults: Faults) -> None:
    faults.folder, faults.content = url.rpartition("/")[2], dict(act.begin_with)
    try:
        with crashing(faults):
            act.life(url)
    except Killed:
        assert faults.is_dead
    except runs.ends_by:
        if not faults.fired:
            raise


def _judge(runs: Runs, act: Act, url: str, faults: Faults) -> tuple[str, str]:
    """Goes on with a run that a life has left, and says how that went."""
    committed = runs.committed(faults.content, act.begin_with)
    bad_before = [step for step, is_whole in runs.committed(act.begin_with, act.begin_with).items() if not is_whole]
    newest = max((step for step, is_whole in committed.items() if is_whole), default=0)
    lost = [step for step, is_whole in committed.items() if not is_whole and step not in bad_before]
    if lost and faults.is_dead:
        return "broken", f"step {lost} is committed and not whole"
    has_lost_rows = not faults.is_dead and "/metrics" in faults.calls[faults.at or 0].path
    try:
        begun = runs.live(url, act.then_to, "second")
    except MixedError as error:
        return "accepted", str(error)
    except Exception as error:  # whatever it is, the run does not go on
        return "cannot start", f"{type(error).__name__}: {error}"
    unnamed = [step for step in committed if step > newest and step not in begun.named]
    if begun.step != newest or unnamed:
        return "older", f"began at {begun.step} of {committed}, having named {begun.named}"
    check = runs.complaint if faults.is_dead else runs.complaint_of_rows
    if complaint := check(url, begun, act.then_to, "second"):
        return "rows lost" if has_lost_rows else "unfinished", complaint
    return "fell back" if lost and max(lost) > newest else "resumed", ""


def _lay_out(act: Act, place: Place) -> str:
    """The URL of a new run, which begins with what the act says."""
    if place.root.startswith("memory:"):
        MemoryFileSystem.store.clear()  # it looks through all of it for each listing
    url = f"{place.root}/{uuid.uuid4().hex}"
    store = Store(url)
    with ThreadPoolExecutor(checkpoints.CONCURRENT_REQUESTS) as threads:
        list(threads.map(store.write, act.begin_with, act.begin_with.values()))
    return url
