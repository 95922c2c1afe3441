"""A run that is driven as the driver does it, without Ray and without a model: what it asks of its store is the same.

Each life claims the run, begins at the newest good checkpoint, and saves every second step, two writers together. The
bytes of a part say whose they are, so that parts that do not belong together are seen.
"""

import io
import re
import uuid
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, Literal

from cluster.errors import LauncherError
from cluster.run.checkpoints import Checkpoints
from cluster.run.manifest import Manifest, Part, PartKey, Share, divide, join
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from cluster.tracking.tracker import NoTracker
from jobs.spec import CheckpointSpec, DataSpec, JobSpec, LossSpec, OptimizerSpec, Target
from launcher.display.progress import open_progress
from launcher.driver.run_log import RunLog
from launcher.driver.run_state import RunState
from launcher.runs.rewind import go_back
from tests.crashing import Faults, crashing
from tests.faults.enumeration import Act, Begun, Content, MixedError, parsed

KEEP = 2
BEST_STEP = 2
_SPEC = JobSpec(
    name="run",
    model=Target("a.Model"),
    data=DataSpec(train=Target("a.data")),
    loss=LossSpec(factory=Target("MSELoss")),
    optimizer=OptimizerSpec(factory=Target("SGD")),
    checkpoint=CheckpointSpec(keep=KEEP),
)
_NUM_WRITERS = 2
_NUM_PARTS = {"trunk.bin": 1, "model.bin": 2, "optimizer.bin": 1}
_MANIFEST = re.compile(r"checkpoints/step-(\d{8})/manifest-([^/]*)\.json")
_FENCE = re.compile(r"checkpoints/fences/(.*)-after-(\d{8})")


class OurRuns:
    """Runs of this launcher."""

    name = "ours"
    ends_by = (LauncherError,)
    """What a life may end with that met a store that lies."""

    def acts(self) -> list[Act]:
        """What is enumerated: the run's first save; a resume past a bad checkpoint, whose step is saved again, with
        all retention; and a going back, which discards."""
        return [
            Act("first save", lambda url: self.live(url, 2, "first"), then_to=4),
            Act("resume", lambda url: self.live(url, 8, "first"), then_to=10, begin_with=self._prepared("damaged")),
            Act("go back", lambda url: self._go_back(url, 4), then_to=8, begin_with=self._prepared()),
        ]

    def live(self, url: str, last: int, by: str) -> Begun:
        """A driver's life, from its claim until it is done with the last step.

        Raises:
            MixedError: It began with bytes that do not belong together.
        """
        run = RunDirectory(Store(url, patience_s=0))
        run.take_lease()
        named: dict[int, str] = {}
        found = run.checkpoints.newest_good(lambda step, defect: named.update({step: str(defect)}))
        begun = Begun(0, "", named) if found is None else Begun(found[0].step, writer_of(*found), named)
        record = self._record(run, last)
        record.event("attempt_started", by=by)
        for step, defect in named.items():
            record.fell_back(step, defect)
        record.begins_at(begun.step)
        list(record.write())
        before = None if found is None else found[0]
        for step in range(begun.step + 1, last + 1):
            record.row({"step": step, "epoch": 0, "samples": step, "by": by}, 0.0)
            if step % 2 == 0:
                before = save(run, step, by, before)
                record.checkpoint(before, (BEST_STEP, 0.5), 0.1)
                list(record.write())
                record.tend()
        return begun

    def committed(self, content: Content, before: Content) -> dict[int, bool]:  # noqa: ARG002
        """The steps whose manifests are all there and were not gone back from, and whether all is there they name."""
        found: dict[int, bool] = {}
        fences = [(match[1], int(match[2])) for match in map(_FENCE.fullmatch, content) if match]
        for name in sorted(content):
            if (match := _MANIFEST.fullmatch(name)) and (manifest := parsed(content[name])):
                if any(match[2] < claim and int(match[1]) > step for claim, step in fences):
                    continue
                parts = [part for entry in manifest["files"].values() for part in entry]
                objects = [(content.get(f"checkpoints/{part['object']}"), part["sha256"]) for part in parts]
                found[int(match[1])] = all(
                    data is not None and sha256(data).hexdigest() == sha for data, sha in objects
                )
        return found

    def complaint(self, url: str, begun: Begun, last: int, by: str) -> str | None:
        """What is wrong with the run that a life has brought to its last step."""
        run = RunDirectory(Store(url, patience_s=0))
        survey = run.checkpoints.survey()
        kept = sorted({BEST_STEP, last - 2, last})
        if (list(survey.manifests), list(survey.defects), survey.orphans) != (kept, [], ()):
            return f"has {survey}"
        manifest, files = run.checkpoints.read(last)
        if writer_of(manifest, files) != by:
            return "the last checkpoint is not of the last life"
        return self.complaint_of_rows(url, begun, last, by)

    def complaint_of_rows(self, url: str, begun: Begun, last: int, by: str) -> str | None:
        """What is wrong with its rows."""
        rows = RunDirectory(Store(url, patience_s=0)).metrics().read()
        if [row["step"] for row in rows] != list(range(1, last + 1)):
            return f"has the rows {[row['step'] for row in rows]}"
        if {row["by"] for row in rows if row["step"] > begun.step} != {by}:
            return "has rows that were lost with their life"
        return None

    def _go_back(self, url: str, step: int) -> Begun | None:
        run = RunDirectory(Store(url, patience_s=0))
        run.take_lease()
        go_back(run, run.checkpoints.manifest(step))
        return None

    def _prepared(self, newest: Literal["whole", "damaged"] = "whole") -> Content:
        """A run with three checkpoints; the newest lacks a part if it is damaged."""
        faults = Faults(folder=uuid.uuid4().hex)
        with crashing(faults):
            self.live(f"memory://{faults.folder}", 6, "past")
        content = faults.content
        lost = max(name for name in content if "/optimizer-" in name)
        return {name: data for name, data in content.items() if newest == "whole" or name != lost}

    def _record(self, run: RunDirectory, last: int) -> RunLog:
        plan: Any = SimpleNamespace(steps_per_epoch=10, total_steps=last, end_step=last)
        rows = run.metrics().read()
        state = RunState(step=rows[-1]["step"] if rows else 0)
        display = open_progress(io.StringIO(), clock=lambda: 0.0)
        return RunLog(spec=_SPEC, plan=plan, run=run, state=state, display=display, tracker=NoTracker())


