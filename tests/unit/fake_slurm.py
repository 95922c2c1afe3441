"""Slurm's commands and ssh as programs on the PATH that record how they are called and answer what a test has planned.

A plan for ``squeue`` is a list of answers: the first call gets the first, and the last is for all later calls.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.kinds.slurm.queue import FORMAT

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sinfo")
TOOLS = (
    "bash",
    "sh",
    "env",
    "grep",
    "mkdir",
    "printenv",
    "tail",
    "sed",
    "timeout",
    "cat",
    "dirname",
    "basename",
    "sleep",
)
_FAKE = """\
#!/bin/sh
home=$(dirname "$0")/..
name=$(basename "$0")
number=$(($(cat "$home/$name.calls" 2>/dev/null || echo 0) + 1))
echo $number > "$home/$name.calls"
(printf '%s' "$name"; printf ' %s' "$@"; echo) >> "$home/calls"
env > "$home/$name.env"
[ $name = sbatch ] && cat > "$home/script"
answer=$home/$name.answers/$number
[ -d "$answer" ] || answer=$home/$name.answers/last
cat "$answer/text"
cat "$answer/error" >&2
if [ -e "$answer/waits" ]; then echo $$ > "$home/waiting"; exec sleep 1000; fi
exit $(cat "$answer/code")
"""
_SSH = """\
#!/bin/sh
home=$(dirname "$0")/..
(printf '%s' "$0"; printf ' <%s>' "$@"; echo) >> "$home/ssh.calls"
if [ -e "$home/ssh.error" ]; then cat "$home/ssh.error" >&2; exit 255; fi
while [ "$1" != -- ]; do shift; done
shift 2
exec sh -c "$*"
"""


class FakeSlurm:
    """Slurm's commands, all of which succeed and print nothing until they are given answers.

    Attributes:
        folder: Has the records.
        home: The home folder of the user.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.bin, tools = folder / "bin", folder / "tools"
        for each in (self.home, self.bin, tools):
            each.mkdir(parents=True)
        for name in TOOLS:
            path = shutil.which(name)
            assert path is not None
            (tools / name).symlink_to(path)
        for name in COMMANDS:
            self._write(self.bin / name, _FAKE)
            self.plan(name, "")
        self._write(self.bin / "ssh", _SSH)
        self._path = f"{self.bin}{os.pathsep}{tools}"
        # What a login shell prints is none of the answers, and its PATH is that of its profile.
        (self.home / ".bash_profile").write_text(f"echo Welcome; echo Notice >&2; export PATH={self._path}\n")
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.setenv("PATH", self._path)

    def plan(self, command: str, *texts: str, error: str = "", code: int = 0, waits: bool = False) -> None:
        """Makes a command print these texts, one at each call, and then exit with a code, or wait."""
        answers = self.folder / f"{command}.answers"
        shutil.rmtree(answers, ignore_errors=True)
        (self.folder / f"{command}.calls").unlink(missing_ok=True)
        for number, text in enumerate(texts, start=1):
            answer = answers / ("last" if number == len(texts) else str(number))
            answer.mkdir(parents=True)
            (answer / "text").write_text(text)
            (answer / "error").write_text(error)
            (answer / "code").write_text(str(code))
            if waits:
                (answer / "waits").touch()

    def fail_ssh(self, error: str) -> None:
        """Makes ssh say this and fail."""
        (self.folder / "ssh.error").write_text(error)

    def remove(self, command: str) -> None:
        """Uninstalls a command."""
        (self.bin / command).unlink()

    @property
    def calls(self) -> list[str]:
        """The command lines that were run, without those of this machine's tools."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def ssh_calls(self) -> list[str]:
        """The connections."""
        path = self.folder / "ssh.calls"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, command: str) -> dict[str, str]:
        """The environment of the last call of a command."""
        return dict(line.partition("=")[::2] for line in (self.folder / f"{command}.env").read_text().splitlines())

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)


def a_line(**fields: object) -> str:
    """A line of squeue about a running job, with other values of some fields."""
    values: Mapping[str, object] = {
        "JobID": 7, "JobArrayID": fields.get("JobID", 7), "State": "RUNNING", "Reason": "None",
        "StartTime": "2026-01-31T12:00:00", "exit_code": 0, "RestartCnt": 0, "TimeUsed": "1:00:00", "NodeList": "n1",
        "Name": "digits-0", "Comment": "(null)", **fields,
    }  # fmt: skip
    widths = dict(each.split(":") for each in FORMAT.split(","))
    assert values.keys() == widths.keys()
    return "".join(f"{str(values[name]):<{width}.{width}}" for name, width in widths.items()) + "\n"
