"""The ``launcher`` command: its verbs, and the border at which errors become exit codes.

With ``--json``, stdout holds exactly one JSON document, and everything else is on stderr. Each verb imports torch, Ray
and wandb itself, so that ``launcher --help`` and ``launcher list`` need none of them.
"""

import signal
from typing import Any

import click

from cluster.errors import DescriptionError, Interrupted, LauncherError
from launcher.cli import python_path, reading, running
from launcher.cli.options import JSON_REQUESTED
from launcher.cli.output import show


class _ErrorBorder(click.Group):
    """Turns every ``LauncherError`` of a verb into its one-line text and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # clusters send SIGTERM where a person presses Ctrl-C
        try:
            if python_path.problem:
                ctx.meta[JSON_REQUESTED] = "--json" in ctx.args  # no verb has read it yet
                raise DescriptionError(python_path.problem)
            return super().invoke(ctx)
        except LauncherError as error:
            click.echo(f"error: {error}", err=True)
            if error.traceback:
                click.echo(error.traceback, err=True)
            if ctx.meta.get(JSON_REQUESTED):
                show({"status": "failed", **(error.document or {}), "error": str(error)}, "", as_json=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted before training began", err=True)
            ctx.exit(Interrupted.exit_code)


@click.group(cls=_ErrorBorder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="launcher")
def main() -> None:
    """Describe a training run once; run it on any number of workers, stop it, resume it, read it from its store."""


for verb in (
    running.run, running.resume, running.plan, running.submit,
    reading.status, reading.stop, reading.list_runs, reading.checkpoints, reading.logs, reading.plot, reading.export,
    reading.schema,
):  # fmt: skip
    main.add_command(verb)
