"""Texts about a run, from documents made by hand."""

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from jobs.spec import ShuffleSpec, TrainSpec, WorkersSpec
from launcher.display.tables import (
    checkpoints_table,
    duration,
    is_headline,
    number,
    plan_text,
    runs_table,
    summary,
    table,
)
from launcher.planning.plan import Plan
from launcher.planning.shuffle_cost import Order, ShufflePlan
from tests.specs import MEMORY, bare_job

RESULT: dict[str, Any] = {
    "run": "s3://bucket/runs/digits",
    "status": "completed",
    "step": 220,
    "epoch": 10,
    "samples": 14080,
    "metrics": {"train/loss": 0.412, "lr/0": 0.05, "val/loss": 0.31, "val/accuracy": 0.94},
    "best": {"metric": "val/accuracy", "value": 0.951, "step": 198},
    "workers": 2,
    "attempts": 1,
    "state_sha256": "3f2a",
    "seconds": 83.2,
    "images_per_second": 1240.3,
    "error": None,
}


class TestText:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (1240, "1,240"),
            (0.4, "0.4000"),
            (12.3456, "12.35"),
            (1234.5, "1234"),
            (3.2e-5, "3.200e-05"),
            (0.0, "0.000"),
            (math.nan, "nan"),
            (-math.inf, "-inf"),
        ],
    )
    def test_number(self, value: float, text: str) -> None:
        assert number(value) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (-1, "0:00:00"),
            (12.4, "0:00:12"),
            (59.6, "0:01:00"),
            (3723, "1:02:03"),
            (2 * 86400 + 3723, "2 days, 1:02:03"),
        ],
    )
    def test_duration(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text

    def test_table_sets_numbers_right_and_text_left(self) -> None:
        text = table([("group", "tensors", "lr"), ("*.bias", 12, 0.05), ("everything else", 1240, None)])
        assert text.splitlines() == [
            "group            tensors       lr",
            "*.bias                12  0.05000",
            "everything else    1,240",
        ]

    def test_table_without_rows_is_its_headers(self) -> None:
        assert table([("name", "step")]) == "name  step"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("train/loss", True), ("val/accuracy", True), ("val/f1", True), ("val/recall/cat", False),
        ("val/map/map_50", False), ("lr/0", False), ("step", False),
    ],
)  # fmt: skip
def test_headlines(name: str, shown: bool) -> None:
    assert is_headline(name) == shown


def test_texts_need_no_matplotlib() -> None:
    script = "import sys, launcher.display.tables; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def per_class(count: int) -> dict[str, float]:
    return {f"val/recall/{number}": 0.5 for number in range(count)}


