"""The Jobs API of a Ray cluster: commands that run on one of its hosts, begun and watched from anywhere.

This speaks the HTTP interface that Ray documents, and needs no Ray. Ray's own client waits without limit, takes its
address from RAY_ADDRESS if that is set, lets ~/.netrc replace the token, and needs packages that a laptop may lack.

Source: Ray Jobs REST API, docs.ray.io, as of Ray 2.60; the names are the same in 2.55.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import requests

from cluster.errors import ClusterError, one_line

JobStatus = Literal["pending", "running", "succeeded", "failed", "stopped"]
ENDED: tuple[JobStatus, ...] = ("succeeded", "failed", "stopped")

_CONNECT_S = 10.0
_ANSWER_S = 30.0
"""The head starts an agent of its own for the first job of a session, which takes seconds."""
_TOKEN_ADVICE = "give the cluster's token in RAY_AUTH_TOKEN, or in the file that RAY_AUTH_TOKEN_PATH names"
_STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the cluster says of a command.

    Attributes:
        id: What it was begun as.
        status: Where it is in its life.
        message: Why, as Ray says it, in a line.
        exit_code: Of the command; none while it runs, and if it did not get as far as that.
        began_at: Unix time; none: not yet.
    """

    id: str
    status: JobStatus
    message: str
    exit_code: int | None
    began_at: float | None


