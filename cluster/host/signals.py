"""Signals that ask a program to stop, and how to keep them from the processes that it starts.

Most of them reach more than one process. A terminal sends SIGINT for Ctrl-C and SIGHUP when it closes to its whole
foreground process group; a batch scheduler such as Slurm sends SIGUSR1 or SIGUSR2, as the job asks, to every process of
the job, some time before its time limit. Only the driver acts on them: it still needs all others to save.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

ABANDONING: Final = (signal.SIGINT, signal.SIGTERM)
"""A person or a scheduler sends one of these on purpose; a second one means that saving takes too long."""
ASKING: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""These only ask for a stop, however often they come: a closed terminal sends more than one SIGHUP."""
_OF_MANY: Final = (signal.SIGINT, *ASKING)
"""The ones that reach all processes of a run. SIGTERM is not among them: it is how Ray ends its own processes."""


def stop_signals() -> list[signal.Signals]:
    """Return the signals on which this process should stop.

    One that was ignored when the process started, as SIGHUP is under ``nohup``, stays ignored; but not SIGINT, because
    a shell without job control ignores it for every command in the background.
    """
    return [*ABANDONING, *(number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN)]


@contextmanager
def kept_from_children(*also: signal.Signals) -> Iterator[None]:
    """Have the processes that start in this context, and theirs, not receive the signals that reach many, nor ``also``.

    They inherit the calling thread's mask. This process receives what arrives meanwhile at the end, if not before.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [*_OF_MANY, *also])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def ignore_stops() -> None:
    """Ignore the signals that reach many processes, and no longer block them.

    Unlike a mask, this leaves programs that the process starts free to handle them.
    """
    for number in _OF_MANY:
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_MANY):
        # A scheduler sends it to all processes of a batch job, and whoever started this one has blocked it for that.
        owner = os.getpid()
        signal.signal(signal.SIGTERM, lambda *_: None if os.getpid() == owner else _end_by_sigterm())
        obey_sigterm()


def obey_sigterm() -> None:
    """No longer block SIGTERM, so that programs that this process starts can be ended with it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _end_by_sigterm() -> None:
    """End a process that was forked from one that ignores SIGTERM, as the signal does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