class TestSummary:
    def test_a_completed_run(self) -> None:
        assert summary(RESULT).splitlines() == [
            "s3://bucket/runs/digits completed at step 220, epoch 10, 14,080 samples",
            "",
            "  val/loss      0.3100",
            "  val/accuracy  0.9400",
            "  train/loss    0.4120",
            "  best          val/accuracy 0.9510 at step 198",
            "  workers       2",
            "  attempts      1",
            "  time          0:01:23, 1,240 images/s",
            "  state         sha256 3f2a",
            "",
            "next: launcher plot s3://bucket/runs/digits         draw the curves",
            "      launcher checkpoints s3://bucket/runs/digits  see what was saved",
        ]

    @pytest.mark.parametrize(
        ("status", "command"),
        [("stopped", "resume"), ("failed", "resume"), ("running", "logs"), ("completed", "plot")],
    )
    def test_it_ends_with_the_next_command(self, status: str, command: str) -> None:
        end = summary(RESULT | {"status": status, "run": "/runs/my run"}).rsplit("\n\n", 1)[1]
        assert end.startswith(f"next: launcher {command} '/runs/my run' ")

    def test_a_failure_says_why(self) -> None:
        error = "digits.yaml: model raised\nTraceback ..."
        assert f"\n\n{error}\n\nnext: " in summary(RESULT | {"status": "failed", "error": error})

    def test_bad_samples_that_were_skipped(self) -> None:
        first = {"split": "train", "epoch": 0, "number": 3, "reason": "s3://bucket/3.jpg: is gone; restore it"}
        text = summary(RESULT | {"skipped_samples": {"count": 1200, "first": [first]}})
        assert "  data          1,200 bad samples skipped, first: s3://bucket/3.jpg: is gone; restore it\n" in text
        assert summary(RESULT | {"skipped_samples": {"count": 0, "first": []}}) == summary(RESULT)

    def test_where_the_time_went(self) -> None:
        time = {"startup": 12.34, "compute": 3723.4, "lost": 0.0, "exchange": 59.96, "storage": 0.04}
        text = summary(RESULT | {"goodput": 0.981, "time": time})
        assert "  goodput       98%: compute 1:02:03, exchange 60.0 s, startup 12.3 s\n" in text

    @pytest.mark.parametrize(
        ("rank", "address", "line"),
        [
            (1, "10.0.0.2", "killed at step 1,300: worker 1 on node 10.0.0.2: killed by SIGKILL"),
            (1, None, "killed at step 1,300: worker 1: killed by SIGKILL"),
            (None, None, "killed at step 1,300: killed by SIGKILL"),
        ],
    )
    def test_the_last_failure_is_told_whatever_became_of_it(
        self, rank: int | None, address: str | None, line: str
    ) -> None:
        failure = {
            "cause": "killed", "rank": rank, "node": None, "address": address, "step": 1300,
            "message": "killed by SIGKILL",
        }  # fmt: skip
        assert f"\n  last failure  {line}\n" in summary(RESULT | {"failure": failure})

    def test_what_is_not_known_is_left_out(self) -> None:
        assert summary({"run": "runs/a", "status": "failed"}) == (
            "runs/a failed\n\n"
            "next: launcher resume runs/a  go on from the newest good checkpoint\n"
            "      launcher logs runs/a    read what the workers wrote"
        )

    def test_a_thousand_classes_change_nothing(self) -> None:
        assert summary(RESULT | {"metrics": {**per_class(1000), **RESULT["metrics"]}}) == summary(RESULT)

    def test_null_is_no_value(self) -> None:
        best = {"metric": "val/loss", "value": None, "step": 3}
        text = summary(RESULT | {"metrics": {"val/loss": None, "train/loss": 0.5}, "best": best})
        assert "val/loss" not in text
        assert "  train/loss  0.5000" in text

    def test_what_is_waited_for_is_told_of_a_run_that_goes_on(self) -> None:
        waits = RESULT | {"status": "running", "waits_for": "there is room for 1 of at least 2 workers of 1 CPU each"}
        assert "  waits for     workers: there is room for 1 of at least 2 workers of 1 CPU each\n" in summary(waits)
        assert "waits for" not in summary(waits | {"status": "failed"})
        assert "waits for" not in summary(waits | {"waits_for": None})
        at_trial = {"run": "runs/a", "status": "submitted", "waits_for": "trying the job out: waiting for room"}
        assert "  waits for  trying the job out: waiting for room\n" in summary(at_trial)


