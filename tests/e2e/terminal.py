"""``python -m tests.e2e.terminal FILE COMMAND ...``: runs a command in a terminal, and closes that once FILE exists.

Copies what the command shows to stdout, and ends with its exit code.
"""

import os
import pty
import select
import sys


def main(closing: str, *command: str) -> int:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], command)
    while not os.path.exists(closing):
        if select.select([terminal], [], [], 0.05)[0]:
            sys.stdout.buffer.write(os.read(terminal, 1 << 16))
            sys.stdout.flush()
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
