"""The ``launcher`` command: its verbs, and the border at which errors become exit codes.

With ``--json``, stdout holds exactly one JSON document, and everything else is on stderr. Each verb imports Ray and
wandb itself, so that ``launcher --help`` and ``launcher list`` need neither. Only ``export`` imports torch here; for
the other verbs, processes import it that are forked from a server.
"""

import contextlib
import signal
from typing import Any

import click

from cluster.errors import DescriptionError, Interrupted, LauncherError, Requeued, StorageError
from cluster.host.batch_job import EndsEarly, interruption
from cluster.host.signals import ASKING, stop_signals
from launcher.cli import inspecting, python_path, reading, running
from launcher.cli.options import JSON_REQUESTED
from launcher.cli.output import show
from launcher.cli.streams import make_lasting


class _ErrorBorder(click.Group):
    """Turns every ``LauncherError`` of a verb into its one-line text and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        make_lasting()
        _interrupt_on_signals()
        try:
            if python_path.problem:
                ctx.meta[JSON_REQUESTED] = "--json" in ctx.args  # no verb has read it yet
                raise DescriptionError(python_path.problem)
            try:
                return super().invoke(ctx)
            except EndsEarly:
                raise Requeued("its batch job ends early; its scheduler starts the same command again") from None
            except KeyboardInterrupt:
                raise Interrupted("interrupted") from None
        except LauncherError as error:
            click.echo(f"error: {error}", err=True)
            if error.traceback:
                click.echo(error.traceback, err=True)
            if ctx.meta.get(JSON_REQUESTED):
                # It is the command that was interrupted; whether the run has stopped, only its document says.
                status = {Interrupted: "interrupted", Requeued: "requeued"}.get(type(error), "failed")
                with contextlib.suppress(StorageError):  # the verb's own error decides the exit code
                    show({"status": status, **(error.document or {}), "error": str(error)}, "", as_json=True)
            ctx.exit(error.exit_code)


def _interrupt_on_signals() -> None:
    """Have every signal that asks for a stop do what Ctrl-C does."""

    def interrupt(number: int, _: object) -> None:
        for asking in ASKING:  # a closed terminal tells it more than once, which must not interrupt the clean-up
            signal.signal(asking, signal.SIG_IGN)
        raise interruption(number)

    for number in stop_signals():
        if number != signal.SIGINT:
            signal.signal(number, interrupt)


@click.group(cls=_ErrorBorder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="launcher")
def main() -> None:
    """Describe a training run once; run it on any number of workers, stop it, resume it, read it from its store."""


for verb in (
    running.run, running.resume, running.plan, running.submit, running.render,
    inspecting.data,
    reading.status, reading.stop, reading.list_runs, reading.checkpoints, reading.logs, reading.plot, reading.export,
    reading.schema,
):  # fmt: skip
    main.add_command(verb)