class _Refused(Exception):  # noqa: N818  # an answer, which callers tell apart
    """The cluster answers, and says no."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


class _Bearer(requests.auth.AuthBase):
    """Sends a token, if there is one. A request without an ``auth`` of its own takes what ~/.netrc has for the host."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class RayJobs:
    """The Jobs API at one address. To make one costs nothing and reaches nobody; each call is one request or a few."""

    def __init__(self, url: str) -> None:
        """``url``: such as ``http://HEAD:8265``. The token is looked for when a call is made, and kept nowhere."""
        self._url = url.rstrip("/")

    def ray_version(self) -> str:
        """Of the cluster.

        Raises:
            ClusterError: Nobody answers there, it is no Ray cluster, or it does not let this process in.
        """
        try:
            version = self._ask("GET", "/api/version")
        except _Refused as refused:
            raise self._no_jobs_api(f"answers {refused.status}") from refused
        if not isinstance(version, dict) or "ray_version" not in version:
            raise self._no_jobs_api("answers with something else")
        return str(version["ray_version"])

    def begin(
        self, job_id: str, command: str, environment: Mapping[str, str], *, save_s: int, metadata: Mapping[str, str]
    ) -> bool:
        """Begins a command on the cluster's head, unless one was begun as this before; returns whether it was not.

        The cluster decides, so that of many that ask at once one has it. After an answer that was lost, ask again.

        Args:
            job_id: Of letters, digits, ``-`` and ``_``; never used again while the cluster is up.
            command: A line for the shell.
            environment: Variables of the command and of all that it starts; no secrets, for everyone can read them.
            save_s: Seconds that the command has to end in order when it is stopped.
            metadata: For people who look at the cluster.

        Raises:
            ClusterError: It was not begun.
        """
        variables = {**environment, _STOP_WAIT_VARIABLE: str(save_s)}
        # Ray replaces what looks like a variable.
        unsafe = [name for name, value in variables.items() if "$" in value]
        if unsafe:
            raise ClusterError(f"{self._url}: the value of {unsafe[0]} holds a '$', which Ray would replace")
        request = {
            "submission_id": job_id,
            "entrypoint": command,
            "runtime_env": {"env_vars": variables},
            "metadata": dict(metadata),
        }
        try:
            self._ask("POST", "/api/jobs/", request)
        except _Refused as refused:
            if self.read(job_id) is not None:  # Ray says so in words of its own
                return False
            raise self._failed("does not begin a job", refused) from refused
        return True

    def read(self, job_id: str) -> Job | None:
        """How a job is; none: this cluster knows of none, or knows no more.

        Raises:
            ClusterError: The cluster does not say.
        """
        try:
            return _job(self._ask("GET", f"/api/jobs/{quote(job_id, safe='')}"))
        except _Refused as refused:
            if refused.status == requests.codes.not_found:
                return None
            raise self._failed(f"does not say how job {job_id} is", refused) from refused

    def jobs(self) -> list[Job]:
        """The jobs that were begun by whomever, the oldest first.

        Raises:
            ClusterError: The cluster does not say.
        """
        try:
            told = self._ask("GET", "/api/jobs/")
        except _Refused as refused:
            raise self._failed("does not say which jobs there are", refused) from refused
        jobs = [_job(each) for each in told if each.get("submission_id")]
        return sorted(jobs, key=lambda job: job.began_at or 0.0)

    def stop(self, job_id: str) -> None:
        """Has a job stopped, by SIGTERM, and SIGKILL after the seconds it was begun with; does not wait for that.

        Raises:
            ClusterError: The cluster does not do it.
        """
        try:
            self._ask("POST", f"/api/jobs/{quote(job_id, safe='')}/stop")
        except _Refused as refused:
            raise self._failed(f"does not stop job {job_id}", refused) from refused

    def log(self, job_id: str) -> str:
        """What a job has written to stdout and stderr so far; it lies on its host, and is lost with that.

        Raises:
            ClusterError: The cluster does not say.
        """
        try:
            told = self._ask("GET", f"/api/jobs/{quote(job_id, safe='')}/logs")
        except _Refused as refused:
            raise self._failed(f"does not give the log of job {job_id}", refused) from refused
        return str(told.get("logs") or "")

    def _ask(self, method: str, path: str, content: Any = None) -> Any:
        """One request; what the cluster answers.

        Raises:
            ClusterError: Nobody answers, it is no Ray cluster, or it does not let this process in.
            _Refused: It says no.
        """
        token = _token()
        try:
            answer = requests.request(
                method, self._url + path, json=content, auth=_Bearer(token), timeout=(_CONNECT_S, _ANSWER_S)
            )
        except requests.RequestException as error:
            raise ClusterError(
                f"{self._url}: nobody answers there: {_innermost(error)}; is the cluster up, started with "
                "--dashboard-host, and the address that of its Jobs API?"
            ) from error
        if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
            what = "does not take this token" if token else "asks for a token"
            raise ClusterError(f"{self._url}: {what}; {_TOKEN_ADVICE}")
        if answer.status_code != requests.codes.ok:
            raise _Refused(answer.status_code, answer.text)
        try:
            return answer.json()
        except requests.JSONDecodeError as error:
            raise self._no_jobs_api("answers with something else") from error

    def _no_jobs_api(self, what: str) -> ClusterError:
        return ClusterError(
            f"{self._url}: {what}, and not as the Jobs API does; give the address of Ray's dashboard, port 8265 unless "
            "told otherwise, on a head that has ray[default]"
        )

    def _failed(self, what: str, refused: _Refused) -> ClusterError:
        lines = [line.strip() for line in str(refused).splitlines() if line.strip()]
        return ClusterError(f"{self._url}: {what}: {lines[-1][:300] if lines else refused.status}; see its dashboard")


def _token() -> str | None:
    """The cluster's token, from where Ray's own tools take it; none: there is none here.

    Raises:
        ClusterError: The file that is named cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray/auth_token"
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        if named is None:
            return None
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH={named}: is not there; {_TOKEN_ADVICE}") from None
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}; {_TOKEN_ADVICE}") from error


def _job(told: Mapping[str, Any]) -> Job:
    status: JobStatus = told["status"].lower()
    began_ms = told.get("start_time")
    return Job(
        id=told["submission_id"],
        status=status,
        message=" ".join((told.get("message") or "").split()),
        exit_code=told.get("driver_exit_code"),
        began_at=None if began_ms is None else began_ms / 1000,
    )


def _innermost(error: BaseException) -> str:
    """What went wrong below the layers of libraries."""
    while True:
        inner = error.__cause__ or error.__context__
        if inner is None:
            return one_line(error)
        error = inner
