"""Which cluster is meant, and what it says of workers."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import DescriptionError
from cluster.kinds.ray import JoinedRay
from cluster.kinds.ray_jobs import RayJobs
from cluster.spec.kinds import KINDS
from cluster.spec.local import LocalClusterSpec
from cluster.spec.ray import RayClusterSpec
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec
from cluster.spec.worker import WorkerSpec
from launcher.config.cluster_addresses import is_typed
from launcher.config.clusters import load_cluster, load_jobs_cluster, open_cluster, open_scheduler
from launcher.config.description import load, parse
from launcher.config.reference import entries
from launcher.runs.changes import changes_of

SHIPPED = Path(__file__).parents[2] / "cluster"
JOB = Path(__file__).parents[2] / "jobs/digits.yaml"


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the person's own clusters, which does not exist."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config/launcher/clusters"


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


@pytest.mark.parametrize("login", [None, "me@login.uni.edu", "fe80::1", "me@fe80::1"])
def test_the_address_of_a_slurm_cluster_cannot_be_typed(login):
    spec = SlurmClusterSpec(partition="gpu", nodes=SlurmNodesSpec(cpus=8), login=login)
    assert not is_typed(spec.address)
    assert is_typed("slurm:6379"), "a Ray head on a host of that name"


@pytest.mark.parametrize(
    "address",
    [
        "http://head:8265", "https://ray.example.com:443", "http://10.0.0.1:8265/", "http://[fd00::1]:8265",
    ],
)  # fmt: skip
def test_one_that_is_submitted_to(address):
    spec, _ = load_cluster(address, ["cluster.env=[HOME,_A1]", "cluster.venv=/opt/my env"])
    assert spec == RayClusterSpec(address=address, env=("HOME", "_A1"), venv="/opt/my env")
    assert isinstance(open_scheduler(spec), RayJobs)
    with pytest.raises(
        DescriptionError, match=r"^cluster\.address: http.* takes jobs, and no drivers; use launcher submit"
    ):
        open_cluster(spec)


@pytest.mark.parametrize(
    "address",
    [
        "http://head", "http://head:0", "http://head:8265/x", "http://head:8265?token=a", "http://head:8265#a",
        "ftp://head:8265", "HTTP://head:8265", "http://:8265", "http://http://head:8265", "head:x", ":1", "a/b:1",
        "head:6379/", "fd00::1:6379", "http:// :1",
    ],
)  # fmt: skip
def test_what_is_no_address(address, write):
    with pytest.raises(DescriptionError, match=r"^own\.yaml: address must be HOST:PORT or http\(s\)://HOST:PORT, got "):
        load_cluster(write(f"kind: ray\naddress: '{address}'\n"), [])


def test_what_takes_no_jobs():
    with pytest.raises(DescriptionError) as caught:
        load_jobs_cluster("local", [])
    assert str(caught.value) == (
        "cluster.kind: local is this machine, which takes no jobs; use launcher run, or give --cluster the file of a "
        "Slurm cluster, or the Jobs API of a Ray cluster, such as http://HOST:8265"
    )
    with pytest.raises(DescriptionError) as caught:
        load_jobs_cluster("head:6379", [])
    assert str(caught.value) == (
        "cluster.address: head:6379 takes drivers, and no jobs; write http://head:8265, or where else the cluster's "
        "dashboard listens"
    )
    assert isinstance(open_cluster(RayClusterSpec(address="head:6379")), JoinedRay)


def test_a_shipped_one_reads_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert load_cluster("ray", [])[0] == RayClusterSpec(address="head:6379")
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    nodes = SlurmNodesSpec(cpus=4, gpus=2)
    spec = SlurmClusterSpec(partition="gpu", nodes=nodes)
    assert load_jobs_cluster("slurm", ["cluster.nodes.gpus=2"]) == (spec, [])
    monkeypatch.setenv("SBATCH_ACCOUNT", "vision")
    assert load_jobs_cluster("slurm", ["cluster.nodes.gpus=2"]) == (replace(spec, account="vision"), [])
    with pytest.raises(DescriptionError) as caught:
        open_cluster(spec)
    assert str(caught.value) == (
        "cluster.kind: slurm takes jobs, and no drivers; use launcher submit, or launcher render to see the script"
    )


def test_the_job_says_least_and_the_command_line_last(write):
    named = write("kind: ray\naddress: head:6379\nworker: {cpus: 8, gpus: 1, accelerator: H100}\n")
    cluster, changes = load_cluster(named, ["workers.cpus=2", "cluster.worker.gpus=0", "seed=5"])
    assert cluster == RayClusterSpec(address="head:6379", worker=WorkerSpec(cpus=8.0, gpus=0, accelerator="H100"))
    spec = load(JOB, changes).spec
    assert (spec.workers.cpus, spec.workers.gpus, spec.workers.accelerator, spec.seed) == (2.0, 0, "H100", 5)


def test_what_a_cluster_says_of_workers_holds_there_alone(write):
    named = write("kind: ray\naddress: head:6379\nworker: {cpus: 8, accelerator: H100}\n")
    description = load(JOB, load_cluster(named, ["workers.cpus=2"])[1])
    assert (description.spec.workers.cpus, description.spec.workers.accelerator) == (2.0, "H100")
    assert description.of_cluster == ('workers.accelerator="H100"',)
    stored = parse(description.text, "job.yaml").spec.workers
    assert (stored.cpus, stored.accelerator) == (2.0, None)
    assert changes_of(description.text, description) == []
    whole = load(JOB, load_cluster(named, ["workers={num: 2}"])[1])
    assert (whole.of_cluster, whole.spec.workers.accelerator) == ((), None)


def test_an_autoscaler_and_a_placement_are_declared(write):
    groups = "[{nodes: 8, cpus: 8, gpus: 1, accelerator: H100}, {nodes: 2, cpus: 4}]"
    named = write(f"kind: ray\naddress: head:6379\nautoscaler: {groups}\nworker: {{placement: spread}}\n")
    spec, changes = load_cluster(named, [])
    assert isinstance(spec, RayClusterSpec)
    assert [(group.most, dict(group.resources)) for group in spec.node_groups] == [
        (8, {"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100": 1.0}),
        (2, {"CPU": 4.0, "GPU": 0.0}),
    ]
    assert load(JOB, changes).spec.workers.placement == "spread"
    assert load(JOB, [*changes, "workers.placement=pack"]).spec.workers.placement == "pack"
    again, _ = load_cluster("head:6379", [f"cluster.{change}" for change in spec.driver_overrides()])
    assert again == spec


def test_text_that_looks_like_a_number_stays_text(write):
    named = write('kind: local\nworker: {accelerator: "1e3"}\n')
    assert load(JOB, load_cluster(named, [])[1]).spec.workers.accelerator == "1e3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "own.yaml: is empty; it needs kind"),
        ("[ray]", "own.yaml: must be a mapping, got ['ray']; it needs kind"),
        ("address: head:6379", "own.yaml: kind is missing; write one of local, ray, slurm"),
        ("kind: rya", "own.yaml: kind must be one of local, ray, slurm, got 'rya' (did you mean 'ray'?)"),
        ("kind: ray", "own.yaml: address is missing; write text"),
        (
            "kind: ray\naddress: head",
            "own.yaml: address must be HOST:PORT or http(s)://HOST:PORT, got 'head'; `ray start --head` printed it",
        ),
        (
            "kind: ray\naddress: http://h:8265\ntoken: secret",
            "own.yaml: token is not a known key (did you mean 'worker'?)",
        ),
        ("kind: ray\naddress: http://h:8265\nenv: HOME", "own.yaml: env must be a list of text, got 'HOME'"),
        (
            "kind: ray\naddress: http://h:8265\nenv: [HOME, KEY=secret]",
            "own.yaml: env[1] must be the name of an environment variable; values have no place here",
        ),
        (
            "kind: ray\naddress: http://h:8265\nvenv: venv",
            "own.yaml: venv must be the absolute path of a folder on the head, got 'venv'",
        ),
        (
            "kind: ray\naddress: http://h:8265\nstop_grace_s: 0",
            "own.yaml: stop_grace_s must be at least 1 second, got 0",
        ),
        (
            "kind: ray\naddress: http://h:8265\nstop_grace_s: 2.5",
            "own.yaml: stop_grace_s must be a whole number, got 2.5; write a whole number",
        ),
        (
            "kind: ray\naddress: http://h:8265\nautoscaler: [{nodes: 0, cpus: 1}]",
            "own.yaml: autoscaler[0].nodes must be at least 1, got 0",
        ),
        (
            "kind: ray\naddress: http://h:8265\nautoscaler: [{nodes: 1}]",
            "own.yaml: autoscaler[0].cpus is missing; write a number",
        ),
        (
            "kind: local\nworker: {placement: spraed}",
            "own.yaml: worker.placement must be pack, spread or null, got 'spraed' (did you mean 'spread'?)",
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
            "--cluster rya: is no cluster (did you mean 'ray'?); write HOST:PORT of a Ray head, "
            "http://HOST:8265 to submit there, the path of a YAML file, or one of local, ray, slurm",
        ),
        (
            "h:70000",
            [],
            "--cluster h:70000: address must be HOST:PORT or http(s)://HOST:PORT, got 'h:70000'; `ray start --head` "
            "printed it",
        ),
        (
            "http://h",
            [],
            "--cluster http://h: address must be HOST:PORT or http(s)://HOST:PORT, got 'http://h'; the Jobs API "
            "listens at port 8265 of the head",
        ),
        (
            "http://me:secret@h:8265",
            [],
            "--cluster: address must not hold a user, a password or a token; set RAY_AUTH_TOKEN",
        ),
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
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {"local", "ray", "slurm"}


class TestOwnClusters:
    @pytest.fixture(autouse=True)
    def _lab(self, own):
        own.mkdir(parents=True)
        (own / "lab.yaml").write_text("kind: ray\naddress: http://lab:8265\nvenv: /opt/venv\n")

    def test_one_is_found_by_its_name(self):
        assert load_cluster("lab", [])[0] == RayClusterSpec(address="http://lab:8265", venv="/opt/venv")

    def test_it_comes_before_one_that_is_shipped(self, own):
        (own / "ray.yaml").write_text("kind: ray\naddress: own:6379\n")
        assert load_cluster("ray", [])[0] == RayClusterSpec(address="own:6379")

    def test_a_mistake_in_it_is_named(self, own):
        (own / "lab.yaml").write_text("kind: ray\n")
        with pytest.raises(DescriptionError, match=r"^lab\.yaml: address is missing"):
            load_cluster("lab", [])

    def test_one_that_is_misspelt_is_told_with_all_that_are_known(self, own):
        (own / "._lab.yaml").touch()  # macOS leaves such a file on disks of other systems
        with pytest.raises(DescriptionError) as caught:
            load_cluster("lba", [])
        assert str(caught.value) == (
            "--cluster lba: is no cluster (did you mean 'lab'?); write HOST:PORT of a Ray head, http://HOST:8265 to "
            "submit there, the path of a YAML file, or one of lab, local, ray, slurm"
        )

    @pytest.mark.parametrize("configured", [None, "", "relative"])
    def test_they_lie_in_the_home_unless_the_configuration_is_elsewhere(self, own, tmp_path, monkeypatch, configured):
        home = tmp_path / "home"
        (home / ".config").mkdir(parents=True)
        own.parent.rename(home / ".config/launcher")
        monkeypatch.setenv("HOME", str(home))
        if configured is None:
            monkeypatch.delenv("XDG_CONFIG_HOME")
        else:
            monkeypatch.setenv("XDG_CONFIG_HOME", configured)
        assert load_cluster("lab", [])[0] == RayClusterSpec(address="http://lab:8265", venv="/opt/venv")
