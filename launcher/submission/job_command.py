"""The name and the command of a cluster job that drives a run."""

import getpass
import hashlib
import json
import os
import re
import shlex
import socket
from collections.abc import Sequence

from cluster.spec.kinds import JobsClusterSpec
from launcher.config.clusters import PREFIX

_DIGITS = 12
"""Digits of the digest of a run's URL in the names of its jobs."""
_LONGEST_NAME = 40
"""Characters of a run's name in the names of its jobs."""


def make_job_id(run_url: str, number: int) -> str:
    """Return the name of the job that is started for a run for the ``number``-th time, from 0.

    The name depends on the spelling of the URL and on nothing else, so two people who submit a new run at the same time
    each find the other's job.
    """
    name = re.sub("[^A-Za-z0-9_-]", "-", run_url.rstrip("/").rpartition("/")[2])[:_LONGEST_NAME]
    return f"{name}-{hashlib.sha256(run_url.encode()).hexdigest()[:_DIGITS]}-{number}"


def numbered(job_id: str, number: int) -> str:
    """Return the name of a job with its number replaced."""
    return f"{job_id.rpartition('-')[0]}-{number}"


def make_command(
    run_url: str,
    submission_id: str,
    place: JobsClusterSpec,
    *,
    stands_by: bool = False,
    inspects: Sequence[str] | None = None,
) -> str:
    """Return the shell command with which a job takes a submission on a host of its Ray cluster.

    ``RAY_ADDRESS`` is set there. The same command given again resumes the run.

    Args:
        run_url: The run.
        submission_id: The submission to take.
        place: The description of the cluster.
        stands_by: Whether the job is on standby, because the submission is yet to be written.
        inspects: The names of the environment variables that the job checks its nodes for before workers start. None:
            it does not inspect its nodes, because they were inspected when the run was submitted.
    """
    first = " --standby" * stands_by + " --inspect" * (inspects is not None)
    variables = [f"env={json.dumps(list(inspects))}"] if inspects else []
    changes = "".join(f" {shlex.quote(f'{PREFIX}{change}')}" for change in [*variables, *place.driver_overrides()])
    resume = f"exec launcher resume {shlex.quote(run_url)} --submission {submission_id}{first} --json"
    return f'{resume} --cluster "$RAY_ADDRESS"{changes}'


def submitter() -> dict[str, str]:
    """Return ``user`` and ``host`` of this process."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        user = str(os.getuid())
    return {"user": user, "host": socket.gethostname()}
