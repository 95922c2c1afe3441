"""Which cluster is meant, and what it says of workers."""

from pathlib import Path

import pytest

from cluster.errors import DescriptionError
from cluster.spec import KINDS, LocalClusterSpec, RayClusterSpec, WorkerSpec
from launcher.clusters import load_cluster
from launcher.description import load
from launcher.schema import entries

SHIPPED = Path(__file__).parents[2] / "cluster"
JOB = Path(__file__).parents[2] / "jobs/digits.yaml"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def to_file(text: str) -> str:
        Path("own.yaml").write_text(text)
        return "own.yaml"

    return to_file


def test_without_a_name_it_is_this_machine():
    assert load_cluster(None, ["seed=1"]) == (LocalClusterSpec(), ["seed=1"])
    assert load_cluster("local", ["seed=1"]) == (LocalClusterSpec(), ["seed=1"])


def test_an_address_is_that_of_a_ray_head():
    assert load_cluster("10.0.0.1:6379", [])[0] == RayClusterSpec(address="10.0.0.1:6379")


def test_a_shipped_one_reads_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert load_cluster("ray", [])[0] == RayClusterSpec(address="head:6379")


def test_the_job_says_least_and_the_command_line_last(write):
    named = write("kind: ray\naddress: head:6379\nworker: {cpus: 8, gpus: 1, accelerator: H100}\n")
    cluster, changes = load_cluster(named, ["workers.cpus=2", "cluster.worker.gpus=0", "seed=5"])
    assert cluster == RayClusterSpec(address="head:6379", worker=WorkerSpec(cpus=8.0, gpus=0, accelerator="H100"))
    spec = load(JOB, changes).spec
    assert (spec.workers.cpus, spec.workers.gpus, spec.workers.accelerator, spec.seed) == (2.0, 0, "H100", 5)


def test_text_that_looks_like_a_number_stays_text(write):
    named = write('kind: local\nworker: {accelerator: "1e3"}\n')
    assert load(JOB, load_cluster(named, [])[1]).spec.workers.accelerator == "1e3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "own.yaml: is empty; it needs kind"),
        ("[ray]", "own.yaml: must be a mapping, got ['ray']; it needs kind"),
        ("address: head:6379", "own.yaml: kind is missing; write one of local, ray"),
        ("kind: rya", "own.yaml: kind must be one of local, ray, got 'rya' (did you mean 'ray'?)"),
        ("kind: ray", "own.yaml: address is missing; write text"),
        (
            "kind: ray\naddress: head",
            "own.yaml: address must be HOST:PORT, got 'head'; `ray start --head` printed it",
        ),
        ("kind: local\naddress: head:1", "own.yaml: address is not a known key; the keys here are kind, worker"),
        ("kind: local\nworker: {cpu: 1}", "own.yaml: worker.cpu is not a known key (did you mean 'cpus'?)"),
        ("kind: local\nworker: {cpus: 0}", "own.yaml: worker.cpus must be finite and above 0, got 0.0"),
        (
            "kind: local\nworker: {gpus: 2}",
            "own.yaml: worker.gpus must be 0 or 1, got 2; a worker drives one GPU, raise workers.num",
        ),
    ],
)
def test_what_is_wrong_with_a_file(write, text, message):
    with pytest.raises(DescriptionError) as caught:
        load_cluster(write(text), [])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("named", "overrides", "message"),
    [
        (
            "rya",
            [],
            "--cluster rya: is no cluster (did you mean 'ray'?); write HOST:PORT of a Ray head, the path of a YAML "
            "file, or one of local, ray",
        ),
        ("h:70000", [], "--cluster h:70000: address must be HOST:PORT, got 'h:70000'; `ray start --head` printed it"),
        (None, ["cluster.kind=ray"], "command line: cluster.kind=ray changes a cluster; name it with --cluster"),
        ("local", ["cluster.worker.gpus=two"], "command line: worker.gpus must be a whole number or null, got 'two'"),
    ],
)
def test_what_is_wrong_on_the_command_line(named, overrides, message):
    with pytest.raises(DescriptionError) as caught:
        load_cluster(named, overrides)
    assert str(caught.value) == message


def test_every_key_is_documented_and_every_shipped_file_is_of_a_kind():
    for kind, language in KINDS.items():
        assert all(entry.doc for entry in entries(language) if entry.key != "kind"), kind
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {"local", "ray"}
