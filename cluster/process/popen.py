"""The parent's handle of a process that a fork server forked."""

import os
import signal
import sys
from contextlib import suppress
from multiprocessing import popen_forkserver
from multiprocessing.connection import wait
from multiprocessing.forkserver import read_signed

LAST_WAIT_S = 10.0
"""Time limit for the end of a process that was killed, and that nothing depends on."""


class Popen(popen_forkserver.Popen):
    """The parent's handle of a process whose exit code the server reports.

    If the server dies, the standard library invents the exit code 255, which a process may also end with, and leaves
    the process running. This class marks the process as lost and kills it.
    """

    is_server_lost = False

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None and wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            try:
                self.returncode = read_signed(self.sentinel)
            except EOFError:
                self.is_server_lost = True
                _kill_orphan(self.pid)
                self.returncode = -signal.SIGKILL
        return self.returncode


def _kill_orphan(pid: int) -> None:
    """Kill a process that a dead server left, and wait for its end, because it holds its GPU until then.

    The wait has a limit: a process that hangs in the kernel, for example in a device driver, may end much later.
    """
    with suppress(OSError):  # it has ended; or Linux is older than 5.3 and cannot wait for it
        os.kill(pid, signal.SIGKILL)
        if sys.platform == "linux":
            process = os.pidfd_open(pid)
            wait([process], LAST_WAIT_S)
            os.close(process)
