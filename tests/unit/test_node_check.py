"""What a node finds out about itself, and the line by which a cluster tells it."""

import json
import math
import pickle
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import versions as version_module
from cluster.capacity import Capacity, Node, NodeGroup
from cluster.inspection import nodes
from cluster.inspection.nodes import (
    inspect_node,
    needs_from_text,
    needs_to_text,
    report_from_log,
    report_to_text,
    without_report,
)
from cluster.ray import cluster, inspection
from cluster.scheduler import ClusterReport, Needs, NodeReport
from cluster.storage.deadline import OverrunError
from cluster.storage.store import Store
from cluster.storage.typed_json import from_json
from cluster.versions import launcher_digest, submission_versions, torch_version, versions

NODE = Node(
    id="a1", address="10.0.0.1", resources={"CPU": 8.0, "GPU": 1.0}, free={"CPU": 2.0}, drains_at=None, is_here=True
)
REPORT = NodeReport(
    id="a1",
    address="10.0.0.1",
    versions={"python": "3.11", "ray": "2.60.0", "torch": "2.14.1", "launcher": "a" * 64},
    missing=("KEY",),
    store_error="",
)
CLUSTER = ClusterReport(
    capacity=Capacity(
        nodes=(NODE, replace(NODE, id="b2", drains_at=math.inf)),
        limits={"GPU": float(2**63)},
        groups=(NodeGroup(most=2, resources={"CPU": 1.0}),),
    ),
    nodes=(REPORT,),
    silent=("10.0.0.2",),
)


TEXT = report_to_text(CLUSTER)


def test_a_line_is_read_as_it_was_written() -> None:
    for report in (CLUSTER, replace(CLUSTER, capacity=Capacity(nodes=(), limits=None), nodes=(), silent=())):
        assert report_from_log(f"Running entrypoint for job x\n2026 INFO{report_to_text(report)}more\n") == report
    assert report_to_text(CLUSTER).count("\n") == 2


def test_people_do_not_see_it() -> None:
    assert without_report(f"job x\n2026 INFO{TEXT}more\n\n") == "job x\n2026 INFOmore\n\n"


@pytest.mark.parametrize("log", ["", "Running entrypoint for job x\n", f"x {TEXT.strip()}\n", TEXT[:-1], TEXT[:9]])
def test_a_line_that_is_not_there_yet(log: str) -> None:
    assert report_from_log(log) is None


def changed(change: Any) -> str:
    mark, _, found = TEXT.partition(": ")
    document = json.loads(found)
    change(document)
    return f"{mark}: {json.dumps(document)}\n"


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (TEXT + TEXT, "there are 2 results"),
        (f"{TEXT[:-2]}\n", "it: Invalid JSON: EOF"),
        (changed(lambda found: found.pop("silent")), "silent: Field required"),
        (
            changed(lambda found: found["nodes"][0].update(more=1)),
            r"nodes\[0\]\.more: unknown key",
        ),
        (
            changed(lambda found: found["nodes"][0].update(missing="KEY")),
            r"\[0\]\.missing: Input .* array, got 'KEY'",
        ),
        (changed(lambda found: found.update(silent=[1])), r"silent\[0\]: Input should be a valid string, got 1"),
        (
            changed(lambda found: found["nodes"][0]["versions"].update(ray=2.6)),
            r"versions\.ray: Input .* string, got 2\.6",
        ),
        (
            changed(lambda found: found["capacity"]["nodes"][0]["free"].update(CPU=True)),
            r"free\.CPU: .* number, got True",
        ),
        (
            changed(lambda found: found["capacity"]["nodes"][0]["free"].update(CPU=math.nan)),
            r"free\.CPU: .* number, got nan",
        ),
        (
            changed(lambda found: found["capacity"]["nodes"][0].update(is_here=0)),
            r"is_here: Input .* boolean, got 0",
        ),
        (
            changed(lambda found: found["capacity"]["nodes"][0].update(drains_at="now")),
            r"drains_at: .* number, got 'now'",
        ),
        (changed(lambda found: found.update(capacity=None)), r"capacity: Input should be an object, got None"),
    ],
)
def test_another_line_is_refused(log: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report_from_log(log)


def test_needs_hold_nothing_that_ray_replaces() -> None:
    needs = Needs(store="s3://b/$HOME/${X}", variables=("A", "B"), check="$c")
    assert "$" not in needs_to_text(needs)
    assert needs_from_text(needs_to_text(needs)) == needs
    with pytest.raises(ValueError, match="store: Field required"):
        needs_from_text('{"variables": []}')


def test_what_a_node_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "1")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    Store(str(tmp_path / "runs")).write("check/submitter", b"text")
    needs = Needs(store=str(tmp_path / "runs"), variables=("SET", "EMPTY", "UNSET"), check="check")
    found = inspect_node(needs, "a1")
    assert found == {"versions": submission_versions(), "missing": ["EMPTY", "UNSET"], "store_error": ""}
    assert versions()["launcher"] == launcher_digest()
    assert Store(needs.store).names() == ["check/a1", "check/submitter"]


