"""What an agent tells of the progress and the end of its training process."""

import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cluster.errors import ClusterError, StorageError
from cluster.process import fork_server
from cluster.process.agent import Agent, Channel
from cluster.process.agent_link import AgentLink
from cluster.process.data_messages import DataDelayed
from cluster.process.messages import (
    Beat,
    Exited,
    FromWorker,
    Hello,
    Hung,
    LogNotKept,
    StillHere,
    TimeSpent,
    ToDriver,
)
from cluster.process.orders import Orders, Task
from cluster.process.training_process import standstill_s
from cluster.run.bundle import CodeFile, make_bundle
from cluster.run.run_directory import RunDirectory
from tests.faults.injection import Fault, environment, fired, write_plan
from tests.processes import state, wait_until

R = TypeVar("R")

HANG_TIMEOUT_S = 2.0
FIRST_STEP_S, SECOND_STEP_S = 3.0, 4.0
LONG_S = 6.0
"""A process that says nothing for half of it counts as silent; one that lives speaks every second."""


@dataclass(frozen=True)
class Working:
    """What training processes of these tests say."""

    pid: int
    server: int = 0
    folder: str = ""
    told_folder: str = ""


def send(link: Any, working: Working) -> None:
    """No report of the product's own, which the agent passes on all the same."""
    link.send(working)


def reports_of(messages: Sequence[ToDriver], kind: type[R]) -> list[R]:
    reports: list[Any] = [message.report for message in messages if isinstance(message, FromWorker)]
    return [report for report in reports if isinstance(report, kind)]


def id_of(messages: Sequence[ToDriver]) -> str:
    """Of the agent, which says it first."""
    assert isinstance(messages[0], Hello)
    return messages[0].id


def agent(channel: Channel, task: Task) -> Agent:
    return Agent(channel, task, generation=1, node="a", address="127.0.0.1")


def pid_of_working(connection: Connection) -> int:
    """What the training process says of itself, as an agent passes it on."""
    while True:
        for working in reports_of(connection.recv(), Working):
            return working.pid


class Driver:
    """Orders one attempt, and ends the run when it hears that its process has ended, or whatever is waited for."""

    def __init__(self, until: type = Exited) -> None:
        self._until = until
        self.heard: list[ToDriver] = []
        self._here = threading.Event()
        self._ended = threading.Event()

    def post(self, messages: Sequence[ToDriver]) -> None:
        self.heard += messages
        self._here.set()
        if reports_of(messages, self._until):
            self._ended.set()

    def orders_after(self, version: int) -> Orders:
        if version < 1:
            self._here.wait()
            return Orders(version=1, attempt=0, agents=frozenset({id_of(self.heard)}))
        self._ended.wait()
        return Orders(version=2, end=True)


def resume(link: AgentLink, _: Task) -> None:
    """Goes on at step 7; both of its steps are long about their data."""
    link.activity.mark("restore", 0)
    for step, seconds in ((7, FIRST_STEP_S), (8, SECOND_STEP_S)):
        link.activity.mark("data", step)
        time.sleep(seconds)


def test_the_first_step_of_a_resumed_process_may_take_long(tmp_path: Path) -> None:
    fork_server.start([__name__])
    driver = Driver()
    agent(driver, task_of("resume", tmp_path)).run()

    (hung,) = reports_of(driver.heard, Hung)
    assert (hung.step, hung.doing) == (8, "data")
    told = reports_of(driver.heard, TimeSpent)[0]
    assert told.step == 8
    assert told.spent["data"] > FIRST_STEP_S
    (exited,) = reports_of(driver.heard, Exited)
    assert exited.exit_code == 0, exited.log_tail


def hang_at_a_store(link: AgentLink, _: Task) -> None:
    """Says so of a batch that came in the end, and of the one that never comes."""
    link.activity.mark("data", 7)
    link.send(DataDelayed(reason="s3://bucket: was away"))
    link.activity.mark("forward", 7)
    time.sleep(0.1)
    link.activity.mark("data", 8)
    time.sleep(1.5)  # a heartbeat comes every second
    link.send(DataDelayed(reason="s3://bucket: the call to read a.tar has not returned for 1 s"))
    threading.Event().wait()


