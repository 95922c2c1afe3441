"""The benchmark of GPUs, of which nobody here has one, still runs: its smallest part, on the CPU."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import gpu


def test_the_smallest_part_runs_without_a_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"

    code = gpu.main(["--device", "cpu", "--parts", "memory", "--minutes", "5", "--json", str(found)])

    printed = capfd.readouterr().out
    assert code == 0, printed
    assert "4 shards" in printed
    document = json.loads(found.read_text())
    assert document["failed"] == {}
    assert document["parts"]["memory"]["1 shard"]["peak_mib"] > 0


def test_a_part_that_fails_is_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on, and the exit code says so."""
    found = tmp_path / "found.json"
    monkeypatch.setattr(gpu, "_run", lambda name, *_: (None, "broken") if name == "saver" else ({"n": 1}, ""))

    code = gpu.main(["--device", "cpu", "--parts", "saver,memory", "--json", str(found)])

    assert code == 1
    assert "saver failed: broken" in capfd.readouterr().out
    document = json.loads(found.read_text())
    assert document["failed"] == {"saver": "broken"}
    assert document["parts"]["memory"]["n"] == 1
