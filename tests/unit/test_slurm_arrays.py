"""Arrays of Slurm by its commands: each task gets the name of its job, also if a call ends in between."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode

import pytest
from fake_slurm import FakeSlurm, a_line

from cluster.errors import ClusterError
from cluster.kinds.slurm import jobs
from cluster.kinds.slurm.jobs import SlurmJobs
from cluster.scheduler import JobRequest
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec

SPEC = SlurmClusterSpec(partition="main", nodes=SlurmNodesSpec(cpus=8), array="1-3")
REQUESTS = {
    number: JobRequest(
        id=f"r{number}", command="", environment={}, stop_grace_s=60,
        metadata={"run": f"s3://b/{number}", "submission": f"00000{number}-1"},
    )
    for number in (1, 2, 3)
}  # fmt: skip
ARRAY, MARK = "array-r1", "array=000001-1"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    def render(_: SlurmClusterSpec, __: str, due: Mapping[int, JobRequest]) -> str:
        return f"#SBATCH --array={','.join(map(str, due))}\n"

    monkeypatch.setattr(jobs, "render_array", render)
    fake = FakeSlurm(tmp_path / "slurm", monkeypatch)
    fake.plan("sbatch", "7\n")
    return fake


def waiting(number: int, array: int = 7, **fields: object) -> str:
    """A task that has no name yet."""
    values: dict[str, object] = {
        "JobID": array, "JobArrayID": f"{array}_{number}", "State": "PENDING", "StartTime": "N/A", "NodeList": "",
        "Name": ARRAY, "Comment": MARK,
    }  # fmt: skip
    return a_line(**values | fields)


def named(number: int, **fields: object) -> str:
    request = REQUESTS[number]
    return waiting(number, **{"Name": request.id, "Comment": urlencode(request.metadata), **fields})


def all_of(*lines: str) -> str:
    return "".join(lines)


def commands(slurm: FakeSlurm) -> list[str]:
    return [call for call in slurm.calls if not call.startswith("squeue")]


def rename(number: int) -> str:
    comment = urlencode(REQUESTS[number].metadata)
    return f"scontrol update JobId=7_{number} JobName=r{number} Comment={comment}"


NAMELESS = all_of(*map(waiting, REQUESTS))
NAMED = all_of(*map(named, REQUESTS))


def test_each_task_gets_its_name(slurm: FakeSlurm) -> None:
    slurm.plan("squeue", "", NAMELESS, NAMED)
    begun = SlurmJobs(SPEC).begin_array(REQUESTS)
    assert {number: (job.id, job.metadata) for number, job in begun.items()} == {
        number: (request.id, request.metadata) for number, request in REQUESTS.items()
    }
    sbatch = f"sbatch --parsable --job-name={ARRAY} --comment={MARK}"
    assert commands(slurm) == [sbatch, rename(1), rename(2), rename(3)]
    assert all("--name=array-r1,r1,r2,r3" in call for call in slurm.calls if call.startswith("squeue"))


def test_after_an_answer_that_was_lost_no_second_array_is_submitted(slurm: FakeSlurm) -> None:
    """One task has its name, one has started and given itself its own, and one has none."""
    running = named(2, State="RUNNING")
    slurm.plan("squeue", all_of(named(1), running, waiting(3)), all_of(named(1), running, named(3)))
    assert [*SlurmJobs(SPEC).begin_array(REQUESTS)] == [1, 2, 3]
    assert commands(slurm) == [rename(3)]


def test_a_task_that_has_ended_meanwhile_is_not_begun_again(slurm: FakeSlurm) -> None:
    slurm.plan("squeue", all_of(named(1), named(2, State="FAILED", exit_code=256), named(3)))
    begun = SlurmJobs(SPEC).begin_array(REQUESTS)
    assert (commands(slurm), begun[2].status) == ([], "failed")


def test_jobs_that_are_there_are_left_out_and_those_of_an_earlier_submission_that_ended_are_not(
    slurm: FakeSlurm,
) -> None:
    theirs = named(1, JobID=3, JobArrayID=3, Comment="run=s3%3A%2F%2Fb%2F1&submission=theirs")
    ended = named(2, JobID=4, JobArrayID=4, State="FAILED", Comment="submission=earlier")
    slurm.plan("squeue", theirs + ended, all_of(theirs, ended, waiting(2), waiting(3)),
               all_of(theirs, ended, named(2), named(3)))  # fmt: skip
    begun = SlurmJobs(SPEC).begin_array(REQUESTS)
    assert begun[1].metadata["submission"] == "theirs"
    assert begun[2].metadata == REQUESTS[2].metadata
    assert (slurm.folder / "script").read_text() == "#SBATCH --array=2,3\n"


def test_an_array_that_a_person_has_submitted_for_other_submissions_is_not_taken(slurm: FakeSlurm) -> None:
    by_hand = all_of(*(waiting(number, array=5, Comment="(null)") for number in REQUESTS))
    slurm.plan("squeue", by_hand, by_hand + NAMELESS, by_hand + NAMED)
    SlurmJobs(SPEC).begin_array(REQUESTS)
    assert len([call for call in slurm.calls if call.startswith("sbatch")]) == 1
    assert commands(slurm)[1:] == [rename(1), rename(2), rename(3)]


def test_an_array_that_is_not_listed_by_its_name_is_cancelled(slurm: FakeSlurm) -> None:
    slurm.plan("squeue", "")
    with pytest.raises(ClusterError, match="as 7, and does not list it by that name, so the job is cancelled"):
        SlurmJobs(SPEC).begin_array(REQUESTS)
    assert commands(slurm)[-1] == "scancel 7"


def test_a_name_that_is_not_given_is_an_error_after_which_the_tasks_are_still_known(slurm: FakeSlurm) -> None:
    slurm.plan("squeue", "", NAMELESS)
    with pytest.raises(ClusterError, match="^slurm:local: took r1, r2, r3, and does not list it"):
        SlurmJobs(SPEC).begin_array(REQUESTS)
    assert SlurmJobs(SPEC).has_any(REQUESTS)


@pytest.mark.parametrize(
    ("lines", "has_any"),
    [
        ("", False),
        (waiting(3), True),
        (waiting(3, State="CANCELLED"), False),
        (waiting(3, Comment="array=another"), False),
        (named(2), True),
        (named(2, State="FAILED"), True),
        (named(2, Comment="submission=theirs"), False),
    ],
)
def test_whether_any_is_there(slurm: FakeSlurm, lines: str, has_any: bool) -> None:
    slurm.plan("squeue", lines)
    assert SlurmJobs(SPEC).has_any(REQUESTS) == has_any


def test_a_site_that_changes_comments_is_refused(slurm: FakeSlurm) -> None:
    slurm.plan("squeue", "", all_of(*(waiting(number, Comment="(null)") for number in REQUESTS)))
    with pytest.raises(ClusterError, match=f"^slurm:local: changes the comment of job {ARRAY}"):
        SlurmJobs(SPEC).begin_array(REQUESTS)
    assert slurm.calls[-1] == "scancel 7"
