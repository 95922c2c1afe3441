"""Arms of a benchmark that take turns within the same worker processes.

An arm is a training loop in a thread of its own, which a gate holds up between blocks of steps. What it measures each
worker tells through a pipe.
"""

import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


class Gate:
    """Where the thread of an arm stops between blocks, and reads the clock in each step."""

    def __init__(self, train: "Callable[[Gate], None]") -> None:
        self.step_times: list[float] = []
        self.cpu_time = 0.0
        """Of the newest block, in all threads of the process."""
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._left = 0
        self._over = False
        self._since = self._cpu_since = 0.0
        self._error: Exception | None = None
        threading.Thread(target=self._run, args=(train,), daemon=True).start()

    def run_block(self, steps: int) -> list[float]:
        """Lets the arm go on for some steps; their times."""
        self.step_times, self._left = [], steps
        self._hand_over()
        return self.step_times

    def end(self) -> None:
        """Lets the arm run to its end."""
        self._over = True
        self._hand_over()

    def __call__(self) -> bool:
        """The end of a step; whether the arm is to stop."""
        now = time.perf_counter()
        self.step_times.append(now - self._since)
        self._since = now
        self._left -= 1
        if self._left == 0:
            self.cpu_time = time.process_time() - self._cpu_since
            self._done.release()
            self._wait()
        return self._over

    def _hand_over(self) -> None:
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        self._go.acquire()
        self._cpu_since = time.process_time()
        self._since = time.perf_counter()

    def _run(self, train: "Callable[[Gate], None]") -> None:
        self._wait()
        try:
            train(self)
        except Exception as error:  # the main thread raises it as its own
            self._error = error
        self._done.release()


def side_by_side(
    work: Callable[[int, str, Connection, Connection], None], num_workers: int, num_blocks: int
) -> Iterator[list[Any]]:
    """Runs workers in processes of their own; yields what they tell of each block, by rank.

    Args:
        work: What a worker does, by rank, a folder that all share, the pipe for what it tells, and the one for what
            its loops send.
        num_workers: How many there are.
        num_blocks: How often each of them tells something.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="launcher-benchmark-") as folder:
        workers, pipes = [], []
        messages, their_messages = context.Pipe()
        for rank in range(num_workers):
            results, theirs = context.Pipe(duplex=False)
            workers.append(context.Process(target=work, args=(rank, folder, theirs, their_messages), daemon=True))
            workers[-1].start()
            theirs.close()
            pipes.append(results)
        their_messages.close()
        threading.Thread(target=_drain, args=(messages,), daemon=True).start()
        for _ in range(num_blocks):
            yield [pipe.recv() for pipe in pipes]
        for worker in workers:
            worker.join()


def join_team(rank: int, num_workers: int, folder: str) -> None:
    """Begins the process group of the workers that share a folder."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch.distributed as dist

    store = dist.FileStore(os.path.join(folder, "meeting"), num_workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_workers)


def _drain(messages: Connection) -> None:
    """Reads what the loops send, as an agent would."""
    try:
        while True:
            messages.recv()
    except (EOFError, OSError):
        return


@dataclass(frozen=True, slots=True)
class Quartiles:
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Quartiles":
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} {self.low:{spec}}-{self.high:{spec}}"