class TestPlan:
    PLAN = Plan(
        run="s3://bucket/runs/run", num_samples=640, num_val_samples=0, micro_batch=16, steps_per_epoch=10,
        total_steps=10, end_step=10, unused_per_epoch=0, num_workers=2, most_shards=2, most_per_host=2, gpus=0,
        why_cpu="", why_wait="", groups=(), parameters=10, checkpoint_bytes=100, memory=MEMORY, trial_samples=16,
        trial_loss=1.0, data_fingerprint="ab", rates=(), init_from=None, hint="", indexes=(), shuffle=None,
    )  # fmt: skip

    def test_what_is_the_default_and_what_is_not_waited_for_is_not_told(self) -> None:
        text = plan_text(bare_job(), self.PLAN)
        assert "placement" not in text
        assert "wait" not in text
        assert "hint" not in text

    def test_the_order_of_samples_and_its_price(self) -> None:
        shuffle = ShuffleSpec(block=64, buffer=4096)
        own = Order(meet_in_micro_batch=0.0157, meet_in_step=0.01571, requests=0.01749, read=1.0314)
        full = Order(meet_in_micro_batch=1e-5, meet_in_step=8e-5, requests=1.0, read=1.0)
        planned = ShufflePlan(
            own=own, full=full, micro_batches=512, readers=1, streams=1, kept_bytes=3 * 2**19, row_group_bytes=0,
            processes=1,
        )  # fmt: skip

        def facts(planned: ShufflePlan, most_per_host: int = 1) -> list[str]:
            spec = replace(bare_job(), data=replace(bare_job().data, shuffle=shuffle))
            text = plan_text(spec, replace(self.PLAN, shuffle=planned, most_per_host=most_per_host))
            return [line for line in text.splitlines() if line.startswith(("order", "reads", "keeps"))]

        assert facts(planned) == [
            "order       blocks of 64 in buffers of 4,096; of neighbours, 1.6% meet in a micro-batch and 1.6% in a "
            "step (in 512 that were drawn), with a full shuffle 0.001% and 0.008%",
            "reads       0.0175 requests a sample and 1.03 bytes for each byte used, with a full shuffle 1 and 1",
            "keeps       in a process that reads samples, up to 1.5 MiB of images until they are used",
        ]
        assert facts(replace(planned, row_group_bytes=2**28, processes=4), most_per_host=8)[2] == (
            "keeps       in a process that reads samples, up to 1.5 MiB of images until they are used and 256 MiB of "
            "row groups; in the 32 on a host, 8,240 MiB"
        )
        assert facts(replace(planned, readers=4, streams=4))[1].endswith(
            "bytes for each byte used (all workers on one host), with a full shuffle 1 and 1; up to 4 loader processes "
            "read each block, or one with data.shuffle.streams: 4"
        )
        odd = Order(meet_in_micro_batch=1.0, meet_in_step=0.997, requests=1.2e-5, read=1234.5)
        assert facts(replace(planned, own=odd))[:2] == [
            "order       blocks of 64 in buffers of 4,096; of neighbours, 100% meet in a micro-batch and 100% in a "
            "step (in 512 that were drawn), with a full shuffle 0.001% and 0.008%",
            "reads       0.000012 requests a sample and 1,230 bytes for each byte used, with a full shuffle 1 and 1",
        ]
        by_themselves = replace(planned, own=replace(own, requests=None, read=None), kept_bytes=None)
        assert facts(by_themselves)[1:] == [
            "reads       each sample by itself, as with a full shuffle: the dataset reads no blocks"
        ]
        assert not any(line.startswith(("order", "reads")) for line in plan_text(bare_job(), self.PLAN).splitlines())

    def test_what_would_make_it_faster(self) -> None:
        hint = "optimizer.fused: true spares a wait"
        assert f"hint        {hint}" in plan_text(bare_job(), replace(self.PLAN, hint=hint)).splitlines()

    def test_how_many_shards_a_worker_has(self) -> None:
        def workers(shards: int, num_workers: int, most_shards: int) -> str:
            spec = bare_job(train=TrainSpec(global_batch=24, shards=shards), workers=WorkersSpec(num=num_workers))
            text = plan_text(spec, replace(self.PLAN, num_workers=num_workers, most_shards=most_shards))
            return next(line for line in text.splitlines() if line.startswith("workers"))

        assert workers(4, 2, 2) == "workers     2 on CPU with gloo: 2 shards each"
        assert workers(4, 4, 1) == "workers     4 on CPU with gloo: 1 shard each"
        assert workers(4, 3, 2) == "workers     3 on CPU with gloo: at most 2 shards each"

    def test_the_memory_of_a_worker_on_a_cpu_and_on_a_gpu(self) -> None:
        def memory(**changes: Any) -> str:
            lines = plan_text(bare_job(), replace(self.PLAN, **changes)).splitlines()
            return next(line for line in lines if line.startswith("memory")).removeprefix("memory      ")

        named = "weights 5.0, gradients 5.0, optimizer 10.0, set aside 5.0, exchange 5.0"
        assert memory() == (
            f"31.0 MiB for each of 2 workers: {named}, copy for a checkpoint 1.0; activations come on top"
        )
        measured = replace(MEMORY, activations=3 * 2**20, total=33 * 2**20, num_workers=1)
        assert memory(gpus=1, memory=measured) == (
            f"33.0 MiB of its GPU for the only worker: {named}, activations 3.0, and 1.0 MiB of its host for a copy of "
            "its share of a checkpoint"
        )

    def test_how_workers_are_placed_and_what_is_waited_for(self) -> None:
        spec = bare_job(workers=WorkersSpec(num=2, placement="spread"))
        lines = plan_text(spec, replace(self.PLAN, why_wait="there is room for 0 of 2 workers now")).splitlines()
        assert "wait        there is room for 0 of 2 workers now" in lines
        assert "placement   spread over as many nodes as there is room on" in lines


