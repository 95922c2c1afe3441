"""Runs Slurm's commands on this machine, or by ssh on a login node, and turns what goes wrong into one line.

Commands that belong together go as one program of bash, because a connection takes about a second. A script goes
through stdin, so that nothing of it is in a list of processes. What a login shell prints by itself is ignored.
"""

import os
import re
import shlex
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from cluster.errors import ClusterError, one_line
from cluster.storage.redaction import redacted

_CONNECT_TIMEOUT_S = 10
_ANSWER_TIMEOUT_S = 90.0
"""A command whose controller does not answer gives up after 9 s, and a login shell can take long."""
_NOT_FOUND = 127
_SSH_FAILED = 255
_FOREIGN = "^(SLURM|SBATCH|SQUEUE|SINFO|SCANCEL|SCONTROL)_"
"""How the variables begin that change what the commands do or print, such as SQUEUE_FORMAT; a job has many, too."""
_KEPT = "SLURM_CONF|SLURM_CONF_SERVER|SLURM_JWT"
"""Those by which the commands find the controller, and what they show to it."""
_NO_ANSWER = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Zero Bytes were transmitted|Transport endpoint is not|"
    r"Connection refused|Connection reset",
    re.I,
)
"""What the commands say if no controller answers them."""
_PREFIX = re.compile(r"^(?:\w+: (?:error|fatal)|slurm_load_\w+(?: error)?): ")
_PROGRAM = re.compile(r"\b(?:sbatch|squeue|scontrol|scancel|sinfo)\b")
_HINT = "Try "
"""How the line of a command begins that names its ``--help``."""
_LONGEST_WORDS = 300
_SSH_PROBLEMS = (
    ("HOST IDENTIFICATION HAS CHANGED", "its host key has changed; look why, then connect once by hand: ssh {login}"),
    ("Host key verification failed", "its host key is not known; connect once by hand: ssh {login}"),
    (
        "Permission denied",
        "ssh is not let in without a password; give the host your key with `ssh-copy-id {login}`, and load a key that "
        "has a passphrase with ssh-add",
    ),
)
"""Words of ssh, and what they mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a command answered.

    Attributes:
        code: Its exit code.
        text: What it wrote to stdout.
        error: What it wrote to stderr.
    """

    code: int
    text: str
    error: str

    @property
    def words(self) -> str:
        """The last line of the error, without the name of the command."""
        lines = [line for line in self.error.splitlines() if line.strip() and not line.startswith(_HINT)]
        if not lines:
            return f"exit code {self.code}"
        return redacted(_PREFIX.sub("", one_line(lines[-1])), {})[:_LONGEST_WORDS]


def query(*command: str) -> tuple[str, ...]:
    """Return a command that prints times in UTC, as ``2026-01-31T12:00:00``."""
    return ("env", "TZ=UTC0", "SLURM_TIME_FORMAT=standard", *command)


