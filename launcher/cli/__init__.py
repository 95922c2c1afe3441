"""The command line: verbs, their options, exit codes."""

from launcher.cli.python_path import check_python_path

check_python_path()

from launcher.cli.group import main  # noqa: E402  # what it imports may have been hidden

__all__ = ["main"]