class TestRunsTable:
    def test_runs_of_different_metrics(self) -> None:
        young = {"run": "runs/regression/", "status": "running", "metrics": {"val/loss": 0.5}, "updated": 995.0}
        fresh = {"run": "runs/fresh", "status": "failed", "step": 0, "epoch": 0, "metrics": {}, "best": None}
        lines = runs_table([RESULT | {"updated": 0.0}, young, fresh], now=1000.0).splitlines()
        assert lines == [
            "name        status     step  epoch  val/loss  val/accuracy  best                             updated",
            "digits      completed   220     10    0.3100        0.9400  val/accuracy 0.9510 at step 198  0:16:40 ago",
            "regression  running                   0.5000                                                 0:00:05 ago",
            "fresh       failed        0      0",
        ]

    def test_a_thousand_classes_change_nothing(self) -> None:
        many = RESULT | {"metrics": {**per_class(1000), **RESULT["metrics"]}}
        assert runs_table([many], now=0.0) == runs_table([RESULT], now=0.0)

    @pytest.mark.parametrize(
        ("seconds", "age"), [(-3, "0:00:00"), (119, "0:01:59"), (7300, "2:01:40"), (86400 * 9.5, "9 days, 12:00:00")]
    )
    def test_age(self, seconds: float, age: str) -> None:
        text = runs_table([{"run": "a", "status": "stopped", "updated": 0.0}], now=seconds)
        assert text.endswith(f"  {age} ago")

    def test_nothing_is_cut_off_or_wrapped_on_any_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "40")
        run = f"s3://bucket/{'folder/' * 10}{'digits-' * 10}1"
        header, line = runs_table([RESULT | {"run": run}]).splitlines()
        assert "val/accuracy" in header
        assert line.startswith("digits-" * 10 + "1  completed")
        assert "0.3100        0.9400  val/accuracy 0.9510 at step 198" in line
        assert f"next: launcher plot {run}  " in summary(RESULT | {"run": run})

    def test_an_empty_store(self) -> None:
        assert runs_table([]) == "no runs"


class TestCheckpointsTable:
    def test_a_defect_stands_below(self) -> None:
        good = {"step": 5, "good": True, "bytes": 2**21, "created": "2026-01-01T00:00:00Z", "state_sha256": "ab" * 32}
        bad = {"step": 9, "good": False, "defect": "runs/a/checkpoints/step-00000009: model.safetensors is missing"}
        assert checkpoints_table(
            [good | {"metrics": {"val/loss": 0.5, **per_class(1000), "lr/0": 0.1}}, bad]
        ).splitlines() == [
            "step  whole    MiB  val/loss  state sha256      created",
            "   5  yes    2.000    0.5000  abababababababab  2026-01-01T00:00:00Z",
            "   9  no",
            "runs/a/checkpoints/step-00000009: model.safetensors is missing",
        ]

    def test_none(self) -> None:
        assert checkpoints_table([]) == "no checkpoints"
