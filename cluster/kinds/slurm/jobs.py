"""A Slurm cluster as a scheduler: submits batch scripts, watches the jobs and stops them, here or from a login node.

A job's id is its name in Slurm. ``cluster/kinds/slurm/script.py`` writes the script, which makes jobs of the same name
run one after the other, and holds the job's metadata as its comment. This module knows Slurm's commands;
``cluster/kinds/slurm/queue.py`` knows what they print about jobs.
"""

import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from urllib.parse import urlencode

from cluster.errors import ClusterError, listed
from cluster.kinds.slurm.array import is_for, mark_of, names_of, tasks_of
from cluster.kinds.slurm.commands import Answer, SlurmCommands, query
from cluster.kinds.slurm.partition import read_partition
from cluster.kinds.slurm.queue import FORMAT, SUBMISSION, WITHDRAWN, QueuedJob, jobs_from
from cluster.kinds.slurm.script import array_name, comment_of, log_path, render, render_array
from cluster.scheduler import ClusterReport, Job, JobRequest, Needs, Scheduler
from cluster.spec.slurm import SlurmClusterSpec

_FOLDER = ".launcher/slurm"
"""In the home folder."""
_SQUEUE = ("squeue", "--noheader", "--all", "--array", "--states=all", f"--Format={FORMAT}")
"""``--array``: a line for each task, also of those that are one job until the first of them changes or starts."""
_SIGNAL_LIMIT_S = 20
"""``scancel`` asks again for 95 s if a job cannot take a signal yet, or no more."""
_YOUNG_S = 10.0
"""Up to this age a job may have missed a signal, because its script had not started; it has nothing to save."""
_MAX_LOG_BYTES = 4 * 2**20


