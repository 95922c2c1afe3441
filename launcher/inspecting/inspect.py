"""What ``launcher data`` does: asks a process for the datasets, verifies what lies in indexes, writes the sheet."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.errors import DescriptionError, TrainingError
from cluster.process import fork_server
from cluster.process.workplace import Call, call_here
from cluster.storage.store import Store
from jobs.images.indexing.index import Index
from launcher.code.user_code import UserCode, make_import_paths
from launcher.config.description import Description, named_errors
from launcher.display.contact_sheet import draw_sheet
from launcher.display.progress import Progress
from launcher.inspecting.duplicates import HashedDataset, find_duplicates
from launcher.inspecting.facts import Answer, IndexedSamples, Question, Sheet
from launcher.inspecting.readers import PROCESS
from launcher.inspecting.summary import broken_samples
from launcher.inspecting.verification import VerifiedIndex, verify
from launcher.planning.placement import resources_of

_DESCRIBE = "launcher.inspecting.describing:describe"
_MODULES = tuple(entry.partition(":")[0] for entry in (_DESCRIBE, PROCESS))
"""What the fork server imports."""
SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a person wants to know."""

    split: str | None = None
    """``train`` or ``val``; None: both."""
    num_sampled: int
    """How many samples of each dataset to read."""
    verify: bool
    """Read and decode all samples that an index lists."""
    duplicates: bool
    """Find equal content among them, which reads them all too."""
    sheet: str | None = None
    """The path or URL of the contact sheet, a PNG; None: none."""


def inspect_data(description: Description, folder: Path, wanted: Wanted, display: Progress) -> dict[str, Any]:
    """Return the document of the data of a job; trains nothing and needs no cluster.

    Args:
        description: The job.
        folder: The folder of the job file, which is searched for the user's own modules.
        wanted: What to find out.
        display: Shows progress.

    Raises:
        DescriptionError: A dataset cannot be built, or has not got what is wanted.
        StorageError: The data cannot be read, or the sheet cannot be written.
        TrainingError: A process that verified died.
        Interrupted: On Ctrl-C while samples are verified; what was verified is kept.
    """
    with named_errors(description.source):
        question = _question(description, wanted)
        target = None if wanted.sheet is None else _sheet_target(wanted.sheet)
        code = UserCode(folders=make_import_paths(folder))
        fork_server.start(_MODULES)
        display.phase(f"building {' and '.join(f'data.{split}' for split in question.splits)}")
        answer = _ask(question, code, display.phase)
        indexed = {split: facts.indexed for split, facts in answer.datasets.items() if facts.indexed is not None}
        if (wanted.verify or wanted.duplicates) and not indexed:
            raise DescriptionError(
                f"{_keys(question.splits)} must list the images of its samples for --verify and --duplicates, as "
                "jobs.data.image_folder does; leave the options out"
            )
    document: dict[str, Any] = {
        "job": description.spec.name,
        "datasets": {split: facts.document for split, facts in answer.datasets.items()},
        "verified": None,
        "duplicates": None,
        "sheet": None,
    }
    if answer.sheet is not None and target is not None:
        document["sheet"] = _write_sheet(answer.sheet, description.spec.name, *target)
    if wanted.verify or wanted.duplicates:

        def show(num_read: int, num_samples: int) -> None:
            display.count("verifying", num_read, num_samples, "images")

        verified = verify(
            list(indexed.values()),
            lambda entry, content: code.task(entry, "", content),
            show,
            display.warn,
            with_digests=wanted.duplicates,
        )
        document["verified"] = _verified(indexed, verified)
        if wanted.duplicates:
            document["duplicates"] = find_duplicates({
                split: HashedDataset(
                    Index(own.reader.index_path), own.numbers, verified[own.reader.index_path].records
                )
                for split, own in indexed.items()
            })  # fmt: skip
    return document


def has_broken(document: Mapping[str, Any]) -> bool:
    """Return whether a document lists a broken sample: of those that were sampled, verified or drawn."""
    sampled = [dataset["sampled"] for dataset in document["datasets"].values()]
    verified = (document["verified"] or {}).get("datasets", {}).values()
    drawn = [] if document["sheet"] is None else [document["sheet"]]
    return any(each["broken"] for each in [*sampled, *verified, *drawn])


