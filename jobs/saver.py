"""Saving checkpoints behind the loop's back, every worker its share.

The loop pays for a copy of this worker's share into a buffer that is used again and again; threads hash and upload
it. What all workers have written is no checkpoint yet: the driver writes the manifest, once it has heard of every
share and the metrics up to that step are safe.
"""

import platform
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from cluster.checkpoints import CONCURRENT_REQUESTS, Checkpoints, Manifest, Part, PartKey, Share, divide
from cluster.link import Link
from jobs.loop import Progress
from jobs.parts import Parts
from jobs.state import STATE_FILES, Layout, lay_out, memory_of
from jobs.team import Team

_LONGEST_WAIT_S = 10.0
"""How long a step waits for the save before: others wait for this worker meanwhile."""
_LOOK_INTERVAL_S = 0.1


class Saver:
    """Saves this worker's share of the state. One save is written at a time.

    A store that is slower than the saves are frequent holds the loop back a little; one that does not answer does not:
    saves are left out until it does, and one that has to be waits beside the one that is being written.

    Collective: every rank has one and saves at the same steps.
    """

    def __init__(
        self,
        parts: Parts,
        progress: Progress,
        checkpoints: Checkpoints,
        link: Link,
        team: Team,
        restored: Manifest | None,
    ) -> None:
        """``restored``: of the checkpoint that the state is of; what has not changed since is not written again."""
        self._parts = parts
        self._progress = progress
        self._checkpoints = checkpoints
        self._link = link
        self._rank = team.rank
        self._world_size = team.world_size
        self._on_gpu = team.device.type == "cuda"
        self._buffers: list[Tensor] = []  # those that no save is written from
        self._before: dict[PartKey, Part] = {}
        if restored is not None:
            self._before = {key: restored.part(key) for key in restored.part_keys()}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._requests = ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="upload")
        self._pending: deque[Future[None]] = deque()  # the one being written, and one that waits at most
        self._leaves_out = False

    def save(self, metrics: Mapping[str, float], *, is_needed: bool) -> None:
        """Copies this worker's share of the state of this moment, and has it written.

        Args:
            metrics: The newest at this step.
            is_needed: Else it is left out if the save before is not written in time.

        Raises:
            StorageError: An earlier save failed.
        """
        if not self._has_room() and not is_needed:
            return
        if len(self._pending) > 1 and self._pending[-1].cancel():
            self._pending.pop()  # this one is newer
        layout = lay_out({**self._parts.state(), "progress": asdict(self._progress)})
        keys = [(name, number) for name, parts in layout.files.items() for number in range(len(parts))]
        places = [place for parts in layout.files.values() for place in parts]
        own = divide([len(place) for place in places], self._world_size)[self._rank]
        share = Share(
            step=self._progress.step,
            num_parts={name: len(parts) for name, parts in layout.files.items()},
            parts={},
            state_files=[name for name in STATE_FILES if name in layout.files],
            metrics=dict(metrics),
            versions={"torch": str(torch.__version__), "python": platform.python_version()},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        told = {
            "best_metric": self._progress.best_metric,
            "best_step": self._progress.best_step,
            "spent": self._link.activity.spent(),
        }
        copied, give_back = self._copy(layout, places[own.start : own.stop])
        save = self._thread.submit(self._write, share, keys[own.start : own.stop], copied, told)
        save.add_done_callback(lambda _: give_back())
        self._pending.append(save)

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
            StorageError: A save failed.
        """
        while self._pending:
            self._pending.popleft().result()

    def _has_room(self) -> bool:
        """Waits a little for the save before; whether it is written."""
        give_up_at = time.monotonic() + _LONGEST_WAIT_S
        while self._pending:
            wait([self._pending[0]], _LOOK_INTERVAL_S)
            if self._pending[0].done():
                self._pending.popleft().result()
                continue
            trouble = self._checkpoints.trouble
            if trouble is not None or time.monotonic() > give_up_at:
                why = "is written too slowly" if trouble is None else f"cannot be written: {trouble.reason}"
                self._leave_out(f"the one before {why}; more are left out until it is written")
                return False
        self._leaves_out = False
        return True

    def _leave_out(self, reason: str) -> None:
        """Says once why there is no checkpoint; the others have the same trouble, or wait for this worker's share."""
        if not self._leaves_out and self._rank == 0:
            self._link.send("event", event="checkpoint_left_out", step=self._progress.step, reason=reason)
        self._leaves_out = True

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

    def _write(
        self, share: Share, keys: Sequence[PartKey], copied: Callable[[], list[memoryview]], told: dict[str, Any]
    ) -> None:
        began = time.monotonic()

        def write(key: PartKey, data: memoryview) -> Part:
            return self._checkpoints.write_part(share.step, key, data, self._before.get(key))

        self._before = dict(zip(keys, self._requests.map(write, keys, copied())))
        share = replace(share, parts=self._before)
        self._link.send("share", share=share, seconds=time.monotonic() - began, **told)