class SlurmJobs(Scheduler):
    """The queue of a Slurm cluster. A job brings its own nodes, so that no job waits on standby."""

    starts_at_once = False

    def __init__(self, spec: SlurmClusterSpec) -> None:
        self._spec = spec
        self._commands = SlurmCommands(spec.address, spec.login)
        self._known_folder = spec.folder

    def inspect(self, needs: Needs) -> ClusterReport:  # noqa: ARG002  # the nodes inspect themselves in the job
        return read_partition(self._commands, self._spec)

    def report(self, job_id: str) -> ClusterReport:
        raise ClusterError(
            f"{self._spec.address}: job {job_id} reports no nodes: a job of Slurm brings its own, and they are "
            "inspected when it starts"
        )

    def begin(self, request: JobRequest) -> Job:
        """Submit a job, unless one of this name waits or runs.

        Of several jobs that were submitted at the same time, the first stays. No second one of this user has started
        meanwhile: those of the same name wait for each other. One of another user may have, and is cancelled.
        """
        folder, known = self._prepare(request.id, request.id)
        alive = _first_alive(known)
        if alive is not None:
            return self._job(alive)
        script = render(self._spec, folder, request)
        submitted, listed = self._commands.ask(("sbatch", "--parsable"), self._squeue(request.id), stdin=script)
        number = self._number(submitted, request.id)
        jobs = self._listed(listed, request.id)
        first = _first_alive(jobs)
        if first is not None and first.number < int(number):
            mark = f"Comment={WITHDRAWN}"  # so that the outcome of the first is not taken for that of this one
            self._commands.ask(("scontrol", "update", f"JobId={number}", mark), ("scancel", number))
            return self._job(first)
        own = next((job for job in jobs if job.number == int(number)), None)
        if own is None:
            raise self._not_listed(request.id, number)
        if not is_for(own, request):
            raise self._changed(request.id, number)
        return self._job(own)

    def begin_array(self, requests: Mapping[int, JobRequest]) -> dict[int, Job]:
        """Submit jobs as the tasks of an array, except those whose name a job has that waits or runs.

        Each task gets the name and the comment of its job at once, so that it is found while it waits; the script gives
        them once more, for an array that a person submits.
        """
        name, names, mark = array_name(requests), names_of(requests), mark_of(requests)
        folder, known = self._prepare(name, *names)
        there = tasks_of(known, requests)
        if due := {number: each for number, each in requests.items() if number not in there}:
            sbatch = ("sbatch", "--parsable", f"--job-name={name}", f"--comment={urlencode(mark)}")
            script = render_array(self._spec, folder, due)
            submitted, answer = self._commands.ask(sbatch, self._squeue(*names), stdin=script)
            array = self._number(submitted, name)
            known = self._listed(answer, *names)
            if not any(job.id.startswith(f"{array}_") for job in known):
                raise self._not_listed(name, array)
            if any(job.name == name and job.id.startswith(f"{array}_") and job.metadata != mark for job in known):
                raise self._changed(name, array)
            there = tasks_of(known, requests)
        if nameless := {number: job for number, job in there.items() if job.name == name}:
            renames = [_rename(job.id, requests[number]) for number, job in nameless.items()]
            *_, answer = self._commands.ask(*renames, self._squeue(*names))  # one that has ended keeps its name
            there = tasks_of(self._listed(answer, *names), requests)
        if lost := [each.id for number, each in requests.items() if number not in there or there[number].name == name]:
            raise ClusterError(f"{self._spec.address}: took {listed(lost)}, and does not list it; look at squeue there")
        return {number: self._job(job) for number, job in there.items()}

    def has_any(self, requests: Mapping[int, JobRequest]) -> bool:
        names, mark = names_of(requests), mark_of(requests)
        (answer,) = self._commands.ask(self._squeue(*names))
        there = tasks_of(self._listed(answer, *names), requests)
        return any(job.metadata == mark or is_for(job, requests[number]) for number, job in there.items())

    def array_script(self, requests: Mapping[int, JobRequest]) -> str:
        """Return the script, and make the folder of the logs.

        Raises:
            ClusterError: As for every method.
        """
        name = array_name(requests)
        return render_array(self._spec, self._prepare(name, name)[0], requests)

    def script(self, request: JobRequest) -> str:
        """Return the script, and make the folder of the job's log, which ``sbatch`` does not make.

        Raises:
            ClusterError: As for every method.
        """
        return render(self._spec, self._prepare(request.id, request.id)[0], request)

    def read(self, job_id: str) -> Job | None:
        jobs = self._named(job_id)
        job = _first_alive(jobs) or (jobs[-1] if jobs else None)
        return None if job is None else self._job(job)

    def jobs(self) -> list[Job]:
        # Of a queue with thousands of jobs, only ours travel.
        pattern = f"/{SUBMISSION}=/s/ *$//p"
        filtered = f"{shlex.join(_SQUEUE)} | sed -n {shlex.quote(pattern)}"
        (answer,) = self._commands.ask(query("bash", "-o", "pipefail", "-c", filtered))
        return [self._job(job) for job in self._listed(answer) if job.is_ours]

    def stop(self, job_id: str) -> None:
        """End what waits, and send SIGTERM to the script of what runs, and to nothing else of it.

        The script then lets the driver save. First Slurm is told to requeue the job no more: a script that is about
        to requeue itself ignores SIGTERM.
        """
        alive = [job for job in self._named(job_id) if not job.has_ended]
        if not alive:
            return
        commands = [command for job in alive for command in _stop_commands(job)]
        *answers, listed = self._commands.ask(*commands, self._squeue(job_id))
        # What is COMPLETING ends; if it was to start again, the first scancel has put an end to that.
        left = [job for job in self._listed(listed, job_id) if not job.has_ended and job.state != "COMPLETING"]
        refused = [answer for answer, command in zip(answers, commands) if answer.code and "scancel" in command]
        missed = [job for job in left if job.used_s < _YOUNG_S]
        if missed:
            again = self._commands.ask(*(("scancel", job.id) for job in missed))
            refused = [answer for answer in again if answer.code]
        if refused and left:
            raise self._commands.refused(f"does not stop job {job_id}", refused[0])

    def log(self, job_id: str) -> str:
        """Return what a job has written, without its beginning if that is longer than 4 MB.

        Raises:
            ClusterError: As for every method; or there is no log, and no job that has yet to write it.
        """
        path = log_path(self._relative_folder, job_id)
        (answer,) = self._commands.ask(("tail", "-c", str(_MAX_LOG_BYTES), path))
        if not answer.code:
            return answer.text
        if _first_alive(self._named(job_id)) is not None:
            return ""
        raise self._commands.refused(f"does not give the log of job {job_id}", answer)

    def _number(self, submitted: Answer, job_id: str) -> str:
        """Return Slurm's number of a job that was submitted.

        Raises:
            ClusterError: Slurm has refused it, or the answer has no number.
        """
        if submitted.code:
            raise self._commands.refused(f"does not take job {job_id}", submitted)
        number = submitted.text.strip().rpartition("\n")[2].partition(";")[0]  # a cluster's name may follow
        if not number.isdecimal():
            raise ClusterError(
                f"{self._spec.address}: took job {job_id}, and sbatch --parsable printed {submitted.text[:100]!r} "
                "in place of a number; look at squeue there"
            )
        return number

    @property
    def _relative_folder(self) -> str:
        """The folder of the jobs' logs, for commands, which run in the home folder."""
        return self._spec.folder or _FOLDER

    def _changed(self, job_id: str, number: str) -> ClusterError:
        """Cancel a job that has another comment than it was submitted with; return the error."""
        self._commands.ask(("scancel", number))
        return ClusterError(
            f"{self._spec.address}: changes the comment of job {job_id}, by which launcher knows it, so the job is "
            "cancelled; ask the administrators not to change --comment, or use another cluster"
        )

    def _not_listed(self, job_id: str, number: str) -> ClusterError:
        """Cancel a job that is not found by the name that it was submitted with; return the error."""
        self._commands.ask(("scancel", number))
        return ClusterError(
            f"{self._spec.address}: took job {job_id} as {number}, and does not list it by that name, so the job is "
            "cancelled; submit it again, or ask the administrators not to change --job-name"
        )

    def _prepare(self, job_id: str, *names: str) -> tuple[str, list[QueuedJob]]:
        """Make the folder for a job's log; return the folder of all logs, and the jobs of these names, oldest first."""
        folder = str(PurePosixPath(log_path(self._relative_folder, job_id)).parent)
        home, made, listed = self._commands.ask(
            ("printenv", "HOME"), ("mkdir", "-p", "-m", "700", "--", folder), self._squeue(*names)
        )
        if made.code:
            raise self._commands.refused(f"cannot make the folder {folder}, see cluster.folder", made)
        return self._spec.folder or f"{home.text.strip()}/{_FOLDER}", self._listed(listed, *names)

    @staticmethod
    def _squeue(*names: str) -> tuple[str, ...]:
        return query(*_SQUEUE, f"--name={','.join(names)}")

    def _named(self, job_id: str) -> list[QueuedJob]:
        """Return the jobs of a name, the oldest first."""
        (answer,) = self._commands.ask(self._squeue(job_id))
        return self._listed(answer, job_id)

    def _listed(self, answer: Answer, *names: str) -> list[QueuedJob]:
        """Return the jobs in an answer of squeue, the oldest first; those of some names, if any are given."""
        if answer.code:
            raise self._commands.refused("does not say which jobs there are", answer)
        try:
            return [job for job in jobs_from(answer.text) if not names or job.name in names]
        except ValueError as error:
            raise ClusterError(f"{self._spec.address}: {error}; use a version of launcher for its Slurm") from error

    def _job(self, job: QueuedJob) -> Job:
        try:
            return job.as_job()
        except ValueError as error:
            raise ClusterError(f"{self._spec.address}: {error}; use a version of launcher for its Slurm") from error


def _first_alive(jobs: list[QueuedJob]) -> QueuedJob | None:
    """Return the oldest job that has not ended, for which the others of its name wait."""
    return next((job for job in jobs if not job.has_ended), None)


def _rename(task: str, request: JobRequest) -> tuple[str, ...]:
    return ("scontrol", "update", f"JobId={task}", f"JobName={request.id}", f"Comment={comment_of(request)}")


def _stop_commands(job: QueuedJob) -> list[tuple[str, ...]]:
    """Return the commands that stop a job, whatever state it is in when they arrive."""
    commands: list[tuple[str, ...]] = [
        ("scontrol", "update", f"JobId={job.id}", "Requeue=0"),
        ("scancel", "--state=PENDING", job.id),  # also a job that has just requeued itself, and is COMPLETING
    ]
    if job.state in ("CONFIGURING", "SUSPENDED"):  # a signal waits until its nodes are there
        return [*commands, ("scancel", job.id)]
    signal = ("scancel", "--batch", "--signal=TERM", "--state=RUNNING", job.id)
    return [*commands, ("timeout", str(_SIGNAL_LIMIT_S), *signal)]