def _question(description: Description, wanted: Wanted) -> Question:
    data = description.spec.data
    if wanted.split == "val" and data.val is None:
        raise DescriptionError("data.val must be a dataset for --split val, got null; leave --split out")
    if wanted.split == "val" and wanted.sheet is not None:
        raise DescriptionError("--sheet: draws samples of data.train; leave --split val out")
    splits = [split for split in SPLITS if wanted.split in (None, split) and (split == "train" or data.val is not None)]
    return Question(
        spec=description.spec,
        splits=tuple(splits),
        num_sampled=wanted.num_sampled,
        with_samples=wanted.verify or wanted.duplicates,
        with_sheet=wanted.sheet is not None,
    )


def _ask(question: Question, code: UserCode, tell: Callable[[str], None]) -> Answer:
    """Have a process of this machine build the datasets and read samples.

    Raises:
        DescriptionError: It failed or died.
    """
    workers = question.spec.workers
    call = Call(
        task=code.task(_DESCRIBE, "", question),
        modules=_MODULES,
        resources=resources_of(workers, 0),
        wait_s=workers.wait_s,
        start_timeout_s=workers.start_timeout_s,
        timeout_s=None,  # somebody is there, who can press Ctrl-C
    )
    try:
        answer: Answer = call_here(call, tell)
    except TrainingError as error:
        raise DescriptionError(
            f"{_keys(question.splits)}: building and reading it failed: {error}; see the traceback for where",
            error.traceback,
        ) from error
    except ChildProcessError as error:
        advice = "is there enough memory?" if "SIGKILL" in str(error) else "read the same data alone to see where"
        raise DescriptionError(f"{_keys(question.splits)}: the process that read it {error}; {advice}") from error
    return answer


def _keys(splits: tuple[str, ...]) -> str:
    return " or ".join(f"data.{split}" for split in splits)


def _sheet_target(to: str) -> tuple[Store, str]:
    """Return the folder and the name of the contact sheet.

    Raises:
        DescriptionError: It has another suffix.
    """
    folder, slash, name = to.rpartition("/")
    if not name.endswith(".png"):
        raise DescriptionError(f"--sheet must end in .png, got {to!r}; name the file so")
    return Store(folder or slash or "."), name


def _write_sheet(sheet: Sheet, job: str, folder: Store, name: str) -> dict[str, Any]:
    """Draw the contact sheet and write it, over a file of this name; return its document."""
    steps = "step 1 gets it" if sheet.last_step == 1 else f"steps 1 to {sheet.last_step:,} get it"
    title = f"{job}: the first of data.train as {steps}; {sheet.scaling}"
    folder.write(name, draw_sheet([(tile.pixels, tile.caption) for tile in sheet.tiles], title))
    return {
        "url": f"{folder.url.rstrip('/')}/{name}",
        "samples": list(sheet.numbers),
        "labels": [tile.caption for tile in sheet.tiles],
        "last_step": sheet.last_step,
        "scaling": sheet.scaling,
        "broken": list(sheet.broken),
    }


def _verified(indexed: Mapping[str, IndexedSamples], verified: Mapping[Path, VerifiedIndex]) -> dict[str, Any]:
    """Return the document of what was verified."""
    datasets = {}
    for split, own in indexed.items():
        problems = verified[own.reader.index_path].broken
        broken = np.array(sorted(problems), np.int64)
        own_broken = broken[np.isin(broken, own.numbers)] if len(broken) else broken
        datasets[split] = {
            "samples": len(own.numbers),
            "broken": broken_samples(
                Index(own.reader.index_path), {number: problems[number] for number in own_broken.tolist()}
            ),
        }
    since = min((each.resumed_since for each in verified.values() if each.resumed_since is not None), default=None)
    return {
        "resumed": sum(each.num_resumed for each in verified.values()),
        "resumed_since": None if since is None else datetime.fromtimestamp(since, UTC).isoformat(),
        "datasets": datasets,
    }
