"""Jobs of Slurm by its commands: what is asked of them, what their answers mean, and every way in which they fail."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, a_line

from cluster.errors import ClusterError
from cluster.kinds.slurm import commands, jobs
from cluster.kinds.slurm.commands import SlurmCommands
from cluster.kinds.slurm.jobs import SlurmJobs
from cluster.scheduler import Job, JobRequest, JobStatus
from cluster.spec.durations import seconds_from
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec

NAME = "digits-0"
OURS = "run=s3%3A%2F%2Fb%2Fr&submission=000000-1&user=me+%26+you"
METADATA = {"run": "s3://b/r", "submission": "000000-1", "user": "me & you"}
REQUEST = JobRequest(
    id=NAME, command="launcher resume s3://b/r", environment={}, stop_grace_s=60, metadata=METADATA
)  # fmt: skip
NO_CONTROLLER = "Unable to contact slurm controller (connect failure)"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    monkeypatch.setattr(jobs, "render", lambda _, folder, request: f"#!/bin/bash\n# {folder}\n{request.command}\n")
    monkeypatch.setattr(jobs, "log_path", lambda folder, job_id: f"{folder}/{job_id}.log")
    with monkeypatch.context() as of_zone:
        of_zone.setenv("TZ", "UTC0")
        time.tzset()
        yield FakeSlurm(tmp_path / "slurm", monkeypatch)
    time.tzset()


def a_spec(login: str | None = None, folder: str | None = None) -> SlurmClusterSpec:
    return SlurmClusterSpec(login=login, partition="main", nodes=SlurmNodesSpec(cpus=8), folder=folder)


def the_error(call: Callable[[], object]) -> str:
    with pytest.raises(ClusterError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def read(slurm: FakeSlurm, *lines: str) -> Job:
    slurm.plan("squeue", "".join(lines))
    job = SlurmJobs(a_spec()).read(NAME)
    assert job is not None
    return job


def test_nothing_is_asked_before_a_call(slurm: FakeSlurm) -> None:
    SlurmJobs(a_spec("me@login"))
    assert (slurm.calls, slurm.ssh_calls) == ([], [])


def test_a_job_is_begun(slurm: FakeSlurm) -> None:
    slurm.plan("squeue", "", a_line(State="PENDING", StartTime="N/A", NodeList="", Comment=OURS))
    slurm.plan("sbatch", "7;tests\n")
    begun = SlurmJobs(a_spec()).begin(REQUEST)
    assert begun == Job(id=NAME, status="pending", message="waits", exit_code=None, began_at=None, metadata=METADATA)
    assert [call.split()[0] for call in slurm.calls] == ["squeue", "sbatch", "squeue"]
    assert slurm.calls[1] == "sbatch --parsable"
    folder = slurm.home / ".launcher" / "slurm"
    assert (slurm.folder / "script").read_text() == f"#!/bin/bash\n# {folder}\n{REQUEST.command}\n"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING"])
def test_a_job_is_begun_once(slurm: FakeSlurm, state: str) -> None:
    slurm.plan("squeue", a_line(State=state, Comment=OURS))
    assert SlurmJobs(a_spec()).begin(REQUEST).metadata == METADATA
    assert not any(call.startswith("sbatch") for call in slurm.calls)


def test_a_job_whose_name_has_ended_is_begun_again(slurm: FakeSlurm) -> None:
    ended = a_line(JobID=5, State="FAILED", exit_code=256)
    slurm.plan("squeue", ended, ended + a_line(JobID=8, Comment=OURS))
    slurm.plan("sbatch", "8\n")
    assert SlurmJobs(a_spec()).begin(REQUEST).status == "running"


def test_of_two_jobs_begun_at_once_the_first_stays(slurm: FakeSlurm) -> None:
    other = a_line(JobID=7, Comment="run=s3%3A%2F%2Fb%2Fr&submission=of-another")
    slurm.plan("squeue", "", a_line(JobID=8, State="PENDING", Comment=OURS) + other)
    slurm.plan("sbatch", "8\n")
    assert SlurmJobs(a_spec()).begin(REQUEST).metadata["submission"] == "of-another"
    assert slurm.calls[-2:] == ["scontrol update JobId=8 Comment=withdrawn", "scancel 8"]


@pytest.mark.parametrize("comment", ["(null)", "set by the site", "submission=of-another"])
def test_a_site_that_changes_comments_is_refused(slurm: FakeSlurm, comment: str) -> None:
    slurm.plan("squeue", "", a_line(Comment=comment))
    slurm.plan("sbatch", "7\n")
    error = the_error(lambda: SlurmJobs(a_spec()).begin(REQUEST))
    assert error.startswith(f"slurm:local: changes the comment of job {NAME}, by which launcher knows it, so ")
    assert slurm.calls[-1] == "scancel 7"


def test_a_job_that_was_withdrawn_is_not_seen(slurm: FakeSlurm) -> None:
    withdrawn = a_line(JobID=8, State="CANCELLED", Comment="withdrawn", NodeList="")
    assert read(slurm, withdrawn, a_line(JobID=7, State="COMPLETED")).status == "succeeded"


def test_the_script_of_a_job_can_be_submitted_by_hand(slurm: FakeSlurm) -> None:
    folder = slurm.folder / "shared" / "logs"
    assert f"# {folder}\n" in SlurmJobs(a_spec(folder=str(folder))).script(REQUEST)
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("fields", "status", "message", "exit_code"),
    [
        ({"State": "PENDING", "Reason": "None"}, "pending", "waits", None),
        ({"State": "PENDING", "Reason": "Resources", "StartTime": "2026-01-31T12:00:00"}, "pending",
         "waits for Resources; may start at 2026-01-31 12:00", None),
        ({"State": "PENDING", "Reason": "Priority"}, "pending", "waits for Priority (others are before it)", None),
        ({"State": "PENDING", "Reason": "PartitionNodeLimit"}, "pending",
         "waits for PartitionNodeLimit (the partition gives no job that many nodes; stop it)", None),
        ({"State": "PENDING", "Reason": "ReqNodeNotAvail, UnavailableNodes:n3"}, "pending",
         "waits for ReqNodeNotAvail, UnavailableNodes:n3 (nodes that it needs are down or reserved)", None),
        ({"State": "PENDING", "Reason": "DependencyNeverSatisfied"}, "pending",
         "waits for DependencyNeverSatisfied (the job that it waits for has failed; stop it)", None),
        ({"State": "PENDING", "Reason": "QOSMaxGRESPerUser"}, "pending",
         "waits for QOSMaxGRESPerUser (its quality of service has the most that it may have)", None),
        ({"State": "PENDING", "Reason": "BeginTime", "RestartCnt": 2, "StartTime": "2026-01-31T12:02:01"}, "pending",
         "requeued, try 3: BeginTime; may start at 2026-01-31 12:02", None),
        ({"State": "PENDING", "Reason": "job_requeued_in_held_state", "RestartCnt": 1}, "pending",
         "requeued, try 2: job_requeued_in_held_state (it is held; scontrol release lets it start)", None),
        ({"State": "CONFIGURING"}, "pending", "its nodes are starting", None),
        ({"State": "SUSPENDED"}, "pending", "is suspended: others use its nodes", None),
        ({"State": "RUNNING"}, "running", "", None),
        ({"State": "RUNNING", "RestartCnt": 1}, "running", "try 2", None),
        ({"State": "COMPLETING", "exit_code": 256}, "running", "", None),
        ({"State": "COMPLETED"}, "succeeded", "", 0),
        ({"State": "FAILED", "Reason": "NonZeroExitCode", "exit_code": 768}, "failed", "failed: NonZeroExitCode", 3),
        ({"State": "FAILED", "Reason": "NonZeroExitCode", "exit_code": "3:0"}, "failed", "failed: NonZeroExitCode", 3),
        ({"State": "FAILED", "Reason": "NonZeroExitCode", "exit_code": 75 << 8}, "stopped", "ended after a signal", 75),
        ({"State": "FAILED", "Reason": "NonZeroExitCode", "exit_code": 130 << 8}, "stopped", "ended after a signal",
         130),
        ({"State": "FAILED", "Reason": "NonZeroExitCode", "exit_code": 143 << 8}, "stopped", "ended after a signal",
         143),
        ({"State": "FAILED", "Reason": "JobLaunchFailure", "exit_code": 15}, "stopped", "ended after a signal", 143),
        ({"State": "FAILED", "Reason": "JobLaunchFailure", "exit_code": 9}, "failed", "failed: JobLaunchFailure", 137),
        ({"State": "CANCELLED", "exit_code": "0:15"}, "stopped", "cancelled", 143),
        ({"State": "TIMEOUT", "Reason": "TimeLimit"}, "failed", "timeout: TimeLimit", None),
        ({"State": "NODE_FAIL", "Reason": "NodeDown"}, "failed", "node_fail: NodeDown", None),
        ({"State": "OUT_OF_MEMORY", "exit_code": "0:125"}, "failed", "out_of_memory", 253),
        ({"State": "PREEMPTED"}, "failed", "preempted", None),
    ],
)  # fmt: skip
def test_what_a_state_means(
    slurm: FakeSlurm, fields: dict[str, object], status: JobStatus, message: str, exit_code: int | None
) -> None:
    if fields["State"] == "PENDING":
        fields = {"StartTime": "N/A", "NodeList": "", **fields}
    job = read(slurm, a_line(**fields))
    assert (job.status, job.message, job.exit_code) == (status, message, exit_code)
    assert job.began_at == (None if status == "pending" else 1769860800.0)


def test_a_job_that_was_cancelled_before_it_began(slurm: FakeSlurm) -> None:
    job = read(slurm, a_line(State="CANCELLED", Reason="Dependency", NodeList=""))
    assert (job.status, job.message, job.exit_code, job.began_at) == ("stopped", "cancelled: Dependency", None, None)


def test_a_state_that_is_not_known_is_named(slurm: FakeSlurm) -> None:
    slurm.plan("squeue", a_line(State="DREAMING"))
    error = the_error(lambda: SlurmJobs(a_spec()).read(NAME))
    assert error.startswith("slurm:local: job 7 (digits-0) is 'DREAMING', which is no state")


@pytest.mark.parametrize(
    ("comment", "metadata"),
    [(OURS, METADATA), ("(null)", {}), ("a|b c", {}), ("run s3://x", {}), ("", {})],
)  # fmt: skip
def test_the_metadata_of_a_job(slurm: FakeSlurm, comment: str, metadata: dict[str, str]) -> None:
    assert read(slurm, a_line(Comment=comment)).metadata == metadata


def test_of_jobs_of_one_name_the_one_that_goes_on_counts_or_else_the_newest(slurm: FakeSlurm) -> None:
    failed, running, waiting = (
        a_line(JobID=10, State="FAILED", exit_code=256),
        a_line(JobID=9),
        a_line(JobID=11, State="PENDING"),
    )
    assert read(slurm, waiting, failed, running).status == "running"
    assert read(slurm, failed, a_line(JobID=9, State="CANCELLED")).status == "failed"


def test_a_job_that_slurm_does_not_know(slurm: FakeSlurm) -> None:
    assert SlurmJobs(a_spec()).read(NAME) is None
    SlurmJobs(a_spec()).stop(NAME)
    assert {call.split()[0] for call in slurm.calls} == {"squeue"}
    assert all(f"--name={NAME}" in call for call in slurm.calls)


def test_jobs_of_others_are_none_of_ours(slurm: FakeSlurm) -> None:
    lines = [
        a_line(JobID=12, State="PENDING", Name="b", Comment=OURS, RestartCnt=1),
        a_line(JobID=3, Name="a", Comment=OURS),
        a_line(JobID=4, Name="other"),
        a_line(JobID=5, Name="nl|n", Comment="submission=a|b", State="DREAMING"),
        "second line of a comment with submission=1 in it\n",
    ]
    slurm.plan("squeue", "".join(lines))
    assert [job.id for job in SlurmJobs(a_spec()).jobs()] == ["a", "b"]


def test_a_job_that_waits_is_cancelled_and_one_that_runs_is_told(slurm: FakeSlurm) -> None:
    running, waiting = a_line(JobID=9), a_line(JobID=11, State="PENDING", TimeUsed="0:00", NodeList="")
    slurm.plan("squeue", running + waiting, running + a_line(JobID=11, State="CANCELLED", TimeUsed="0:00"))
    SlurmJobs(a_spec()).stop(NAME)
    assert [call for call in slurm.calls if not call.startswith("squeue")] == [
        "scontrol update JobId=9 Requeue=0",
        "scancel --state=PENDING 9",
        "scancel --batch --signal=TERM --state=RUNNING 9",
        "scontrol update JobId=11 Requeue=0",
        "scancel --state=PENDING 11",
        "scancel --batch --signal=TERM --state=RUNNING 11",
    ]


def test_a_task_of_an_array_is_stopped_alone(slurm: FakeSlurm) -> None:
    """The number of one of its tasks is that of the array, and would stop all of them."""
    slurm.plan("squeue", a_line(JobArrayID="7_2", TimeUsed="0:00"))
    SlurmJobs(a_spec()).stop(NAME)
    stops = [call for call in slurm.calls if not call.startswith("squeue")]
    assert {stop.split()[-1] for stop in stops} == {"Requeue=0", "7_2"}
    assert stops[0] == "scontrol update JobId=7_2 Requeue=0"
    assert all("--array" in call for call in slurm.calls if call.startswith("squeue"))


def test_a_job_that_starts_while_it_is_stopped_is_cancelled(slurm: FakeSlurm) -> None:
    slurm.plan("squeue", a_line(State="PENDING", TimeUsed="0:00"), a_line(TimeUsed="0:01"))
    SlurmJobs(a_spec()).stop(NAME)
    assert slurm.calls[-1] == "scancel 7"


@pytest.mark.parametrize("state", ["CONFIGURING", "SUSPENDED"])
def test_a_job_that_can_take_no_signal_is_cancelled(slurm: FakeSlurm, state: str) -> None:
    slurm.plan("squeue", a_line(State=state), a_line(State="CANCELLED"))
    SlurmJobs(a_spec()).stop(NAME)
    assert slurm.calls[-2] == "scancel 7"
    assert not any("--batch" in call for call in slurm.calls)


@pytest.mark.parametrize("after", ["", a_line(State="COMPLETED"), a_line(State="COMPLETING", TimeUsed="0:00")])
def test_a_job_that_ends_while_it_is_stopped_is_no_error(slurm: FakeSlurm, after: str) -> None:
    slurm.plan("squeue", a_line(), after)
    slurm.plan("scancel", "", error="scancel: error: Kill job error on job id 7: Invalid job id specified\n", code=1)
    slurm.plan("scontrol", "", error="Job has already finished for job 7\n", code=1)
    SlurmJobs(a_spec()).stop(NAME)


def test_a_job_of_another_user_is_not_stopped(slurm: FakeSlurm) -> None:
    denied = "Kill job error on job id 7: Access/permission denied"
    slurm.plan("squeue", a_line())
    slurm.plan("scancel", "", error=f"scancel: error: {denied}\n", code=210)
    slurm.plan("scontrol", "", error="Access/permission denied for job 7\n", code=1)
    error = the_error(lambda: SlurmJobs(a_spec()).stop(NAME))
    assert error == f"slurm:local: does not stop job {NAME}: {denied}"


def test_the_log_of_a_job(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = slurm.home / ".launcher" / "slurm"
    folder.mkdir(parents=True)
    (folder / f"{NAME}.log").write_bytes("é\n\xff0\n no line break".encode())
    slurm.plan("squeue", "", error=NO_CONTROLLER, code=1)
    assert SlurmJobs(a_spec()).log(NAME) == "é\nÿ0\n no line break"
    monkeypatch.setattr(jobs, "_MAX_LOG_BYTES", 5)
    assert SlurmJobs(a_spec("me@login")).log(NAME) == "break"
    assert slurm.calls == []


def test_a_job_without_a_log(slurm: FakeSlurm) -> None:
    slurm.plan("squeue", a_line(State="PENDING"))
    assert SlurmJobs(a_spec()).log(NAME) == ""
    slurm.plan("squeue", "")
    assert f"does not give the log of job {NAME}: " in the_error(lambda: SlurmJobs(a_spec()).log(NAME))


def test_no_job_stands_by(slurm: FakeSlurm) -> None:
    assert not SlurmJobs.starts_at_once
    assert "reports no nodes" in the_error(lambda: SlurmJobs(a_spec()).report(NAME))
    assert slurm.calls == []


def test_a_login_node_is_reached_by_ssh(slurm: FakeSlurm) -> None:
    slurm.plan("squeue", "", a_line(State="PENDING", Comment=OURS))
    slurm.plan("sbatch", "7\n")
    assert SlurmJobs(a_spec("me@login.uni.edu")).begin(REQUEST).metadata == METADATA
    first, second = slurm.ssh_calls
    options = "<-o> <BatchMode=yes> <-o> <ConnectTimeout=10> <--> <me@login.uni.edu> <bash> <-lc>"
    assert first.partition(" ")[2].startswith(options)
    assert REQUEST.command not in second
    assert REQUEST.command in (slurm.folder / "script").read_text()


@pytest.mark.parametrize("login", [None, "login"])
def test_variables_of_other_jobs_and_of_a_user_change_nothing(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, login: str | None
) -> None:
    kept = {"SLURM_CONF": "/etc/x.conf", "SLURM_JWT": "abc", "HF_TOKEN": "kept", "TZ": "Asia/Tokyo"}
    foreign = ("SQUEUE_FORMAT", "SQUEUE_SORT", "SBATCH_PARTITION", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS", "SINFO_ALL")
    for name, value in {**kept, **dict.fromkeys(foreign, "x")}.items():
        monkeypatch.setenv(name, value)
    slurm.plan("squeue", "", a_line(Comment=OURS))
    slurm.plan("sbatch", "7\n")
    SlurmJobs(a_spec(login)).begin(REQUEST)
    for_script, for_query = slurm.environment("sbatch"), slurm.environment("squeue")
    assert {name: for_script.get(name) for name in kept} == kept
    assert not {*foreign} & {*for_script}
    assert (for_query["TZ"], for_query["SLURM_TIME_FORMAT"]) == ("UTC0", "standard")
    assert not {*foreign} - {"SLURM_TIME_FORMAT"} & {*for_query}


def test_commands_run_one_after_the_other_and_their_answers_stay_apart(slurm: FakeSlurm) -> None:
    slurm.plan("sinfo", "no line break", error="warning\n")
    slurm.plan("scontrol", "", error="refused", code=7)
    first, second, third = SlurmCommands("slurm:x", "login").ask(("sinfo", "it's"), ("scontrol",), ("printenv", "HOME"))
    assert (first.code, first.text, first.error) == (0, "no line break", "warning\n")
    assert (second.code, second.text, second.error) == (7, "", "refused")
    assert (third.code, third.text) == (0, f"{slurm.home}\n")
    assert slurm.calls == ["sinfo it's", "scontrol "]


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ("sbatch: error: invalid partition specified: nope\n"
         "sbatch: error: Batch job submission failed: Invalid partition name specified\n", 1,
         "Batch job submission failed: Invalid partition name specified"),
        ("sbatch: unrecognized option '--container-image=x'\nTry \"sbatch --help\" for more information\n", 255,
         "sbatch: unrecognized option '--container-image=x'"),
        ("sbatch: error: Invalid --time specification\n", 255, "Invalid --time specification"),
        ("", 1, "exit code 1"),
    ],
)  # fmt: skip
def test_what_slurm_refuses(slurm: FakeSlurm, said: str, code: int, words: str) -> None:
    slurm.plan("sbatch", "", error=said, code=code)
    error = the_error(lambda: SlurmJobs(a_spec()).begin(REQUEST))
    assert error == f"slurm:local: does not take job {NAME}: {words}"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("me@login: Permission denied (publickey,password).\n", "not let in without a password; give the host your"),
        ("Host key verification failed.\n", "its host key is not known; connect once by hand: ssh me@login"),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.\n", "key has changed"),
        ("ssh: Could not resolve hostname login: Name or service not known\n",
         "cannot be reached by ssh: ssh: Could not resolve hostname login: Name or service not known; check"),
        ("ssh: connect to host login port 22: Connection refused\n", "cannot be reached by ssh: "),
    ],
)  # fmt: skip
def test_a_login_node_that_cannot_be_reached(slurm: FakeSlurm, error: str, says: str) -> None:
    slurm.fail_ssh(error)
    text = the_error(lambda: SlurmJobs(a_spec("me@login")).read(NAME))
    assert text.startswith("slurm:me@login: ")
    assert says in text


@pytest.mark.parametrize("login", [None, "me@login"])
def test_a_controller_that_does_not_answer(slurm: FakeSlurm, login: str | None) -> None:
    slurm.plan("squeue", "", error=f"slurm_load_jobs error: {NO_CONTROLLER}\n", code=1)
    where = "local" if login is None else login
    for call in (SlurmJobs(a_spec(login)).jobs, lambda: SlurmJobs(a_spec(login)).read(NAME)):
        says = f"slurm:{where}: its controller does not answer squeue: {NO_CONTROLLER}; try again in some minutes"
        assert the_error(call).startswith(says)


@pytest.mark.parametrize(
    ("login", "says"),
    [
        (None, "slurm:local: there is no squeue on this machine; is it a login node of a Slurm cluster? Give one as"),
        ("login", "slurm:login: there is no squeue on the PATH of a login shell there; give the login node"),
    ],
)
def test_a_machine_without_slurm(slurm: FakeSlurm, login: str | None, says: str) -> None:
    slurm.remove("squeue")
    for call in (SlurmJobs(a_spec(login)).jobs, lambda: SlurmJobs(a_spec(login)).read(NAME)):
        assert the_error(call).startswith(says)


def test_a_machine_without_ssh(slurm: FakeSlurm) -> None:
    slurm.remove("ssh")
    error = the_error(lambda: SlurmJobs(a_spec("login")).read(NAME))
    assert error == "slurm:login: there is no ssh on this machine; install it"


def test_a_command_that_hangs_is_ended(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_ANSWER_TIMEOUT_S", 5.0)
    slurm.plan("squeue", "", waits=True)
    error = the_error(lambda: SlurmJobs(a_spec("login")).read(NAME))
    assert error == "slurm:login: does not answer within 5 s; try again, or try `ssh login squeue` by hand"
    waiting = (slurm.folder / "waiting").read_text().strip()
    deadline = time.monotonic() + 30.0
    while Path(f"/proc/{waiting}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_folder_that_cannot_be_made(slurm: FakeSlurm) -> None:
    (slurm.home / ".launcher").write_text("a file")
    error = the_error(lambda: SlurmJobs(a_spec()).begin(REQUEST))
    assert error.startswith("slurm:local: cannot make the folder .launcher/slurm, see cluster.folder: ")


@pytest.mark.parametrize("said", ["", "Submitted batch job 7\n"])
def test_a_number_that_sbatch_does_not_print(slurm: FakeSlurm, said: str) -> None:
    slurm.plan("sbatch", said)
    assert "in place of a number; look at squeue there" in the_error(lambda: SlurmJobs(a_spec()).begin(REQUEST))


def test_a_job_that_is_not_listed_by_its_name_is_cancelled(slurm: FakeSlurm) -> None:
    slurm.plan("sbatch", "7\n")
    assert f"took job {NAME} as 7, and does not list it" in the_error(lambda: SlurmJobs(a_spec()).begin(REQUEST))
    assert [call for call in slurm.calls if call.startswith("scancel")] == ["scancel 7"]


def test_a_line_of_another_form(slurm: FakeSlurm) -> None:
    slurm.plan("squeue", "7\n")
    assert "squeue prints '7', where --Format=" in the_error(lambda: SlurmJobs(a_spec()).read(NAME))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("30:00", 1800), ("4:00:00", 14400), ("1-00:00:00", 86400), ("1-12", 129600), ("1-2:30", 95400),
        ("0:01", 1), ("00:01:00", 60), ("UNLIMITED", float("inf")), ("infinite", float("inf")),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert seconds_from(text) == seconds


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "-1", "1-", "1 2"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        seconds_from(text)
