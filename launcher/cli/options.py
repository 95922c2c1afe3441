"""Options and arguments that several verbs share."""

from typing import Final

import click

JSON_REQUESTED: Final = "launcher.json"
"""The key of ``click.Context.meta`` that holds the value of ``--json``, for errors that leave the verb."""


def _remember_json(ctx: click.Context, _: click.Parameter, as_json: bool) -> bool:
    ctx.meta[JSON_REQUESTED] = as_json
    return as_json


json_option = click.option(
    "--json", "as_json", is_flag=True, is_eager=True, callback=_remember_json, help="Print one JSON document on stdout."
)
cluster_option = click.option(
    "--cluster",
    "cluster_name",
    metavar="CLUSTER",
    help="Where to run: the YAML file of a cluster, a name (~/.config/launcher/clusters/NAME.yaml, or one that is "
    "shipped), or HOST:PORT of a Ray head; else this machine.",
)
jobs_cluster_option = click.option(
    "--cluster",
    "cluster_name",
    metavar="CLUSTER",
    help="Ask this cluster too: the YAML file of one that jobs are submitted to, its name, or http://HOST:8265.",
)
submit_cluster_option = click.option(
    "--cluster",
    "cluster_name",
    metavar="CLUSTER",
    required=True,
    help="Where to submit: the YAML file of a cluster, its name, or http://HOST:8265.",
)
take_over_option = click.option(
    "--take-over", is_flag=True, help="Take the run over from a driver that is alive; that driver ends."
)
wait_option = click.option(
    "--wait", is_flag=True, help="Show the progress of the run until it ends; Ctrl-C ends the display, not the run."
)
job_argument = click.argument("job", metavar="JOB")
run_argument = click.argument("run_url", metavar="RUN")
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
