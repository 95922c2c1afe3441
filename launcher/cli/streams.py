"""The standard streams of the command line, which outlive whoever reads them.

A run goes on for days: the pipe of its output may lose its reader, its terminal may be closed, the disk that takes its
output may fill up. None of that may end or block the run. From its first failed write on, a stream leads to the null
device: for this process, for libraries written in C, and for the processes that are started later.
"""

import errno
import io
import os
import sys
from typing import Any, TextIO

from cluster.errors import StorageError


def make_lasting() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr``, unless somebody has, such as a test."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # it is closed: the next file to be opened must not become the stream of every child
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lasting(1, sys.stdout, raises=True)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting(2, sys.stderr, raises=False)  # nobody is left to be told


def write_out(text: str, end: str = "\n") -> bool:
    """Write to stdout; return whether anybody reads it: False once its pipe or its terminal is closed.

    Raises:
        StorageError: It cannot be written for another reason, such as a full disk.
    """
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except BrokenPipeError:
        return False
    except OSError as error:
        raise StorageError(f"stdout: {error.strerror}: the result is not written; write it elsewhere") from error
    return True


class _LastingFile(io.FileIO):
    """A standard stream that leads to the null device once a write has failed."""

    def __init__(self, number: int, *, raises: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._is_terminal = self.isatty()  # once it is closed, it does not say so
        self._raises = raises

    def write(self, data: Any, /) -> int:
        """Write bytes.

        Raises:
            BrokenPipeError: Nobody reads the stream any more, a pipe or a terminal.
            OSError: The write failed for another reason.
        """
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not self._raises:
                return super().write(data)
            if self._is_terminal and error.errno == errno.EIO:
                raise BrokenPipeError(errno.EPIPE, "the terminal is closed") from error
            raise


def _lasting(number: int, before: TextIO | None, *, raises: bool) -> TextIO:
    """Return a text stream that writes as ``before`` does; None: the stream was closed."""
    file = io.BufferedWriter(_LastingFile(number, raises=raises))
    if before is None:
        return io.TextIOWrapper(file, encoding="utf-8", line_buffering=True)
    return io.TextIOWrapper(file, before.encoding, before.errors, line_buffering=bool(before.line_buffering))
