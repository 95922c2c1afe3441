"""Where a job is tried out, and what its failures there come to."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.capacity import Capacity, Node, Places, WorkerResources
from cluster.errors import ClusterError, DescriptionError, LauncherError, StorageError
from cluster.kinds.cluster import Cluster
from cluster.process import fork_server
from cluster.process.orders import Task
from cluster.process.workplace import Call
from cluster.scheduler import ClusterReport, Needs
from launcher.code.user_code import UserCode
from launcher.config.description import Description, parse
from launcher.planning.plan import Plan, make_plan
from tests.specs import TRIED

JOB = """\
name: digits
store: {store}
model: {{_target_: jobs.models.Net}}
data: {{train: jobs.data.digits}}
loss: CrossEntropyLoss
optimizer: SGD
workers: {{num: 2, cpus: 1, wait_s: 7, start_timeout_s: 8, first_step_timeout_s: 9}}
"""
CODE = UserCode(folders=("/code",), sha256="ab", submitted_from="/home/me", directory="job")


@dataclass
class FakeCluster(Cluster):
    """A cluster that has what a test gives it, and tries nothing out."""

    has: Capacity | None
    outcome: Any = TRIED
    calls: list[Call] = field(default_factory=list)
    prepared: list[tuple[str, Places]] = field(default_factory=list)

    def capacity(self) -> Capacity | None:
        return self.has

    def inspect(self, needs: Needs) -> ClusterReport:
        raise NotImplementedError

    def call(self, call: Call, tell: Callable[[str], None]) -> Any:
        self.calls.append(call)
        tell("on node 10.0.0.2")
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def joined(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def import_ahead(self) -> None:
        raise NotImplementedError

    def started(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def prepare_group(self, entry: str, places: Places) -> None:
        self.prepared.append((entry, places))

    def group(self, task: Task, places: Places) -> Any:
        raise NotImplementedError

    def nodes(self) -> list[Node]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def servers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What fork servers of this process were to import."""
    started: list[Any] = []
    monkeypatch.setattr(fork_server, "start", started.append)
    monkeypatch.setattr(fork_server, "stop", lambda: None)
    return started


@pytest.fixture
def job(tmp_path: Path) -> Description:
    return parse(JOB.format(store=tmp_path / "store"), "digits.yaml")


def node(number: int, *, is_here: bool = False, is_free: bool = False, **resources: float) -> Node:
    address, free = f"10.0.0.{number}", resources if is_free else {}
    return Node(id=address, address=address, resources=resources, free=free, drains_at=None, is_here=is_here)


HEAD = node(1, is_here=True, CPU=0.0)
CPUS, GPUS = node(2, CPU=4.0), node(3, CPU=4.0, GPU=2.0)


def plan(job: Description, cluster: Cluster, told: list[str] | None = None, *, may_wait: bool = True) -> Plan:
    said = [] if told is None else told
    return make_plan(job, "s3://runs/digits", CODE, cluster, said.append, may_wait=may_wait)


@pytest.mark.parametrize(("nodes", "gpus"), [([HEAD, CPUS], 0), ([HEAD, CPUS, GPUS], 1)], ids=["CPUs", "GPUs"])
def test_on_a_cluster_it_has_what_a_worker_has(job, servers, nodes, gpus):
    cluster, told = FakeCluster(Capacity(nodes=nodes, limits=None)), list[str]()

    made = plan(job, cluster, told)

    (call,) = cluster.calls
    assert call.resources == WorkerResources(cpus=1.0, gpus=gpus, accelerator=None)
    assert call.task == Task(
        entry="launcher.planning.dry_run:try_out", run_url="s3://runs/digits", import_paths=("/code",), code="ab",
        code_directory="job", working_directory=os.getcwd(), content=job.spec,
    )  # fmt: skip
    assert (call.wait_s, call.start_timeout_s, call.timeout_s) == (7, 8, 9)
    places = Places(resources=call.resources, least=2, most=2, placement="pack")
    assert cluster.prepared == [("jobs.training.worker:main", places)]
    forked = {"jobs.training.worker", "launcher.planning.dry_run"}
    assert forked <= set(call.modules), "the workers fork from the same server"
    assert (made.gpus, made.num_workers) == (gpus, 2)
    assert told == ["trying the job out: on node 10.0.0.2"]
    assert servers == [], "no worker will live here"


def test_a_host_that_holds_workers_imports_meanwhile(job, servers):
    cluster = FakeCluster(Capacity(nodes=[node(1, is_here=True, CPU=2.0)], limits=None))

    plan(job, cluster)

    assert servers == [cluster.calls[0].modules]


