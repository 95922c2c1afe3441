"""Which changes of a description a run accepts: those that leave its bits as they are."""

import re
from pathlib import Path

import pytest

from cluster.errors import DescriptionError
from cluster.run.run_directory import RunDirectory
from launcher.config.description import Description, parse
from launcher.runs.changes import compare

JOB = """\
name: digits
model: {_target_: jobs.models.Net}
data: {train: jobs.data.digits}
loss: CrossEntropyLoss
optimizer: SGD
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "digits"))


def described(*overrides: str) -> Description:
    return parse(JOB, "digits.yaml", overrides)


def listed(run: RunDirectory, stored: Description, wanted: Description) -> str:
    """What the error lists: the changes that may alter bits."""
    with pytest.raises(DescriptionError) as caught:
        compare(run, stored, wanted)
    found = re.search("another description: (.*); give this one", str(caught.value))
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    "override",
    [
        "workers.num=2", "checkpoint.keep=5", "tracking.project=other", "data.loaders=2",
        "train.max_steps=7", "train.max_seconds=60", "train.bucket_mb=4",
    ],
)  # fmt: skip
def test_safe(run: RunDirectory, override: str) -> None:
    changes, is_same = compare(run, described(), described(override))
    assert [change.key for change in changes] == [override.partition("=")[0]]
    assert is_same


@pytest.mark.parametrize(
    "override",
    ["seed=1", "train.exact=false", "train.threads=2", "train.clip_norm=1.0", "data.shuffle={block: 8, buffer: 64}"],
)
def test_unsafe(run: RunDirectory, override: str) -> None:
    assert listed(run, described(), described(override)).startswith(override.partition("=")[0])
    assert compare(run, described(), described(override), force=True)[1] is False


def test_bad_samples_may_be_skipped_from_now_on_but_not_refused(run: RunDirectory) -> None:
    """A run that has met none would have gone the same way with ``skip``."""
    refusing, skipping = described(), described("data.on_bad_sample=skip")
    assert compare(run, refusing, skipping)[1]
    assert listed(run, skipping, refusing) == "data.on_bad_sample: 'skip' -> 'error'"


def test_the_size_of_buckets_is_unsafe_where_the_backend_sums(run: RunDirectory) -> None:
    stored, wanted = described("train.exact=false"), described("train.exact=false", "train.bucket_mb=4")
    assert listed(run, stored, wanted) == "train.bucket_mb: null -> 4.0"
    changes, is_same = compare(run, stored, wanted, force=True)
    assert (list(map(str, changes)), is_same) == (["train.bucket_mb: null -> 4.0"], False)


def test_what_counts_is_how_the_run_goes_on(run: RunDirectory) -> None:
    exact, backend = described(), described("train.exact=false", "train.bucket_mb=4")
    assert listed(run, exact, backend) == "train.exact: true -> false; train.bucket_mb: null -> 4.0"
    assert listed(run, backend, exact) == "train.exact: false -> true"
