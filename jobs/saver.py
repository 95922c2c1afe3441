"""Saving checkpoints behind the loop's back, every worker its share.

The loop pays for a copy of this worker's share into a buffer that is used again and again; threads hash and upload
it. What all workers have written is no checkpoint yet: the driver writes the manifest, once it has heard of every
share and the metrics up to that step are safe.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any, cast

import torch

from cluster.checkpoints import CONCURRENT_REQUESTS, Checkpoints, Manifest, Part, PartKey, Share, divide
from cluster.link import Link
from jobs.loop import Progress
from jobs.parts import Parts
from jobs.state import STATE_FILES, Layout, lay_out
from jobs.team import Team


class Saver:
    """Saves this worker's share of the state. One save is in flight at a time.

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
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._before: dict[PartKey, Part] = {}
        if restored is not None:
            self._before = {key: restored.part(key) for key in restored.part_keys()}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._requests = ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="upload")
        self._in_flight: Future[None] | None = None

    def save(self, metrics: Mapping[str, float]) -> None:
        """Copies this worker's share of the state of this moment and starts saving it; waits for the save before.

        Raises:
            StorageError: The save before failed.
        """
        self.wait()
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
        copied = self._copy(layout, places[own.start : own.stop])
        self._in_flight = self._thread.submit(self._write, share, keys[own.start : own.stop], copied, told)

    def wait(self) -> None:
        """Returns when nothing is in flight.

        Raises:
            StorageError: The save in flight failed.
        """
        if self._in_flight is not None:
            self._in_flight.result()

    def _copy(self, layout: Layout, places: Sequence[range]) -> Callable[[], list[memoryview]]:
        """Starts copying stretches that lie one after the other; the function returned waits for them."""
        whole = range(places[0].start, places[-1].stop) if places else range(0)
        if self._buffer.numel() < len(whole):
            self._buffer = torch.empty(len(whole), dtype=torch.uint8, pin_memory=self._on_gpu)
        layout.copy_to(self._buffer, whole)
        copied = torch.cuda.Event() if self._on_gpu else None
        if copied is not None:
            copied.record()
        data = memoryview(cast(Any, self._buffer.numpy()))

        def wait() -> list[memoryview]:
            if copied is not None:
                copied.synchronize()
            return [data[place.start - whole.start : place.stop - whole.start] for place in places]

        return wait

    def _write(
        self, share: Share, keys: Sequence[PartKey], copied: Callable[[], list[memoryview]], told: dict[str, Any]
    ) -> None:
        began = time.monotonic()

        def write(key: PartKey, data: memoryview) -> Part:
            return self._checkpoints.write_part(share.step, key, data, self._before.get(key))

        self._before = dict(zip(keys, self._requests.map(write, keys, copied())))
        share = replace(share, parts=self._before)
        self._link.send("share", share=share, seconds=time.monotonic() - began, **told)