def test_a_store_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, message in (
        (f"{tmp_path}/runs", "is a folder of its own there, not the one here"),
        ("memory://runs", "is another store there than here"),
        ("s4://bucket", "unknown protocol 's4'"),
    ):
        error = nodes.store_error(Needs(store=url, variables=(), check="check"), "a1")
        assert error.startswith(url)
        assert message in error
        assert "\n" not in error
    assert list(tmp_path.iterdir()) == []

    def hang(*_: object) -> None:
        raise OverrunError("no answer within 30 s")

    monkeypatch.setattr(Store, "read", hang)
    assert nodes.store_error(Needs(store="/s", variables=(), check="check"), "a1") == (
        "/s: no answer within 30 s; check the URL, and whether this host may reach it"
    )


def test_the_version_of_torch_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_version() == str(torch.__version__)
    monkeypatch.delitem(sys.modules, "torch")
    assert torch_version() == str(torch.__version__)
    assert "torch" not in sys.modules
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert torch_version() == "none"


def test_the_version_of_a_submission_covers_all_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of workers covers only what decides on bits."""
    for package in ("jobs", "cluster", "launcher"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text("1")
    monkeypatch.setattr(version_module, "__file__", str(tmp_path / "cluster/versions.py"))

    def both() -> tuple[str, str]:
        version_module._source_digest.cache_clear()
        return launcher_digest(), submission_versions()["launcher"]

    try:
        workers, submission = both()
        assert workers != submission
        (tmp_path / "launcher/a.py").write_text("2")
        assert both()[0] == workers
        changed_submission = both()[1]
        assert changed_submission != submission
        (tmp_path / "jobs/a.py").write_text("2")
        assert both()[0] != workers
        assert both()[1] != changed_submission
    finally:
        version_module._source_digest.cache_clear()


def test_a_node_without_the_product_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray carries to the node is whole: nothing of this module is imported there."""
    from ray import cloudpickle

    needs = needs_to_text(Needs(store=str(tmp_path), variables=(), check="check"))
    Store(str(tmp_path)).write("check/submitter", b"text")
    cloudpickle.register_pickle_by_value(inspection)
    try:
        carried = cloudpickle.dumps(inspection.NodeCheck)
    finally:
        cloudpickle.unregister_pickle_by_value(inspection)
    there = json.loads(pickle.loads(carried)().inspect(needs, "a1"))  # noqa: S301  # made above
    assert there["store_error"] == ""
    assert set(there["versions"]) == {"python", "ray", "torch", "launcher"}
    from_json(NodeReport, json.dumps({"id": "a1", "address": "10.0.0.1", **there}))

    for name in [name for name in sys.modules if name.partition(".")[0] == "cluster"]:
        monkeypatch.setitem(sys.modules, name, None)
    without = json.loads(pickle.loads(carried)().inspect(needs, "a1"))  # noqa: S301
    assert without["versions"] == {**there["versions"], "torch": "unknown", "launcher": "none"}
    assert without["store_error"].startswith("launcher cannot be used there: ")
    assert without["store_error"].endswith("; install it on every node")


@pytest.mark.parametrize("missing", ["RAY_ADDRESS", nodes.NEEDS_VARIABLE])
def test_outside_of_a_job(missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv(nodes.NEEDS_VARIABLE, needs_to_text(Needs(store="/s", variables=(), check="c")))
    monkeypatch.delenv(missing)
    assert inspection.main() == 5
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.endswith("begin this as a job of Ray\n")


def test_needs_of_another_version_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv(nodes.NEEDS_VARIABLE, '{"store": "/s"}')
    assert inspection.main() == 5
    assert capsys.readouterr().err == (
        "LAUNCHER_NODE_NEEDS: variables: Field required; install the same version of launcher here and on the cluster\n"
    )


def test_what_the_job_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv(nodes.NEEDS_VARIABLE, needs_to_text(Needs(store="/s", variables=(), check="c")))
    monkeypatch.setattr(cluster, "joined_cluster", lambda _: nullcontext())
    monkeypatch.setattr(inspection, "inspect_nodes", lambda _: CLUSTER)
    assert inspection.main() == 0
    assert report_from_log(capsys.readouterr().out) == CLUSTER
