"""How much memory torch takes on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

from cluster.collectives import exchange
from jobs.parallel import worker_team


@dataclass
class Memory:
    """Bytes that torch has allocated in a context, beyond what it had before it."""

    peak: int = 0
    end: int = 0


@contextmanager
def measured_memory() -> Iterator[Memory]:
    """Measures what this thread allocates and frees; torch counts no other."""
    memory = Memory()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield memory
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    assert results is not None
    total = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            memory.peak = max(memory.peak, total)
    memory.end = total


class _ThisThread:
    """An executor without a thread."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        function(*args)

    def shutdown(self) -> None: ...


def free_in_this_thread() -> None:
    """Lets what workers exchange from now on be allocated and freed where it is measured; with one worker, none waits.

    A thread of gloo may be the last that holds the copy of all weights which DDP sends when it is made.
    """
    exchange.ThreadPoolExecutor = _ThisThread  # type: ignore[assignment, misc]
    worker_team.DistributedDataParallel = partial(  # type: ignore[assignment, misc]
        worker_team.DistributedDataParallel, init_sync=False
    )
