import pytest

from jobs.spec import JobSpec
from tests.distributed.small_job import full_job
from tests.distributed.team_process import Outcome, run_job


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    return full_job(tmp_path_factory.mktemp("full"), "run")


@pytest.fixture(scope="session")
def undisturbed(full: JobSpec) -> Outcome:
    """The whole of the full job on one worker."""
    return run_job(full, world_size=1)