def save(run: RunDirectory, step: int, by: str, before: Manifest | None) -> Manifest:
    """What the workers do: each writes its share of the parts, what has not changed excepted."""
    keys = [(name, number) for name, count in _NUM_PARTS.items() for number in range(count)]
    known = {} if before is None else {key: before.part(key) for key in before.part_keys()}
    empty = Share(
        step=step,
        num_parts=_NUM_PARTS,
        parts={},
        state_files=list(_NUM_PARTS),
        metrics={"val/loss": 1 / step},
        versions={},
        created="2030-01-01T00:00:00Z",
    )
    shares = []
    for stretch in divide([1] * len(keys), _NUM_WRITERS):
        writer, parts = Checkpoints(run.store.at("checkpoints")), dict[PartKey, Part]()
        for key in keys[stretch.start : stretch.stop]:
            parts[key] = writer.write_part(step, key, _bytes(key, step, by), known.get(key))
        shares.append(replace(empty, parts=parts))
    manifest = join(shares)
    assert manifest is not None
    return manifest


def writer_of(manifest: Manifest, files: Mapping[str, bytes]) -> str:
    """Whose checkpoint it is.

    Raises:
        MixedError: Its bytes are not all of its step and of one writer.
    """
    expected = {
        name: b"".join(_bytes((name, number), manifest.step, "{}") for number in range(count))
        for name, count in _NUM_PARTS.items()
    }
    writers = set(re.findall(rb"^\d+ (\w+) of", files["model.bin"], re.M))
    for writer in writers:
        if all(data == expected[name].replace(b"{}", writer) for name, data in files.items()):
            return writer.decode()
    raise MixedError(f"step {manifest.step} has {files}")


def _bytes(key: PartKey, step: int, by: str) -> bytes:
    """Of a part; the trunk never changes."""
    name, number = key
    return b"frozen\n" * 9 if name == "trunk.bin" else f"{step} {by} of {name} {number}\n".encode() * 9
