"""The signals that ask for a stop: which count, what they interrupt, and what a child inherits."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster.host.signals import ASKING, ignore_stops, kept_from_children, stop_signals
from launcher.driver.stop_signals import StopSignals

OF_MANY = {signal.SIGINT, *ASKING}


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, *OF_MANY)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_one_that_was_ignored_at_the_start_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a shell's command in the background
    signals = StopSignals()
    with signals.caught():
        signal.raise_signal(signal.SIGHUP)
        assert signals.first is None
        signal.raise_signal(signal.SIGINT)
        assert signals.first == signal.SIGINT
    assert signal.SIGHUP not in stop_signals()


@pytest.mark.parametrize("number", [signal.SIGTERM, *OF_MANY])
def test_one_is_counted_while_a_run_is_driven(number: signal.Signals) -> None:
    signals = StopSignals()
    with signals.caught():
        signal.raise_signal(number)
    assert (signals.first, signals.is_abandoned) == (number, False)


def test_one_that_comes_before_training_interrupts_it() -> None:
    signals = StopSignals()
    signals.interrupting = stop_signals()
    with signals.caught(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGUSR1)
    assert signals.first == signal.SIGUSR1


def test_a_closed_terminal_does_not_interrupt_the_clean_up_and_ctrl_c_does() -> None:
    signals = StopSignals()
    signals.interrupting = stop_signals()
    with signals.caught():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_interrupts_a_store_that_does_not_answer(second: signal.Signals) -> None:
    signals = StopSignals()
    signals.raises_if_abandoned = True
    with signals.caught():
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)


def test_a_closed_terminal_that_tells_it_again_is_ignored_after_the_run() -> None:
    signals = StopSignals()
    with signals.caught():
        signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)
    assert not signals.is_abandoned


@pytest.mark.parametrize("number", ASKING)
def test_one_that_only_asks_does_not_change_how_a_run_has_ended(number: signal.Signals) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    signals = StopSignals()
    with signals.caught():
        pass
    with pytest.raises(KeyboardInterrupt):  # nothing has begun: the command is interrupted
        signal.raise_signal(number)
    with signals.caught():
        signals.has_begun = True
    signal.raise_signal(number)
    signal.signal(number, before)


def test_what_starts_meanwhile_inherits_a_mask() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with kept_from_children():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) >= OF_MANY
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


IN_A_BATCH_JOB = """
import os, signal, subprocess, sys, time
from cluster.host.signals import ignore_stops, kept_from_children

ignore_stops()
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "nobody has blocked it"
with kept_from_children(signal.SIGTERM):
    ignore_stops()
    signal.raise_signal(signal.SIGTERM)  # it comes at once: it is not blocked any more
    program = subprocess.Popen(["sleep", "1000"])
    ready, tell = os.pipe()
    forked = os.fork()
    if not forked:
        os.write(tell, b"1")  # Python forgets a signal that comes while it forks
        for _ in range(6000):  # no pause, which would not end if the signal came just before it
            time.sleep(0.01)
        os._exit(1)
    program.terminate()
    os.read(ready, 1)
    os.kill(forked, signal.SIGTERM)
    print(program.wait(), os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]))
"""


def test_sigterm_of_a_batch_job_ends_no_training_process_and_still_ends_what_that_has_started() -> None:
    """The mask is that of whoever started it; without one, SIGTERM ends it as ever."""
    ended = subprocess.run([sys.executable, "-c", IN_A_BATCH_JOB], capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.stderr) == ("-15 -15\n", "")


def test_a_program_that_a_training_process_starts_may_handle_them() -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_MANY)
    ignore_stops()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & OF_MANY
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number in OF_MANY:
        signal.raise_signal(number)