def hang_at_its_own_code(link: AgentLink, _: Task) -> None:
    link.activity.mark("data", 7)
    link.send(DataDelayed(reason="s3://bucket: was away"))
    link.activity.mark("forward", 7)
    threading.Event().wait()


@pytest.mark.parametrize(
    ("entry", "delay"),
    [
        ("hang_at_a_store", "s3://bucket: the call to read a.tar has not returned for 1 s"),
        ("hang_at_its_own_code", ""),
    ],
)
def test_a_hang_says_which_store_it_waits_for(tmp_path: Path, entry: str, delay: str) -> None:
    driver = Driver(until=Hung)
    agent(driver, task_of(entry, tmp_path, first_step_timeout_s=LONG_S, hang_timeout_s=LONG_S)).run()

    (hung,) = reports_of(driver.heard, Hung)
    assert hung.data_delay == delay


def hang_at_its_first_batch(link: AgentLink, _: Task) -> None:
    link.activity.mark("data", 7)
    threading.Event().wait()


def test_but_not_for_ever(tmp_path: Path) -> None:
    fork_server.start([__name__])
    driver, limits = Driver(until=Hung), {"first_step_timeout_s": LONG_S, "hang_timeout_s": LONG_S}
    agent(driver, task_of("hang_at_its_first_batch", tmp_path, **limits)).run()

    (hung,) = reports_of(driver.heard, Hung)
    assert (hung.step, hung.doing, hung.is_first_step, hung.is_silent) == (7, "data", True, False)
    assert hung.for_s >= LONG_S
    assert "in hang_at_its_first_batch" in hung.stack


def test_a_process_that_stops_before_its_first_step_is_told_as_silent(tmp_path: Path) -> None:
    fork_server.start([__name__])
    driver = Driver(until=Hung)
    # Long enough for the process to import this module before it stops.
    agent(driver, task_of("stop_for_ever", tmp_path, first_step_timeout_s=2 * LONG_S)).run()

    (hung,) = reports_of(driver.heard, Hung)
    assert (hung.doing, hung.is_first_step, hung.is_silent) == ("start", True, True)
    assert "T (stopped)" in hung.stack


@pytest.mark.parametrize(
    ("beat", "seconds"),
    [
        (Beat("data", 7, True, 2.0, {"start": 3.0, "restore": 90.0, "data": 2.0}), 5.0),
        (Beat("restore", 0, True, 90.0, {"start": 3.0, "restore": 90.0}), 3.0),
        (Beat("data", 8, False, 2.0, {"start": 3.0, "restore": 90.0, "data": 4.0}), 2.0),
        (Beat("storage", 8, False, 90.0, {"start": 3.0, "storage": 90.0}), 0.0),
    ],
    ids=["all until the first step", "but for reading a checkpoint", "then since the last mark", "but for a save"],
)
def test_what_counts_as_a_standstill(beat: Beat, seconds: float) -> None:
    assert standstill_s(beat) == seconds


class LosesIt:
    """Orders one attempt, then one of other agents, and ends the run when nothing more is heard."""

    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[ToDriver] = queue.SimpleQueue()
        self.heard_late: list[ToDriver] = []

    def post(self, messages: Sequence[ToDriver]) -> None:
        for message in messages:
            if not isinstance(message, StillHere):  # an agent that lives on may say so, every few seconds
                self.heard.put(message)

    def orders_after(self, version: int) -> Orders:
        if version < 1:
            return Orders(version=1, attempt=0, agents=frozenset({id_of([self.heard.get()])}))
        if version < 2:
            (working,) = reports_of([self.heard.get()], Working)
            self.process = working.pid
            return Orders(version=2, attempt=1, agents=frozenset({"another"}))
        time.sleep(2.0)
        while not self.heard.empty():
            self.heard_late.append(self.heard.get())
        return Orders(version=3, end=True)


