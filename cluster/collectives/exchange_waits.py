"""How long a worker waits for others in an exchange."""

from collections import deque

import torch

from cluster.process.activity import Activity


class ExchangeWaits:
    """Measures how long a worker waits in an exchange after its own part is done.

    On a CPU the process itself waits, and reports that. A GPU waits behind the process: events on its stream measure
    the time, and are read only once they have happened, so that nobody waits for them.
    """

    def __init__(self, activity: Activity, device: torch.device) -> None:
        self._activity = activity
        self._on_gpu = device.type == "cuda"
        self._began: torch.cuda.Event | None = None
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """Marks that everything this worker contributes is computed or enqueued."""
        if self._on_gpu:
            self._began = _event_on_stream()
        else:
            self._activity.begin_exchange()

    def end(self) -> None:
        """Marks that the other workers' contributions are there, or are waited for on the stream."""
        if not self._on_gpu:
            self._activity.end_exchange()
            return
        assert self._began is not None, "an exchange has begun"
        self._under_way.append((self._began, _event_on_stream()))
        while self._under_way and self._under_way[0][1].query():
            began, ended = self._under_way.popleft()
            self._activity.exchanged(began.elapsed_time(ended) / 1000)


def _event_on_stream() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
