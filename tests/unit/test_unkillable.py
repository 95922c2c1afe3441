"""The agent of a training process that cannot be killed: a process of the kernel's, which no test can make."""

import os
import queue
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from cluster.process import agent as agent_module
from cluster.process import fork_server, training_process
from cluster.process.agent import Agent
from cluster.process.messages import FromWorker, Hello, StillHere, ToDriver, Unkillable
from cluster.process.orders import Orders, Task


class Process:
    """A process that ignores SIGKILL until ``ends``; it has the id of this one, so that /proc knows it."""

    is_server_lost = False
    exitcode = -9

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.sentinel, self._writer = Pipe(duplex=False)
        self.is_killed = self.has_ended = False

    def is_alive(self) -> bool:
        return not self.has_ended

    def kill_within(self, limit_s: float) -> bool:
        assert 0 < limit_s <= 10
        self.is_killed = True
        return self.has_ended


class Driver:
    """Orders two attempts, the second one at once, and the end when ``is_enough`` says so of what it hears."""

    def __init__(self, hears: Callable[["Driver", ToDriver], bool]) -> None:
        self.heard: list[ToDriver] = []
        self._news: queue.SimpleQueue[ToDriver] = queue.SimpleQueue()
        self._hears = hears

    def post(self, messages: Sequence[ToDriver]) -> None:
        self.heard += messages
        for message in messages:
            self._news.put(message)

    def orders_after(self, version: int) -> Orders:
        if version < 1:
            hello = self._news.get()
            assert isinstance(hello, Hello)
            self._id = hello.id
        elif version == 2:
            while not self._hears(self, self._news.get()):
                pass
            return Orders(version=3, end=True)
        number = max(version, 0)
        return Orders(version=number + 1, attempt=number, agents=frozenset({self._id}))


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    """The processes that were forked; time is short."""
    made = list[Process]()

    def fork(*_: Any) -> Process:
        made.append(Process())
        return made[-1]

    monkeypatch.setattr(fork_server, "fork", fork)
    monkeypatch.setattr(agent_module, "fork_from", lambda *_: None)
    monkeypatch.setattr(agent_module, "HERE_INTERVAL_S", 0.0)
    monkeypatch.setattr(agent_module, "_WATCH_INTERVAL_S", 0.01)
    monkeypatch.setattr(agent_module, "_UNKILLABLE_AFTER_S", 0.05)
    return made


def run_agent(driver: Driver, path: Path, *, on_gpu: bool) -> None:
    task = Task(entry="mine:train", run_url=str(path), import_paths=(), working_directory=".", on_gpu=on_gpu, rank=1)
    Agent(driver, task, generation=4, node="a", address="127.0.0.1").run()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_it_says_that_the_process_does_not_end_and_starts_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: list[Process], on_gpu: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")

    def is_enough(driver: Driver, _: ToDriver) -> bool:
        """A few heartbeats after it has said so."""
        told = [number for number, message in enumerate(driver.heard) if isinstance(message, Unkillable)]
        return bool(told) and len(driver.heard) > told[0] + 5

    driver = Driver(is_enough)
    run_agent(driver, tmp_path, on_gpu=on_gpu)

    (process,) = forked
    assert process.is_killed
    hello, *others = driver.heard
    assert isinstance(hello, Hello)
    assert hello.gpu == ("3" if on_gpu else "")
    (report,) = [message for message in others if not isinstance(message, StillHere)]
    assert isinstance(report, Unkillable)
    assert (report.rank, report.id, report.generation, report.attempt) == (1, hello.id, 4, 0)
    assert (report.pid, report.on_gpu) == (os.getpid(), on_gpu)
    assert report.for_s > 0
    assert report.state.startswith("State:")


def test_it_starts_the_next_one_when_the_process_ends_after_all(tmp_path: Path, forked: list[Process]) -> None:
    def is_enough(_: Driver, message: ToDriver) -> bool:
        if isinstance(message, Unkillable):
            forked[0].has_ended = True
        if len(forked) == 2:
            forked[1].has_ended = True
        return len(forked) == 2

    driver = Driver(is_enough)
    run_agent(driver, tmp_path, on_gpu=True)

    assert len(forked) == 2
    (report,) = [message for message in driver.heard if isinstance(message, Unkillable)]
    assert report.attempt == 0
    attempts = {message.attempt for message in driver.heard if isinstance(message, FromWorker)}
    assert attempts <= {1}, "how a killed process ends is no news"


@pytest.mark.parametrize("tail", ["", "terminate called\n"])
def test_the_last_lines_begin_with_what_the_gpu_said_however_long_ago(
    tmp_path: Path, forked: list[Process], tail: str
) -> None:
    task = Task(entry="mine:train", run_url=str(tmp_path), import_paths=(), working_directory=".")
    child = training_process.TrainingProcess(task)
    kernel = "Loss.cu:245: f: block: [0,0,0], thread: [{},0,0] Assertion `t < n` failed.\n"
    said = "".join([*(kernel.format(number) for number in range(40)), "CUDA error: device-side assert triggered\n"])
    child._log_path.write_text(said + "and so on\n" * 50 + tail)
    lines = child.log_tail().splitlines()
    child.discard_files()

    assert lines[:2] == ["CUDA error: device-side assert triggered", kernel.format(39).rstrip()]
    assert len(lines) == 22
    assert forked
