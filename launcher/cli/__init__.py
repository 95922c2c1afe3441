"""The command line: verbs, their options, exit codes."""

from launcher.cli.group import main

__all__ = ["main"]
