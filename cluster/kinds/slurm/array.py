"""The tasks of an array in Slurm's queue: which job is that of which request, also before it has its name.

An array is submitted with one name and one comment. Its tasks get those of their jobs right after that, or when they
start. Until then, the comment of the array shows whose it is: it has the submission of the first request.
"""

from collections.abc import Mapping, Sequence

from cluster.kinds.slurm.queue import SUBMISSION, QueuedJob
from cluster.kinds.slurm.script import array_name
from cluster.scheduler import JobRequest

_ARRAY = "array"
"""Key in the metadata of tasks that have no name of their own yet."""


def mark_of(requests: Mapping[int, JobRequest]) -> dict[str, str]:
    """Return the metadata of an array, which each of its tasks has until it gets its own."""
    return {_ARRAY: next(iter(requests.values())).metadata[SUBMISSION]}


def names_of(requests: Mapping[int, JobRequest]) -> list[str]:
    """Return the names that jobs for the requests may have."""
    return [array_name(requests), *(request.id for request in requests.values())]


def tasks_of(jobs: Sequence[QueuedJob], requests: Mapping[int, JobRequest]) -> dict[int, QueuedJob]:
    """Return the jobs for which no others need be submitted, by the numbers of their requests.

    They are those that have the name of a request and have not ended, or have its submission; else the tasks without a
    name in an array that was submitted for these requests, unless they have ended.

    Args:
        jobs: All jobs that have one of ``names_of``, the oldest first.
        requests: The requests.
    """
    name, mark = array_name(requests), mark_of(requests)
    nameless = {
        job.task: job for job in jobs if job.name == name and job.metadata == mark and job.task and not job.has_ended
    }
    found = {}
    for number, request in requests.items():
        named = [job for job in jobs if job.name == request.id and (not job.has_ended or is_for(job, request))]
        alive = [job for job in named if not job.has_ended]
        job = next(iter([*alive, *reversed(named)]), None) or nameless.get(str(number))
        if job is not None:
            found[number] = job
    return found


def is_for(job: QueuedJob, request: JobRequest) -> bool:
    """Return whether a job was submitted for a request."""
    return job.metadata.get(SUBMISSION) == request.metadata[SUBMISSION]
