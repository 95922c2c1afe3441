"""The Jobs API of a head, as Ray's own answers: what is asked of it, and every way in which it does not answer."""

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.capacity import Capacity, Node
from cluster.errors import ClusterError
from cluster.inspection.nodes import NEEDS_VARIABLE, needs_from_text, report_to_text
from cluster.kinds import jobs_http, ray_jobs
from cluster.kinds.ray_jobs import RayJobs
from cluster.ray.inspection import COMMAND
from cluster.scheduler import ClusterReport, Job, JobRequest, Needs, Scheduler

TOKEN = "a" * 64


class Head:
    """Stands for the head of a cluster with a token, and remembers what was begun.

    Attributes:
        jobs: What was begun, by id.
        says: An answer in place of its own, status and text.
        location: The ``Location`` of its answers, if it is not empty.
        outcome: How a job is as soon as it is begun: status, exit code and log.
        asked: The requests it was sent, method and path.
        port: On 127.0.0.1.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.says: tuple[int, str] | None = None
        self.location = ""
        self.outcome: tuple[str, int | None, str] = ("RUNNING", None, "")
        self.asked: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        head = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(*head._answer(self.headers, "GET", self.path, b""))

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(*head._answer(self.headers, "POST", self.path, content))

            def _answer(self, status: int, content: Any) -> None:
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                if head.location:
                    self.send_header("Location", head.location)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_DELETE(self) -> None:
                self._answer(*head._answer(self.headers, "DELETE", self.path, b""))

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Iterator["Head"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _answer(self, headers: Any, method: str, path: str, content: bytes) -> tuple[int, Any]:
        path = path.removeprefix("http://cluster.invalid:8265")  # as a proxy is asked
        self.asked.append((method, path))
        if self.says is not None:
            return self.says
        told = headers.get("Authorization")
        if told is None:
            return 401, "Unauthorized: Missing authentication token"
        if told != f"Bearer {TOKEN}":
            return 403, "Forbidden: Invalid authentication token"
        if path == "/api/version":
            return 200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "0", "session_name": "session"}
        if path == "/api/jobs/":
            return self._begin(json.loads(content)) if method == "POST" else (200, list(self.jobs.values()))
        job_id, _, what = path.removeprefix("/api/jobs/").partition("/")
        if job_id not in self.jobs:
            return 404, f"Job {job_id} not found"
        if method == "DELETE":
            del self.jobs[job_id]
            return 200, {"deleted": True}
        if what == "stop":
            self.jobs[job_id]["status"] = "STOPPED"
            return 200, {"stopped": True}
        return 200, {"logs": self.outcome[2] or f"said by {job_id}\n"} if what == "logs" else self.jobs[job_id]

    def _begin(self, request: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            if request["submission_id"] in self.jobs:
                return 500, "Traceback ...\nValueError: it is there already\n"
            self.jobs[request["submission_id"]] = {
                "type": "SUBMISSION", "status": self.outcome[0], "message": "Job is\ncurrently running.",
                "start_time": 1700000000500 + len(self.jobs), "driver_exit_code": self.outcome[1], **request,
            }  # fmt: skip
        return 200, {"job_id": request["submission_id"], "submission_id": request["submission_id"]}


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Head]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setattr(ray_jobs, "_PATIENCE_S", 0.0)
    with Head().running() as running:
        yield running


def begin(jobs: RayJobs, job_id: str = "one", run: str = "s3://b/r", **environment: str) -> Job:
    return jobs.begin(
        JobRequest(
            id=job_id, command="launcher resume s3://b/r", environment=environment, stop_grace_s=60,
            metadata={"run": run},
        )
    )  # fmt: skip


def test_the_life_of_a_job(head: Head) -> None:
    jobs = RayJobs(f"{head.url}/")
    assert jobs.ray_version() == "2.60.0"
    assert jobs.read("one") is None
    begun = begin(jobs, A="b")
    assert head.jobs["one"]["entrypoint"] == "launcher resume s3://b/r"
    stop = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert head.jobs["one"]["runtime_env"] == {"env_vars": {"A": "b", **stop}}
    assert head.jobs["one"]["metadata"] == {"run": "s3://b/r"}
    running = jobs.read("one")
    assert running == begun
    assert (running.id, running.status, running.exit_code) == ("one", "running", None)
    assert (running.message, running.began_at) == ("Job is currently running.", 1700000000.5)
    assert running.metadata == {"run": "s3://b/r"}
    assert jobs.log("one") == "said by one\n"
    jobs.stop("one")
    stopped = jobs.read("one")
    assert stopped is not None
    assert stopped.status == "stopped"
    begin(jobs, "two")
    assert [job.id for job in jobs.jobs()] == ["one", "two"]


def test_a_command_finds_what_is_in_the_venv_first(head: Head) -> None:
    begin(RayJobs(head.url, "/opt/my env"))
    assert head.jobs["one"]["entrypoint"] == "export PATH='/opt/my env'/bin:\"$PATH\"; launcher resume s3://b/r"
    shell = subprocess.run(
        ["sh", "-c", RayJobs("http://h:1", "/opt/$(x) env")._with_path('echo "$PATH"')],
        env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shell.stdout == "/opt/$(x) env/bin:/usr/bin:/bin\n"


NEEDS = Needs(store="s3://b/$x", variables=("KEY",), check="check")
CLUSTER = ClusterReport(
    capacity=Capacity(
        nodes=(Node(id="a1", address="10.0.0.1", resources={"CPU": 8.0}, free={}, drains_at=None, is_here=True),),
        limits=None,
    ),
    nodes=(),
    silent=("10.0.0.1",),
)


@pytest.mark.parametrize("venv", [None, "/opt/venv"])
def test_an_inspection(head: Head, venv: str | None) -> None:
    head.outcome = "SUCCEEDED", 0, f"Running entrypoint for job ...\nINFO\n{report_to_text(CLUSTER)}"
    assert RayJobs(head.url, venv).inspect(NEEDS) == CLUSTER
    (first,) = head.jobs
    head.jobs[first]["start_time"] -= 1000 * ray_jobs._INSPECTION_KEPT_S + 1000
    assert RayJobs(head.url, venv).inspect(NEEDS) == CLUSTER
    (second,) = head.jobs
    assert first != second, "nobody wants to see many in a list"


def test_an_inspection_of_somebody_else_at_the_same_time_keeps_its_log(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.outcome = "SUCCEEDED", 0, report_to_text(CLUSTER)
    others: list[ClusterReport] = []
    report = RayJobs.report

    def report_while_another_inspects(jobs: RayJobs, job_id: str) -> ClusterReport:
        monkeypatch.setattr(RayJobs, "report", report)
        found = jobs.report(job_id)
        others.append(RayJobs(head.url).inspect(NEEDS))
        return found

    monkeypatch.setattr(RayJobs, "report", report_while_another_inspects)
    assert [RayJobs(head.url).inspect(NEEDS), *others] == [CLUSTER, CLUSTER]
    assert len(head.jobs) == 2


def test_a_report_that_a_request_fails_for_is_asked_for_again(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    head.outcome = "RUNNING", None, report_to_text(CLUSTER)
    monkeypatch.setattr(ray_jobs, "_PATIENCE_S", 600.0)
    monkeypatch.setattr(ray_jobs, "_POLL_INTERVAL_S", 0.0)
    jobs, log, fails = RayJobs(head.url), RayJobs.log, ["reset", "away"]
    begin(jobs)

    def log_at_last(jobs: RayJobs, job_id: str) -> str:
        if fails:
            raise ClusterError(fails.pop())
        return log(jobs, job_id)

    monkeypatch.setattr(RayJobs, "log", log_at_last)
    assert jobs.report("one") == CLUSTER
    assert not fails


def test_a_report_of_a_job_that_is_gone(head: Head) -> None:
    with pytest.raises(ClusterError, match="knows no more of job one, which was begun there; try again$"):
        RayJobs(head.url).report("one")


def test_what_an_inspection_runs(head: Head) -> None:
    head.outcome = "FAILED", 1, ""
    with pytest.raises(ClusterError):
        RayJobs(head.url).inspect(NEEDS)
    (job,) = head.jobs.values()
    assert job["entrypoint"].endswith("exec python -P -m cluster.ray.inspection")
    assert job["submission_id"].startswith("launcher-inspect-")
    variables = dict(job["runtime_env"]["env_vars"])
    assert needs_from_text(variables.pop(NEEDS_VARIABLE)) == NEEDS
    assert variables == {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "1"}
    assert TOKEN not in json.dumps(job)


def test_the_shell_says_that_there_is_no_launcher(tmp_path: Path) -> None:
    for name, code in (("launcher", 127), ("python", 7)):
        ended = subprocess.run(["/bin/sh", "-c", COMMAND], env={"PATH": str(tmp_path)}, capture_output=True)
        assert ended.returncode == 127
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    ended = subprocess.run(["/bin/sh", "-c", COMMAND], env={"PATH": str(tmp_path)}, capture_output=True)
    assert (ended.returncode, ended.stdout) == (7, b"-P -m cluster.ray.inspection\n")


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (
            ("FAILED", 127, "sh: 1: exec: python: not found\n"),
            "there is no launcher, or no python, in the PATH of Ray on its head; install launcher there, or give the "
            "folder that it is in as venv of the cluster's description",
        ),
        (
            ("FAILED", 1, "x\n/usr/bin/python: No module named cluster.ray.inspection\n"),
            "python on its head does not have this launcher: /usr/bin/python: No module named cluster.ray.inspection; "
            "install the same version of launcher there, or give the folder that it is in as venv of the cluster's "
            "description",
        ),
        (
            ("FAILED", 1, "Traceback ...\n  File\nKeyError: 'x'\n\n"),
            "job JOB, which inspects the nodes, ended with exit code 1: KeyError: 'x'; its log on the dashboard has "
            "more",
        ),
        (
            ("FAILED", None, ""),
            "job JOB, which inspects the nodes, failed: Job is currently running.; see its dashboard",
        ),
        (
            ("STOPPED", None, ""),
            "job JOB, which inspects the nodes, stopped: Job is currently running.; see its dashboard",
        ),
        (
            ("SUCCEEDED", 0, "nothing\n"),
            "job JOB, which inspects the nodes, ended with exit code 0: nothing; its log on the dashboard has more",
        ),
        (
            ("FAILED", 5, 'error: Ray is gone\n{"status": "failed"}\n'),
            "job JOB, which inspects the nodes, ended with exit code 5: Ray is gone; its log on the dashboard has more",
        ),
        (
            ("FAILED", 2, "Usage: launcher resume\n\nError: No such option: --standby\n"),
            "python on its head does not have this launcher: Error: No such option: --standby; install the same "
            "version of launcher there, or give the folder that it is in as venv of the cluster's description",
        ),
        (
            ("SUCCEEDED", 0, report_to_text(CLUSTER).replace("silent", "silence")),
            "cannot read what job JOB has found out: silent: Field required; install the same version of "
            "launcher here and on the cluster",
        ),
    ],
)
def test_an_inspection_that_fails(head: Head, outcome: tuple[str, int | None, str], message: str) -> None:
    head.outcome = outcome
    with pytest.raises(ClusterError) as failed:
        RayJobs(head.url).inspect(NEEDS)
    (job_id,) = head.jobs  # which stays for inspection by a person
    assert str(failed.value) == f"{head.url}: {message.replace('JOB', job_id)}"


def test_a_venv_without_launcher_is_named(head: Head) -> None:
    head.outcome = "FAILED", 127, ""
    with pytest.raises(ClusterError, match="no launcher, or no python, in /opt/venv/bin on its head; "):
        RayJobs(head.url, "/opt/venv").inspect(NEEDS)


def test_an_inspection_is_not_waited_for_without_end(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_INSPECT_TIMEOUT_S", 0.0)
    with pytest.raises(ClusterError, match="which inspects the nodes, is running after 0 s: Job is currently running"):
        RayJobs(head.url).inspect(NEEDS)
    (job,) = head.jobs.values()
    assert job["status"] == "STOPPED"


def test_an_inspection_that_is_interrupted_is_stopped(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_jobs.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        RayJobs(head.url).inspect(NEEDS)
    (job,) = head.jobs.values()
    assert job["status"] == "STOPPED"


def test_an_inspection_begins_nothing_where_it_is_not_let_in(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    with pytest.raises(ClusterError, match="does not take this token"):
        RayJobs(head.url).inspect(NEEDS)
    assert head.asked == [("GET", "/api/version")]


def test_of_many_that_begin_a_job_at_once_one_has_it(head: Head) -> None:
    runs = [f"s3://b/{number}" for number in range(8)]
    began: list[Job] = []
    threads = [threading.Thread(target=lambda run=run: began.append(begin(RayJobs(head.url), run=run))) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert began == [began[0]] * 8
    assert began[0].metadata["run"] in runs
    assert head.jobs["one"]["metadata"] == began[0].metadata


def test_an_answer_that_was_lost_is_had_by_asking_again(head: Head) -> None:
    first = begin(RayJobs(head.url))
    assert begin(RayJobs(head.url)) == first
    assert [*head.jobs] == ["one"]


def test_a_job_that_is_gone_as_soon_as_it_was_begun(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_begin", lambda request: (200, {"submission_id": request["submission_id"]}))
    with pytest.raises(ClusterError, match="has begun job one, and knows no such job, and not as the Jobs API does"):
        begin(RayJobs(head.url))


def test_a_job_that_is_not_there_cannot_be_stopped_and_has_no_log(head: Head) -> None:
    for ask in (RayJobs(head.url).stop, RayJobs(head.url).log):
        with pytest.raises(ClusterError, match="job one: Job one not found; see its dashboard"):
            ask("one")


def test_what_the_cluster_does_not_begin(head: Head) -> None:
    head.says = 500, "Traceback ...\n  File\nTimeoutError: no agent\n"
    with pytest.raises(ClusterError) as refused:
        begin(RayJobs(head.url))
    assert str(refused.value) == f"{head.url}: does not say how job one is: TimeoutError: no agent; see its dashboard"


def test_a_value_that_ray_would_replace(head: Head) -> None:
    with pytest.raises(ClusterError, match=r"the value of A holds a '\$', which Ray would replace"):
        begin(RayJobs(head.url), A="$HOME")
    assert head.jobs == {}


@pytest.mark.parametrize("source", ["variable", "named file", "usual file"])
def test_where_the_token_comes_from(head: Head, source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not from ~/.netrc, which requests would take."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password other\n")
    (tmp_path / ".netrc").chmod(0o600)
    if source != "variable":
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        path = tmp_path / ("own" if source == "named file" else ".ray/auth_token")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{TOKEN}\n")
    if source == "named file":
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "own"))
    assert RayJobs(head.url).ray_version() == "2.60.0"


def test_credentials_of_a_proxy_do_not_replace_the_token(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{head.port}")
    assert RayJobs("http://cluster.invalid:8265").ray_version() == "2.60.0"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("location", "message"),
    [
        (
            "https://me:secret@gateway/api/version?token=secret",
            "redirects to https://gateway:443, which is not followed, for it would get the token; write "
            "https://gateway:443 as the address if it is the cluster's own",
        ),
        ("https://[::1]:9/api/version", "redirects to https://[::1]:9, which is not followed, "),
        ("/login?next=secret", "redirects to HEAD/login, and not as the Jobs API does; give the address of Ray"),
        ("/api/version", "redirects to HEAD/api/version, and not as the Jobs API does; "),
        ("ftp://secret/", "redirects to another place, and not as the Jobs API does; "),
        ("http://[secret", "redirects to another place, and not as the Jobs API does; "),
        ("http://h:secret/", "redirects to another place, and not as the Jobs API does; "),
    ],
)
def test_no_redirect_is_followed(head: Head, status: int, location: str, message: str) -> None:
    head.says, head.location = (status, ""), location
    with pytest.raises(ClusterError) as told:
        RayJobs(head.url).ray_version()
    assert str(told.value).startswith(f"{head.url}: {message.replace('HEAD', head.url)}")
    assert "secret" not in str(told.value)
    assert len(str(told.value).splitlines()) == 1
    assert head.asked == [("GET", "/api/version")]


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_begins_nothing(head: Head, status: int) -> None:
    """It would be followed with a GET, and the list of jobs be taken for an answer."""
    head.says, head.location = (status, ""), f"{head.url}/api/jobs/"
    with pytest.raises(ClusterError, match="redirects to"):
        begin(RayJobs(head.url))
    assert head.asked == [("POST", "/api/jobs/")]


@pytest.mark.parametrize("answer", [[], {}, {"submission_id": "another"}, {"job_id": "one"}, "one"], ids=str)
def test_an_answer_that_does_not_name_the_job_is_no_success(head: Head, answer: Any) -> None:
    head.says = 200, json.dumps(answer)
    with pytest.raises(ClusterError, match="answers with something else, and not as the Jobs API does; "):
        begin(RayJobs(head.url))


@pytest.mark.parametrize("token", ["s3cret\n", "s3\ncret", "s3crèt"])
def test_no_error_holds_the_token(head: Head, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    for says in (None, (500, f"Traceback ...\nKeyError: Bearer {token.strip()}")):
        head.says = says
        for ask in (RayJobs(head.url).ray_version, RayJobs(head.url).jobs):
            with pytest.raises(ClusterError) as told:
                ask()
            assert "s3cr" not in str(told.value)


def test_no_token_or_another(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    with pytest.raises(
        ClusterError, match="does not take this token; give the cluster's token in RAY_AUTH_TOKEN"
    ) as told:
        RayJobs(head.url).ray_version()
    assert "b" * 64 not in str(told.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(ClusterError, match="asks for a token; give the cluster's token in RAY_AUTH_TOKEN"):
        RayJobs(head.url).ray_version()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH=.*/none: is not there"):
        RayJobs(head.url).ray_version()


@pytest.mark.parametrize(
    "says", [(404, "Not found"), (200, "<html>"), (200, "{}"), (200, "[]"), (502, "Bad gateway")], ids=str
)
def test_something_else_than_a_ray_cluster(head: Head, says: tuple[int, str]) -> None:
    head.says = says
    with pytest.raises(ClusterError, match="and not as the Jobs API does; give the address of Ray's dashboard"):
        RayJobs(head.url).ray_version()


ASKS: dict[str, Callable[[RayJobs], Any]] = {
    "ray_version": RayJobs.ray_version,
    "inspect": lambda jobs: jobs.inspect(NEEDS),
    "report": lambda jobs: jobs.report("one"),
    "begin": lambda jobs: begin(jobs, "two"),
    "read": lambda jobs: jobs.read("one"),
    "jobs": RayJobs.jobs,
    "stop": lambda jobs: jobs.stop("one"),
    "log": lambda jobs: jobs.log("one"),
}


def test_every_method_is_asked() -> None:
    assert ASKS.keys() == Scheduler.__abstractmethods__ - {"script"} | {"ray_version"}


def test_it_takes_no_script() -> None:
    with pytest.raises(ClusterError, match="takes job one as a command, and no script; use launcher submit"):
        RayJobs("http://head:8265").script(
            JobRequest(id="one", command="true", environment={}, stop_grace_s=1, metadata={})
        )


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize(
    "answer",
    [
        "<html>", "{}", "null", "1", '"one"', "[1]", "[[]]", '{"error": "one"}', '[{"submission_id": "one"}]',
        '{"submission_id": "another", "status": "RUNNING"}', '{"submission_id": "one", "status": "GONE"}',
        '{"submission_id": "another", "ray_version": 2, "logs": [], "stopped": null, "status": 1}',
    ],
)  # fmt: skip
def test_an_answer_of_another_shape_is_told_as_such(head: Head, ask: str, answer: str) -> None:
    head.says = 200, answer
    with pytest.raises(ClusterError, match="and not as the Jobs API does; give the address of Ray's dashboard"):
        ASKS[ask](RayJobs(head.url))


@pytest.mark.parametrize(
    "field", [{"start_time": "now"}, {"start_time": True}, {"driver_exit_code": "1"}, {"metadata": []}, {"message": 1}]
)
def test_a_job_with_a_field_of_another_kind_is_none(head: Head, field: dict[str, Any]) -> None:
    begin(RayJobs(head.url))
    head.jobs["one"].update(field)
    for ask in ("read", "jobs"):
        with pytest.raises(ClusterError, match="answers with something else, and not as the Jobs API does; "):
            ASKS[ask](RayJobs(head.url))


def test_what_ray_leaves_empty_is_no_other_shape(head: Head) -> None:
    """Of a job that has not begun, and of a driver that somebody runs on the cluster."""
    begin(RayJobs(head.url))
    head.jobs["one"].update(dict.fromkeys(["start_time", "driver_exit_code", "metadata", "message"]))
    head.jobs["driver"] = {"type": "DRIVER", "status": "RUNNING", "submission_id": None}
    (job,) = RayJobs(head.url).jobs()
    assert (job.id, job.began_at, job.exit_code, job.metadata, job.message) == ("one", None, None, {}, "")


def test_a_cluster_without_jobs_has_an_empty_list(head: Head) -> None:
    assert RayJobs(head.url).jobs() == []


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        ClusterError, match=f"http://127.0.0.1:{port}: nobody answers there: .*refused; is the cluster up"
    ):
        RayJobs(f"http://127.0.0.1:{port}").ray_version()
    with pytest.raises(ClusterError, match="nobody answers there: "):
        RayJobs("http://no-such-host.invalid:8265").ray_version()


def test_one_that_is_silent_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_http, "_ANSWER_TIMEOUT_S", 0.2)
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ClusterError, match="timed out"):
        RayJobs(f"http://127.0.0.1:{silent.getsockname()[1]}").ray_version()
    assert time.monotonic() - began < 60
