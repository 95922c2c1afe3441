"""Saving checkpoints behind the loop's back, every worker its share.

The loop pays for a copy of this worker's share into a buffer that is used again and again; threads hash and upload
it. What all workers have written is no checkpoint yet: the driver writes the manifest, once it has heard of every
share and the metrics up to that step are safe.

A checkpoint needs the share of every rank, so the ranks decide together which saves are made: they exchange whether
each has written its share of the save before. All ranks write the shares of the same steps, in the same order.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import torch
from torch import Tensor

from cluster.process.agent_link import AgentLink
from cluster.process.messages import SaveSkipped, ShareWritten, Spent
from cluster.run.checkpoints import CONCURRENT_REQUESTS, Checkpoints
from cluster.run.manifest import Manifest, Part, PartKey, Share, divide
from jobs.build.components import Components
from jobs.checkpoint.layout import STATE_FILES, Layout, lay_out, memory_of
from jobs.checkpoint.loop_state import LoopState
from jobs.parallel.worker_team import Team

_LONGEST_WAIT_S = 10.0
"""How long a step waits for the save before: others wait for this worker meanwhile."""
_LOOK_INTERVAL_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Snapshot:
    """A copy of this worker's share of the state of one step, to be written."""

    share: Share
    """Without its parts."""
    keys: Sequence[PartKey]
    copied: Callable[[], list[memoryview]]
    """Waits for the copy, and gives the bytes of each key."""
    give_back: Callable[[], None]
    """Called when the copy is needed no more."""
    best_step: int | None
    best_metric: float | None
    spent: Spent