def work(link: AgentLink, _: Task) -> None:
    send(link, Working(os.getpid()))
    threading.Event().wait()


def test_an_agent_that_was_lost_and_lives_on_has_no_part_in_the_attempt_of_others(tmp_path: Path) -> None:
    """Its process would pass for that of the worker that has its rank now."""
    fork_server.start([__name__])
    driver = LosesIt()
    agent(driver, task_of("work", tmp_path)).run()

    assert driver.heard_late == []
    assert state(driver.process) == ""


class GoesDeaf(LosesIt):
    """Orders one attempt; then the way to the agent is gone."""

    def orders_after(self, version: int) -> Orders:
        if version < 1:
            return super().orders_after(version)
        (working,) = reports_of([self.heard.get()], Working)
        self.process = working.pid
        raise ConnectionResetError("the driver is away")


def test_an_agent_that_hears_no_orders_any_more_ends(tmp_path: Path) -> None:
    """Else it would say for ever that it is there, and do nothing that it is told."""
    fork_server.start([__name__])
    driver = GoesDeaf()
    with pytest.raises(ClusterError, match="the driver's orders do not come any more: the driver is away"):
        agent(driver, task_of("work", tmp_path)).run()

    assert state(driver.process) == ""


def stop_for_ever(link: AgentLink, _: Task) -> None:
    send(link, Working(os.getpid()))
    link.close()
    os.kill(os.getpid(), signal.SIGSTOP)


class OnlyHears:
    """Orders one attempt, and passes on what it hears."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._agent: queue.SimpleQueue[str] = queue.SimpleQueue()

    def post(self, messages: Sequence[ToDriver]) -> None:
        if isinstance(messages[0], Hello):
            self._agent.put(messages[0].id)
        self._connection.send(messages)

    def orders_after(self, version: int) -> Orders:
        if version >= 1:
            threading.Event().wait()
        return Orders(version=1, attempt=0, agents=frozenset({self._agent.get()}))


def run_agent(connection: Connection, task: Task) -> None:
    agent(OnlyHears(connection), task).run()


def test_a_stopped_process_dies_with_its_agent(tmp_path: Path) -> None:
    fork_server.start([__name__])
    ours, theirs = multiprocessing.Pipe(duplex=False)
    killed = fork_server.fork(run_agent, (theirs, task_of("stop_for_ever", tmp_path)), "agent")
    theirs.close()
    process = pid_of_working(ours)
    wait_until(lambda: state(process) == "T (stopped)")
    killed.kill()
    killed.join()
    wait_until(lambda: state(process) == "", limit_s=5)


def tell_where_it_works(link: AgentLink, task: Task) -> None:
    send(link, Working(os.getpid(), folder=os.getcwd(), told_folder=task.working_directory))
    link.close()  # it is on its way
    threading.Event().wait()


def task_with_code(tmp_path: Path) -> Task:
    """A task whose code is a bundle, on a host that has a folder by the name of its driver's working directory."""
    made = make_bundle({"data.txt": CodeFile(b"1", False)})
    task = task_of("tell_where_it_works", tmp_path)
    RunDirectory(task.run_url).write_code(made.sha256, made.data)
    return replace(task, code=made.sha256, code_directory=".", working_directory=str(tmp_path))


def folders_of(pid: int | None) -> list[Path]:
    return list(Path(tempfile.gettempdir(), f"launcher-{os.geteuid()}").glob(f"{pid}-*"))


def test_a_process_with_a_bundle_works_in_a_copy_that_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fork_server.start([__name__])
    driver = Driver(until=Working)
    agent(driver, task_with_code(tmp_path)).run()
    (working,) = reports_of(driver.heard, Working)
    assert working.told_folder == working.folder
    assert Path(working.folder).name.partition("-")[0] == str(working.pid)
    assert not Path(working.folder).exists()
    assert folders_of(os.getpid()) == []


def run_agent_in(connection: Connection, task: Task, folder: str) -> None:
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    run_agent(connection, task)


