"""Background saver: each worker copies its share of the state, threads upload it while training goes on.

The loop waits only for the copy, into a buffer that is reused. The uploaded shares of all workers are not a checkpoint
yet: the driver writes the manifest once it knows every share and has stored the metrics up to that step.

A checkpoint needs the share of every rank, so the ranks decide together which saves to make: they exchange whether each
has written its share of the previous save. All ranks write shares of the same steps, in the same order.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import torch

from cluster.process.agent_link import AgentLink
from cluster.process.messages import SaveSkipped, ShareWritten, Spent
from cluster.run.checkpoints import CONCURRENT_REQUESTS, Checkpoints
from cluster.run.manifest import Manifest, Part, PartKey, Share, divide
from jobs.checkpoint.file_content import memory_of
from jobs.checkpoint.host_buffers import HostBuffers
from jobs.checkpoint.layout import PART_BYTES, STATE_FILES, Layout, lay_out
from jobs.checkpoint.loop_state import LoopState
from jobs.components.build import Components
from jobs.parallel.worker_team import Team

_LONGEST_WAIT_S = 10.0
"""The longest wait for the previous save; all other workers wait for this one meanwhile."""
_POLL_INTERVAL_S = 0.1
COPY_SLACK_BYTES = 2 * PART_BYTES
"""Memory for a copy beyond the share of the state: a few more digits in the JSON of a later one move a part at either
end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Snapshot:
    """A copy of this worker's share of the state at one step, to be written."""

    share: Share
    """The message to the driver, still without its parts."""
    keys: Sequence[PartKey]
    copied: Callable[[], list[memoryview]]
    """Waits for the copy and returns the bytes of each key."""
    release: Callable[[], None]
    """Frees the buffer of the copy for reuse."""
    best_step: int | None
    best_metric: float | None
    spent: Spent