class Saver:
    """Saves this worker's share of the state. One save is written at a time.

    A store that is slower than the saves are frequent holds the loop back a little; one that does not answer does not:
    saves are left out until it does. One that is needed is never left out: it waits until every rank has written the
    save before. While it waits no rank writes it, so a newer one replaces it on all ranks or on none. Only the best so
    far is not replaced, for the newer one names it as such: at most these two wait, each a copy of this worker's share.

    Collective: every rank has one and calls ``save`` and ``tend`` at the same steps.
    """

    def __init__(
        self,
        parts: Components,
        progress: LoopState,
        checkpoints: Checkpoints,
        link: AgentLink,
        team: Team,
        restored: Manifest | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``restored``: of the checkpoint that the state is of; what has not changed since is not written again."""
        self._parts = parts
        self._progress = progress
        self._checkpoints = checkpoints
        self._link = link
        self._team = team
        self._clock = clock
        self._on_gpu = team.device.type == "cuda"
        self._buffers: list[Tensor] = []  # those that no save is written from
        self._before: dict[PartKey, Part] = {}
        if restored is not None:
            self._before = {key: restored.part(key) for key in restored.part_keys()}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._requests = ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="upload")
        # Of the same steps on every rank: what is written until all have written it, and what comes after it, in order.
        self._writing: Future[None] | None = None
        self._waiting: list[_Snapshot] = []
        self._leaves_out = False  # one was left out, and none has been begun in time since; the same on every rank

    def save(self, metrics: Mapping[str, float], *, is_needed: bool) -> None:
        """Copies this worker's share of the state of this moment, and has it written.

        Collective: every rank, at the same steps, with the same ``is_needed``.

        Args:
            metrics: The newest at this step.
            is_needed: If False, skip this save while some rank is still writing the save before.

        Raises:
            StorageError: An earlier save failed.
        """
        did_wait = bool(self._waiting)
        late_ranks = self._late_ranks(_LONGEST_WAIT_S)
        # One that is late because it had to wait is no reason to leave this one out.
        has_just_begun = did_wait and not self._waiting
        if late_ranks and not is_needed and not has_just_begun:
            self._leave_out(late_ranks[0])
            return
        if not late_ranks:
            self._leaves_out = False
            self._begin(self._snapshot(metrics))
            return
        self._make_way()
        self._waiting.append(self._snapshot(metrics))

    def tend(self) -> None:
        """Begins the save that waits, if all ranks have written the one before; never waits for the store.

        Called after every step, so that the store is idle for no more than one. While nothing waits, which is so on
        every rank or on none, it asks nobody and costs nothing.

        Collective: every rank, at the same steps.

        Raises:
            StorageError: An earlier save failed.
        """
        if self._waiting:
            self._late_ranks(longest_wait_s=0.0)

    def wait(self) -> None:
        """Returns when everything is written that this rank has to write; asks no other rank.

        Raises:
            StorageError: A save failed.
        """
        while self._writing is not None:
            self._writing.result()
            self._begin_next()

    def _late_ranks(self, longest_wait_s: float) -> list[int]:
        """The ranks that have not written all that was begun, after a little wait; the same on every rank.

        If there are none, nothing waits any more. A rank waits for its own store alone, and stops waiting if that is
        in trouble.
        """
        give_up_at = self._clock() + longest_wait_s
        while self._writing is not None:
            have_written = self._team.gather_flags(self._has_written(self._writing, give_up_at))
            if not all(have_written):
                return [rank for rank, has_written in enumerate(have_written) if not has_written]
            self._begin_next()
        return []

    def _has_written(self, save: Future[None], give_up_at: float) -> bool:
        while not save.done():
            if self._checkpoints.trouble is not None or self._clock() >= give_up_at:
                return False
            wait([save], _LOOK_INTERVAL_S)
        save.result()
        return True

    def _begin_next(self) -> None:
        """Begins what waits, if something does; what was written before is done with."""
        self._writing = None
        if self._waiting:
            self._begin(self._waiting.pop(0))

    def _make_way(self) -> None:
        """Gives up what waits for a newer one to take its place, but for the best so far."""
        best_step, waiting = self._progress.best_step, self._waiting
        self._waiting = [snapshot for snapshot in waiting if snapshot.share.step == best_step]
        for snapshot in waiting:
            if snapshot.share.step != best_step:
                snapshot.give_back()

    def _begin(self, snapshot: _Snapshot) -> None:
        self._writing = self._thread.submit(self._write, snapshot)
        self._writing.add_done_callback(lambda _: snapshot.give_back())

    def _leave_out(self, late_rank: int) -> None:
        """The late rank tells the driver why saves are left out; once, until one is begun in time again."""
        if self._team.rank == late_rank and not self._leaves_out:
            trouble = self._checkpoints.trouble
            why = "is written too slowly" if trouble is None else f"cannot be written: {trouble.reason}"
            reason = f"the one before {why}; more are left out until it is written"
            self._link.send(SaveSkipped(step=self._progress.step, reason=reason))
        self._leaves_out = True

    def _snapshot(self, metrics: Mapping[str, float]) -> _Snapshot:
        """Starts a copy of this worker's share of the state of this moment."""
        layout = lay_out({**self._parts.state(), "progress": asdict(self._progress)})
        keys = [(name, number) for name, parts in layout.files.items() for number in range(len(parts))]
        places = [place for parts in layout.files.values() for place in parts]
        own = divide([len(place) for place in places], self._team.world_size)[self._team.rank]
        share = Share(
            step=self._progress.step,
            num_parts={name: len(parts) for name, parts in layout.files.items()},
            parts={},
            state_files=[name for name in STATE_FILES if name in layout.files],
            metrics=dict(metrics),
            versions={"torch": str(torch.__version__), "python": platform.python_version()},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        spent = self._link.activity.spent()
        copied, give_back = self._copy(layout, places[own.start : own.stop])
        return _Snapshot(
            share=share,
            keys=keys[own.start : own.stop],
            copied=copied,
            give_back=give_back,
            best_step=self._progress.best_step,
            best_metric=self._progress.best_metric,
            spent=spent,
        )

    def _copy(
        self, layout: Layout, places: Sequence[range]
    ) -> tuple[Callable[[], list[memoryview]], Callable[[], None]]:
        """Starts copying stretches that lie one after the other.

        Returns:
            A function that waits for the copies and gives them, and one to be called when they are needed no more.
        """
        whole = range(places[0].start, places[-1].stop) if places else range(0)
        buffer = self._buffers.pop() if self._buffers else torch.empty(0, dtype=torch.uint8)
        if buffer.numel() < len(whole):
            buffer = torch.empty(len(whole), dtype=torch.uint8, pin_memory=self._on_gpu)
        layout.copy_to(buffer, whole)
        copied = torch.cuda.Event() if self._on_gpu else None
        if copied is not None:
            copied.record()
        data = memory_of(buffer)

        def wait_for_it() -> list[memoryview]:
            if copied is not None:
                copied.synchronize()
            return [data[place.start - whole.start : place.stop - whole.start] for place in places]

        return wait_for_it, lambda: self._buffers.append(buffer)

    def _write(self, snapshot: _Snapshot) -> None:
        """Thread: the one of checkpoints, which writes one save after the other."""
        share, began = snapshot.share, self._clock()

        def write(key: PartKey, data: memoryview) -> Part:
            return self._checkpoints.write_part(share.step, key, data, self._before.get(key))

        self._before = dict(zip(snapshot.keys, self._requests.map(write, snapshot.keys, snapshot.copied())))
        share = replace(share, parts=self._before)
        self._link.send(
            ShareWritten(
                share=share,
                seconds=self._clock() - began,
                best_step=snapshot.best_step,
                best_metric=snapshot.best_metric,
                spent=snapshot.spent,
            )
        )