def test_what_a_killed_agent_leaves_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_server.start([__name__])
    task = task_with_code(tmp_path)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    # Of their own, for other tests sweep what the dead have left in the temporary folder.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = fork_server.fork(run_agent_in, (theirs, task, str(tmp_path)), "agent")
    theirs.close()
    process = pid_of_working(ours)
    killed.kill()
    killed.join()
    wait_until(lambda: state(process) == "", limit_s=5)
    assert (len(folders_of(killed.pid)), len(folders_of(process))) == (1, 1), "its log, and its process's directory"
    agent(Driver(until=Working), task).run()
    assert folders_of(killed.pid) == folders_of(process) == []


class TriesAgain:
    """Orders an attempt, another one when the process of the first has ended, and the end when that one works."""

    def __init__(self) -> None:
        self.heard: list[ToDriver] = []
        self._news: queue.SimpleQueue[ToDriver] = queue.SimpleQueue()

    def post(self, messages: Sequence[ToDriver]) -> None:
        self.heard += messages
        for message in messages:
            self._news.put(message)

    def orders_after(self, version: int) -> Orders:
        number = max(version, 0)
        while True:
            news = self._news.get()
            if isinstance(news.report if isinstance(news, FromWorker) else news, (Hello, Exited, Working)[number]):
                break
        agents = frozenset({id_of(self.heard)})
        return Orders(version=number + 1, attempt=number, agents=agents, end=number == 2)


def work_until_killed(link: AgentLink, _: Task) -> None:
    send(link, Working(os.getpid(), server=os.getppid()))
    link.close()  # it is on its way
    link.activity.mark("data", 1)
    threading.Event().wait()


def run_agent_with_faults(connection: Connection, task: Task, plan: Path) -> None:
    os.environ |= environment(plan)
    driver = TriesAgain()
    agent(driver, task).run()
    connection.send(driver.heard)


def keep_server(connection: Connection) -> None:
    fork_server.start([__name__])
    connection.send(fork_server.own_address())
    threading.Event().wait()


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_a_fork_server_that_dies_is_told_and_replaced(tmp_path: Path, whose: str) -> None:
    """Its training process is ended, whose exit code nobody knows, and the next one is forked from another server."""
    fork_server.start([__name__])
    plan = tmp_path / "plan.json"
    write_plan([Fault(kind="kill", doing="data", step=1, victim="fork_server")], plan)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    keeper = fork_server.fork(keep_server, (theirs,), "keeper")
    address = ours.recv()
    task = replace(task_of("work_until_killed", tmp_path), fork_server=address if whose == "another's" else None)
    process = fork_server.fork(run_agent_with_faults, (theirs, task, plan), "agent")
    theirs.close()
    heard = ours.recv()

    assert fired(plan).keys() == {0}
    first, second = reports_of(heard, Working)
    (exited,) = reports_of(heard, Exited)
    assert exited.exit_code is None
    assert first.server != second.server
    assert [state(first.pid), state(first.server)] == ["", ""]
    process.join()
    wait_until(lambda: [state(second.pid), state(second.server)] == ["", ""], limit_s=5)
    keeper.kill()
    keeper.join()


def task_of(entry: str, run_path: Path, **limits: float) -> Task:
    return Task(
        entry=f"{__name__}:{entry}",
        run_url=str(run_path),
        import_paths=(),
        working_directory=".",
        fork_server=fork_server.own_address(),
        **({"hang_timeout_s": HANG_TIMEOUT_S} | limits),
    )


def test_a_log_that_is_not_kept_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    told_once = agent(driver, task_of("stop_for_ever", tmp_path))
    answers: list[StorageError | None] = [StorageError("full"), StorageError("full"), None, StorageError("away")]

    def write_log(_: RunDirectory, attempt: int, rank: int, log: bytes) -> None:
        assert (attempt, rank, log) == (0, 1, b"said")
        if error := answers.pop(0):
            raise error

    monkeypatch.setattr(RunDirectory, "write_log", write_log)
    while answers:
        told_once._write_log(0, 1, b"said")
    assert driver.heard == [LogNotKept(1, "full"), LogNotKept(1, "away")]