class SlurmCommands:
    """Runs commands in the home folder of the user, where Slurm's commands are. The constructor makes no connection.

    Args:
        address: The name of the cluster in errors.
        login: The host, as ssh names it; None: this machine.
    """

    def __init__(self, address: str, login: str | None) -> None:
        self._address = address
        self._login = login

    def ask(self, *commands: Sequence[str], stdin: str = "") -> list[Answer]:
        """Run commands one after the other, whatever their exit codes are, and return their answers.

        Args:
            commands: The command lines.
            stdin: The text that the commands can read.

        Raises:
            ClusterError: The machine cannot be reached or lacks a command, the controller does not answer, or there
                are no answers in time.
        """
        answers = self._run(commands, stdin)
        for command, answer in zip(commands, answers, strict=True):
            if answer.code == _NOT_FOUND:
                raise self._lacks(_name(command))
            if answer.code and _NO_ANSWER.search(answer.error):
                raise ClusterError(
                    f"{self._address}: its controller does not answer {_name(command)}: {answer.words}; try again in "
                    "some minutes, and see `scontrol ping` there"
                )
        return answers

    def refused(self, what: str, answer: Answer) -> ClusterError:
        """Return the error for a request that Slurm refuses.

        Args:
            what: What the cluster does not do, as a predicate.
            answer: The answer, which has Slurm's words.
        """
        return ClusterError(f"{self._address}: {what}: {answer.words}")

    def _run(self, commands: Sequence[Sequence[str]], stdin: str) -> list[Answer]:
        mark = uuid.uuid4().hex
        program = _program(commands, mark)
        # In a file, which is no pipe: a shared connection of ssh may keep its stderr open after its first user.
        with tempfile.TemporaryFile() as errors:
            code, stdout = self._output(program, stdin, errors.fileno())
            errors.seek(0)
            stderr = errors.read().decode(errors="replace")
        said, complained = stdout.decode(errors="replace").split(mark), stderr.split(mark)
        if len(said) != len(commands) + 2 or len(complained) != len(commands) + 2:
            raise self._did_not_run(Answer(code=code, text=stdout.decode(errors="replace"), error=stderr))
        # After each mark: the exit code of the command before it, a line break, and what the command behind it says.
        codes = [int(piece.partition("\n")[0]) for piece in said[2:]]
        texts = [piece.partition("\n")[2] for piece in said[1:-1]]
        lines = [piece.removeprefix("\n") for piece in complained[1:-1]]
        return [Answer(code=code, text=text, error=error) for code, text, error in zip(codes, texts, lines)]

    def _output(self, program: str, stdin: str, stderr: int) -> tuple[int, bytes]:
        """Run a program, within a time limit, and return its exit code and what it writes to stdout."""
        arguments = ["bash", "-c", program]
        if self._login is not None:
            # ssh joins its arguments, and a shell of the other side, which may be no bash, splits them again.
            options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_TIMEOUT_S}"]
            arguments = ["ssh", *options, "--", self._login, "bash", "-lc", shlex.quote(program)]
        try:
            process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
            )
        except FileNotFoundError as error:
            raise ClusterError(f"{self._address}: there is no {arguments[0]} on this machine; install it") from error
        with process:
            try:
                stdout, _ = process.communicate(stdin.encode(), timeout=_ANSWER_TIMEOUT_S)
            except BaseException as error:  # also Ctrl-C: nothing of it stays behind
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise ClusterError(
                    f"{self._address}: does not answer within {_ANSWER_TIMEOUT_S:g} s; try again, or try "
                    f"`{'squeue' if self._login is None else f'ssh {self._login} squeue'}` by hand"
                ) from error
        return process.returncode, stdout

    def _did_not_run(self, answer: Answer) -> ClusterError:
        """Return the error for a program that did not come to its end."""
        if self._login is None or answer.code != _SSH_FAILED:
            return self.refused("cannot run commands there", answer)
        for words, problem in _SSH_PROBLEMS:
            if words in answer.error:
                return ClusterError(f"{self._address}: {problem.format(login=self._login)}")
        return ClusterError(
            f"{self._address}: cannot be reached by ssh: {answer.words}; check cluster.login, and try "
            f"`ssh {self._login}` by hand"
        )

    def _lacks(self, program: str) -> ClusterError:
        if self._login is None:
            return ClusterError(
                f"{self._address}: there is no {program} on this machine; is it a login node of a Slurm cluster? Give "
                "one as cluster.login, such as me@login.uni.edu"
            )
        return ClusterError(
            f"{self._address}: there is no {program} on the PATH of a login shell there; give the login node of a "
            "Slurm cluster as cluster.login"
        )


def _program(commands: Sequence[Sequence[str]], mark: str) -> str:
    """Return one line of bash, without ``!`` and backslashes of its own, which other shells read inside of quotes.

    ``cd``: as by ssh, commands run in the home folder.
    """
    foreign = f"compgen -e | grep -E {shlex.quote(_FOREIGN)} | grep -vxE {shlex.quote(_KEPT)}"
    parts = [f"cd || exit 1; unset $({foreign})", f"echo {mark}", f"echo {mark} >&2"]
    for command in commands:
        parts += [shlex.join(command), f"echo {mark}$?", f"echo {mark} >&2"]
    return "; ".join(parts)


def _name(command: Sequence[str]) -> str:
    """Return the program of Slurm that a command line runs, or else its first word."""
    return next(iter(_PROGRAM.findall(" ".join(command))), command[0])
