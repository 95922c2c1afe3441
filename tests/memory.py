"""How much memory torch takes on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass
class Memory:
    """Bytes that torch has allocated in a context, beyond what it had before it."""

    peak: int = 0


@contextmanager
def measured_memory() -> Iterator[Memory]:
    """Measures what this thread allocates; torch does not count what others do."""
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