def test_on_this_machine_it_has_no_gpu(job, servers):
    cluster = FakeCluster(None)

    plan(job, cluster)

    assert cluster.calls[0].resources.gpus == 0
    assert servers == [cluster.calls[0].modules]


@pytest.mark.parametrize("limits", [None, {"CPU": 40.0, "GPU": 20.0}], ids=["busy", "with an autoscaler"])
def test_a_plan_that_may_not_wait_reserves_nothing_where_there_is_no_room(job, servers, limits, monkeypatch):
    here: list[Call] = []
    monkeypatch.setattr("launcher.planning.plan.call_here", lambda call, _: here.append(call) or TRIED)
    cluster, told = FakeCluster(Capacity(nodes=[HEAD, GPUS], limits=limits)), list[str]()

    made = plan(job, cluster, told, may_wait=False)

    assert (cluster.calls, cluster.prepared) == ([], [])
    (call,) = here
    assert (call.task.on_gpu, servers) == (False, [call.modules])
    assert made.gpus == 1, "the workers have what was written"
    assert made.why_wait.startswith("there is room for 0 of 2 workers now; ")
    assert told == ["trying the job out: on this host's CPU, since there is no room for one worker of 1 CPU, 1 GPU"]


def test_it_has_the_place_of_a_worker_where_there_is_room_for_one(job):
    room = node(2, is_free=True, CPU=1.0)
    cluster = FakeCluster(Capacity(nodes=[HEAD, CPUS, room], limits=None))

    plan(job, cluster, may_wait=False)

    assert len(cluster.calls) == 1


@pytest.mark.parametrize("may_wait", [True, False], ids=["to run", "to plan"])
def test_an_operator_that_would_raise_on_a_gpu_is_refused_where_workers_have_one(job, may_wait, monkeypatch):
    found = replace(TRIED, would_raise_on_gpu=("median in model.a", "histc"))
    monkeypatch.setattr("launcher.planning.plan.call_here", lambda *_: found)

    on_cpus = FakeCluster(Capacity(nodes=[HEAD, CPUS], limits=None), outcome=found)
    assert plan(job, on_cpus, may_wait=may_wait).gpus == 0

    with pytest.raises(DescriptionError) as caught:
        plan(job, FakeCluster(Capacity(nodes=[HEAD, GPUS], limits=None), outcome=found), may_wait=may_wait)
    assert str(caught.value) == (
        "digits.yaml: train.deterministic: torch has no deterministic implementation on GPUs of median in model.a, "
        "histc; replace it, or give up equal bits in every run with train.deterministic: false"
    )


@pytest.mark.parametrize(
    ("nodes", "could_fuse", "is_told"),
    [([HEAD, GPUS], True, True), ([HEAD, GPUS], False, False), ([CPUS], True, False)],
)
def test_a_wait_for_the_gpu_that_a_fused_optimizer_spares_is_told(job, nodes, could_fuse, is_told):
    cluster = FakeCluster(Capacity(nodes=nodes, limits=None), outcome=replace(TRIED, could_fuse=could_fuse))

    assert plan(job, cluster).hint.startswith("optimizer.fused: true ") == is_told


def test_what_can_never_fit_is_not_tried_out(job):
    cluster = FakeCluster(Capacity(nodes=[HEAD], limits=None))

    with pytest.raises(DescriptionError, match=r"^digits\.yaml: workers\.num must be at most 0 on this cluster"):
        plan(job, cluster)

    assert (cluster.calls, cluster.prepared) == ([], [])


@pytest.mark.parametrize(
    ("outcome", "kind", "message"),
    [
        (
            ChildProcessError("was killed by SIGKILL"),
            DescriptionError,
            "digits.yaml: model: the process that tried it out was killed by SIGKILL; is there enough memory?",
        ),
        (
            TimeoutError("has not returned within 9 s"),
            DescriptionError,
            "digits.yaml: model: the process that tried it out has not returned within 9 s "
            "(workers.first_step_timeout_s); raise that, or look at what model and data wait for",
        ),
        (DescriptionError("model: no"), DescriptionError, "digits.yaml: model: no"),
        (ClusterError("there is no room"), ClusterError, "there is no room"),
        (StorageError("code: gone"), StorageError, "code: gone"),
    ],
    ids=["it died", "it hung", "the description", "the cluster", "the store"],
)
def test_what_failed_there_is_one_line(job, outcome: Exception, kind: type[LauncherError], message: str):
    cluster = FakeCluster(Capacity(nodes=[CPUS], limits=None), outcome)

    with pytest.raises(kind) as caught:
        plan(job, cluster)

    assert str(caught.value) == message