class Saver:
    """Saves this worker's share of the state, one save at a time.

    If the store is slower than the saves are frequent, the loop waits a little for it. If the store does not answer,
    the loop skips saves until it does. A needed save is never skipped: it waits in a queue until every rank has written
    the previous save. No rank writes a queued save, so a newer one replaces it on all ranks or on none. The best
    checkpoint so far is not replaced, because the newer one refers to it. So at most two copies of this worker's share
    are queued, behind the one that is written. Memory for one copy is allocated beside the first steps.

    Collective: every rank constructs it and calls ``save`` and ``start_waiting`` at the same steps.

    Thread: the training loop calls every method but ``_write``, which runs in the "checkpoint" thread.
    """

    def __init__(
        self,
        components: Components,
        state: LoopState,
        checkpoints: Checkpoints,
        link: AgentLink,
        team: Team,
        restored: Manifest | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the threads.

        Args:
            components: What to save.
            state: The loop's state, saved too.
            checkpoints: Where to save.
            link: Carries the reports of written shares to the driver.
            team: The workers.
            restored: The manifest of the checkpoint that was restored, if any; parts unchanged since it are reused.
            clock: Monotonic seconds.
        """
        self._components = components
        self._state = state
        self._checkpoints = checkpoints
        self._link = link
        self._team = team
        self._clock = clock
        self._on_gpu = team.device.type == "cuda"
        self._buffers = HostBuffers(are_locked=self._on_gpu)
        self._num_prepared: int | None = None  # the parameters with moments that the memory was prepared for
        self._previous: dict[PartKey, Part] = {}  # this rank's parts of the save before
        if restored is not None:
            self._previous = {key: restored.part(key) for key in restored.part_keys()}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._requests = ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="upload")
        # These three are of the same steps on every rank.
        self._writing: Future[None] | None = None  # the current save, until every rank has written it
        self._waiting: list[_Snapshot] = []  # the queue behind it
        self._is_skipping = False  # whether a save was skipped, and none has been started in time since

    def save(self, metrics: Mapping[str, float], *, is_needed: bool) -> None:
        """Copies this worker's share of the current state and writes the copy in the background.

        Args:
            metrics: The newest metrics at this step.
            is_needed: If False, skip this save while some rank is still writing the previous one.

        Raises:
            StorageError: An earlier save failed.

        Collective: every rank, at the same steps, with the same ``is_needed``.
        """
        did_wait = bool(self._waiting)
        late_ranks = self._late_ranks(_LONGEST_WAIT_S)
        # A save that started only now, because it was queued, is no reason to skip this one.
        has_just_started = did_wait and not self._waiting
        if late_ranks and not is_needed and not has_just_started:
            self._skip(late_ranks[0])
            return
        if not late_ranks:
            self._is_skipping = False
            self._start(self._take_snapshot(metrics))
            return
        self._drop_superseded()
        self._waiting.append(self._take_snapshot(metrics))

    def start_waiting(self) -> None:
        """Starts the queued save if all ranks have written the one before it; never waits for the store.

        Also allocates memory for the next copy, in the background, whenever the state has grown.

        Called after every step, so that the store idles for one step at most. While the queue is empty, which it is on
        all ranks or on none, nothing is exchanged.

        Raises:
            StorageError: An earlier save failed.
            CheckpointError: The state cannot be saved.

        Collective: every rank, at the same steps.
        """
        num_with_moments = len(self._components.optimizer.state)
        if num_with_moments != self._num_prepared:
            self._num_prepared = num_with_moments
            _, _, places = self._own_parts()
            self._buffers.prepare(len(_whole(places)) + COPY_SLACK_BYTES)
        if self._waiting:
            self._late_ranks(longest_wait_s=0.0)

    def wait(self) -> None:
        """Returns when this rank has written all its shares; exchanges nothing with other ranks. No save may follow.

        Raises:
            StorageError: A save failed.
        """
        while self._writing is not None:
            self._writing.result()
            self._start_next()
        self._buffers.close()

    def _late_ranks(self, longest_wait_s: float) -> list[int]:
        """Returns the ranks that have not written every save that was started; the same on every rank.

        A rank waits for its own writes alone, at most ``longest_wait_s``, and stops waiting once the store has trouble.
        If no rank is late, the queue is empty.

        Collective: every rank.
        """
        give_up_at = self._clock() + longest_wait_s
        while self._writing is not None:
            have_written = self._team.gather_flags(self._has_written(self._writing, give_up_at))
            if not all(have_written):
                return [rank for rank, has_written in enumerate(have_written) if not has_written]
            self._start_next()
        return []

    def _has_written(self, save: Future[None], give_up_at: float) -> bool:
        while not save.done():
            if self._checkpoints.trouble is not None or self._clock() >= give_up_at:
                return False
            wait([save], _POLL_INTERVAL_S)
        save.result()
        return True

    def _start_next(self) -> None:
        """Starts the first queued save, if there is one; the current save is done."""
        self._writing = None
        if self._waiting:
            self._start(self._waiting.pop(0))

    def _drop_superseded(self) -> None:
        """Removes queued saves that a newer one replaces: all but that of the best checkpoint so far."""
        best_step, waiting = self._state.best_step, self._waiting
        self._waiting = [snapshot for snapshot in waiting if snapshot.share.step == best_step]
        for snapshot in waiting:
            if snapshot.share.step != best_step:
                snapshot.release()

    def _start(self, snapshot: _Snapshot) -> None:
        self._writing = self._thread.submit(self._write, snapshot)

    def _skip(self, late_rank: int) -> None:
        """Skips a save. The late rank reports why to the driver, once for all saves skipped in a row."""
        if self._team.rank == late_rank and not self._is_skipping:
            trouble = self._checkpoints.trouble
            why = "is written too slowly" if trouble is None else f"cannot be written: {trouble.reason}"
            reason = f"the one before {why}; more are left out until it is written"
            self._link.send(SaveSkipped(step=self._state.step, reason=reason))
        self._is_skipping = True

    def _take_snapshot(self, metrics: Mapping[str, float]) -> _Snapshot:
        """Starts to copy this worker's share of the current state."""
        layout, keys, places = self._own_parts()
        share = Share(
            step=self._state.step,
            num_parts={name: len(parts) for name, parts in layout.files.items()},
            parts={},
            state_files=[name for name in STATE_FILES if name in layout.files],
            metrics=dict(metrics),
            versions={"torch": str(torch.__version__), "python": platform.python_version()},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        spent = self._link.activity.spent()
        copied, release = self._copy(layout, places)
        return _Snapshot(
            share=share,
            keys=keys,
            copied=copied,
            release=release,
            best_step=self._state.best_step,
            best_metric=self._state.best_metric,
            spent=spent,
        )

    def _own_parts(self) -> tuple[Layout, list[PartKey], list[range]]:
        """Returns the layout of the current state, and the keys and places of the parts that this rank writes."""
        layout = lay_out({**self._components.state(), "progress": asdict(self._state)})
        keys = [(name, number) for name, parts in layout.files.items() for number in range(len(parts))]
        places = [place for parts in layout.files.values() for place in parts]
        own = divide([len(place) for place in places], self._team.world_size)[self._team.rank]
        return layout, keys[own.start : own.stop], places[own.start : own.stop]

    def _copy(
        self, layout: Layout, places: Sequence[range]
    ) -> tuple[Callable[[], list[memoryview]], Callable[[], None]]:
        """Starts to copy ``places``, ranges of the layout that follow each other, into a free buffer.

        Returns:
            A function that waits for the copy and returns the bytes of each place, and one that frees the buffer.
        """
        whole = _whole(places)
        buffer = self._buffers.take(len(whole))
        layout.copy_to(buffer.data, whole)
        copied = torch.cuda.Event() if self._on_gpu else None
        if copied is not None:
            copied.record()

        def wait_for_it() -> list[memoryview]:
            if copied is not None:
                copied.synchronize()
            data = memory_of(buffer.data)
            return [data[place.start - whole.start : place.stop - whole.start] for place in places]

        def release() -> None:
            if copied is not None:
                copied.synchronize()  # a save that was replaced may still be copied
            self._buffers.give_back(buffer)

        return wait_for_it, release

    def _write(self, snapshot: _Snapshot) -> None:
        """Writes the parts of a snapshot and reports them to the driver.

        Thread: the "checkpoint" thread, which writes one save after the other.
        """
        share, began = snapshot.share, self._clock()

        def write(key: PartKey, data: memoryview) -> Part:
            return self._checkpoints.write_part(share.step, key, data, self._previous.get(key))

        try:
            self._previous = dict(zip(snapshot.keys, self._requests.map(write, snapshot.keys, snapshot.copied())))
        finally:
            snapshot.release()
        share = replace(share, parts=self._previous)
        self._link.send(
            ShareWritten(
                share=share,
                seconds=self._clock() - began,
                best_step=snapshot.best_step,
                best_metric=snapshot.best_metric,
                spent=snapshot.spent,
            )
        )


def _whole(places: Sequence[range]) -> range:
    """Returns the range that places make up."""
    return range(places[0].start, places[-1].stop) if places else range(0)
