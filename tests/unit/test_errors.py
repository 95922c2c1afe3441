"""Every error of ours is known at the other side of every border between processes, whatever class it has."""

import multiprocessing
from typing import Any

import pytest
from ray import cloudpickle

from cluster import errors
from cluster.errors import ClusterError, Interrupted, LauncherError, StorageError, class_in_tree, one_line
from cluster.process.messages import Exited, Failed
from cluster.process.training_process import _failure_report
from cluster.ray.remote_call import _located
from jobs.spec import MaxFailuresSpec
from jobs.training.failure_causes import to_launcher_error
from launcher.driver.failures import Failures
from launcher.driver.verdicts import GiveUp
from tests.errors import all_kinds, error_of, facts

SURROGATE = "caf\udce9.yaml"


class _OddError(StorageError):
    """An error that only one process knows, with arguments and facts of its own."""

    def __init__(self, url: str, *, tries: int) -> None:
        super().__init__(f"{url}: no answer, tried {tries} times")
        self.lock = open  # noqa: SIM115
        self.made_by = lambda: url


class _OddestError(_OddError):
    pass


class _MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def through_a_pipe(message: Any) -> Any:
    """Returns what another process receives from an agent, a fork server or a training process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender:
        sender.send(message)
        return receiver.recv()


def through_ray(message: Any) -> Any:
    """Returns what another process receives from an actor."""
    return cloudpickle.loads(cloudpickle.dumps(message))


def verdict_of(report: Failed) -> GiveUp:
    """Returns what the driver makes of a report that one worker sends twice."""
    failures = Failures(MaxFailuresSpec(machine=0, code=0, preemption=0))
    failures.attempt_started(1)
    failures.failed(0, through_a_pipe(report))
    failures.exited(0, Exited(exit_code=1, oom_kill=False, step=7, log_tail=""))
    verdict = failures.verdict(0.0)
    assert isinstance(verdict, GiveUp)
    return verdict


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert set(errors._TREE) == {each for each in all_kinds() if each.__module__ == errors.__name__}


def test_every_error_is_known_at_the_other_side() -> None:
    kinds = all_kinds()
    assert len(kinds) >= 12
    for kind in kinds:
        error = error_of(kind)
        for received in (through_a_pipe(error), through_ray(error)):
            assert type(received) in errors._TREE
            assert isinstance(error, type(received))
            assert facts(received) == facts(error)


def test_every_error_of_a_training_process_ends_the_run_as_what_it_is() -> None:
    for kind in all_kinds():
        report = _failure_report(error_of(kind))
        failure = verdict_of(report).failure
        assert failure.error is class_in_tree(error_of(kind))
        assert failure.error.exit_code == kind.exit_code
        assert failure.message == "job.yaml: no"
        assert failure.error("words", traceback="").exit_code == kind.exit_code


def test_every_error_of_a_call_on_a_node_names_the_node() -> None:
    for kind in all_kinds():
        located = _located(through_ray(error_of(kind)), "10.0.0.2")
        assert isinstance(located, LauncherError)
        assert located.node == "10.0.0.2"
        assert str(located) == str(through_ray(located)) == "node 10.0.0.2: job.yaml: no"


def test_an_error_may_hold_what_cannot_be_pickled() -> None:
    try:
        try:
            raise _MuteError(open)
        except _MuteError as mute:
            raise _OddestError("s3://bucket", tries=3) from mute
    except _OddestError as raised:
        error = raised
    received = through_a_pipe(error)

    assert type(received) is StorageError
    assert facts(received) == ("s3://bucket: no answer, tried 3 times", "", "storage", None, "", 4)
    assert verdict_of(_failure_report(error)).failure.error is StorageError


@pytest.mark.parametrize("kind", [Interrupted, ClusterError])
def test_a_text_that_is_not_utf_8_can_be_stored(kind: type[LauncherError]) -> None:
    report = _failure_report(error_of(kind, f"{SURROGATE}: no"))

    assert verdict_of(report).failure.message.encode() == b"caf\\udce9.yaml: no"


def test_an_exception_of_the_users_has_a_text_that_can_be_stored_and_shown() -> None:
    for error, message in (
        (ValueError("x" * 10**7), "ValueError: " + "x" * errors.MAX_CHARACTERS),
        (ValueError(f"cannot read {SURROGATE}"), "ValueError: cannot read caf\\udce9.yaml"),
        (_MuteError(), "_MuteError: its text cannot be read"),
        (ValueError("line\n" * 10**5), "ValueError: line"),
    ):
        try:
            raise error
        except Exception as raised:
            ours = to_launcher_error(raised, step=4)
        assert str(ours) == message
        assert ours.cause == "code"
        assert len(ours.traceback) < 10_000
        (str(ours) + ours.traceback).encode()
        assert len(one_line(error)) <= errors.MAX_CHARACTERS
