"""Who works: GPUs or CPUs, and how many, by what a cluster has and may get."""

import sys
from dataclasses import replace
from typing import Any

import pytest

from cluster.capacity import Capacity, Node, NodeGroup, node_resources
from cluster.errors import DescriptionError
from jobs.spec import JobSpec, TrainSpec, WorkersSpec
from launcher.planning.placement import Decision, decide_workers, most_per_host, why_wait
from tests.specs import bare_job


def node(cpus: float = 8.0, gpus: float = 0.0) -> Node:
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return Node(id="n", address="10.0.0.1", resources=resources, free=resources, drains_at=None, is_here=False)


def job(**workers: Any) -> JobSpec:
    return bare_job(train=TrainSpec(shards=4), workers=WorkersSpec(**{"num": 2, "cpus": 0.01} | workers))


def decide(capacity: Capacity | None, gpus_here: int = 0, **workers: Any) -> Decision:
    return decide_workers(job(**workers), capacity, gpus_here)


HEAD = [node()]
GROWS = Capacity(nodes=HEAD, limits={"CPU": 32.0, "GPU": 4.0})
"""GPU nodes may come to a head that has none."""


@pytest.mark.parametrize(
    "capacity",
    [
        pytest.param(Capacity(nodes=[node(gpus=2.0)], limits=None), id="there"),
        pytest.param(Capacity(nodes=[node(gpus=1.0), node(gpus=1.0)], limits={"CPU": 16.0}), id="on two nodes"),
        pytest.param(GROWS, id="to come"),
        pytest.param(Capacity(nodes=[node(gpus=1.0)], limits={"CPU": 16.0, "GPU": 2.0}), id="one there, one to come"),
        pytest.param(Capacity(nodes=[], limits={"CPU": sys.maxsize, "GPU": sys.maxsize}), id="any number to come"),
    ],
)
def test_auto_means_gpus_where_the_cluster_has_or_may_get_enough(capacity: Capacity) -> None:
    assert decide(capacity) == Decision(gpus=1, num_workers=2, why_cpu="")


@pytest.mark.parametrize(
    ("capacity", "has"),
    [
        (Capacity(nodes=HEAD, limits=None), "no GPU"),
        (Capacity(nodes=HEAD, limits={"CPU": 32.0}), "no GPU"),
        (Capacity(nodes=HEAD, limits={"CPU": 32.0, "GPU": 0.0}), "no GPU"),
        (Capacity(nodes=[node(gpus=1.0)], limits=None), "1 GPU"),
        (Capacity(nodes=HEAD, limits={"CPU": 32.0, "GPU": 1.0}), "1 GPU"),
    ],
    ids=["none there", "none to come", "a group of none", "too few there", "too few to come"],
)
def test_else_cpus_and_that_is_said(capacity: Capacity, has: str) -> None:
    decision = decide(capacity)

    assert (decision.gpus, decision.num_workers) == (0, 2)
    assert decision.why_cpu == (
        f"this cluster has {has} for 2 workers: workers.gpus=auto means CPU; "
        "write workers.gpus=1 to insist on GPUs, or 0 if CPUs are meant"
    )


def test_this_machine_says_it_only_where_it_has_a_gpu() -> None:
    assert decide(None) == Decision(gpus=0, num_workers=2, why_cpu="")
    assert decide(None, gpus_here=2) == Decision(gpus=1, num_workers=2, why_cpu="")
    assert decide(None, gpus_here=1).why_cpu.startswith("this machine has 1 GPU for 2 workers: ")
    assert decide(None, gpus_here=1, num=(1, 4)) == Decision(gpus=1, num_workers=1, why_cpu="")


@pytest.mark.parametrize(
    ("capacity", "most"),
    [
        (None, 2),
        (Capacity(nodes=[node(2.0), node(3.0)], limits=None), 3),
        (Capacity(nodes=[node(), node()], limits=None), 4),
        (Capacity(nodes=[], limits={"CPU": 32.0}, groups=(NodeGroup(most=9, resources={"CPU": 2.0}),)), 2),
        (Capacity(nodes=[], limits={"CPU": 32.0}), 4),
    ],
    ids=["this machine", "the larger node", "all on one", "a declared node", "unknown nodes"],
)
def test_the_most_workers_of_a_host(capacity: Capacity | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.planning.placement.num_cores", lambda: 2)
    spec = job(num=(1, 4), cpus=1.0, gpus=0)
    assert most_per_host(spec.workers, capacity, decide_workers(spec, capacity, gpus_here=0)) == most


def test_nothing_is_said_where_cpus_are_written() -> None:
    assert decide(GROWS, gpus=0) == Decision(gpus=0, num_workers=2, why_cpu="")


def test_gpus_that_are_written_are_waited_for_if_they_may_come() -> None:
    assert decide(GROWS, gpus=1) == Decision(gpus=1, num_workers=2, why_cpu="")
    with pytest.raises(DescriptionError, match=r"needs 2 GPUs, and this cluster has 0; lower workers.num or set"):
        decide(Capacity(nodes=HEAD, limits={"CPU": 32.0}), gpus=1)


def test_workers_that_do_not_fit_yet_are_waited_for_if_there_may_be_room() -> None:
    small = [node(cpus=1.0)]
    assert decide(Capacity(nodes=small, limits={"CPU": 8.0}), gpus=0, num=4, cpus=2.0).num_workers == 4
    assert decide(Capacity(nodes=[node()], limits={"CPU": 32.0}), gpus=0, num=(2, 4), cpus=2.5).num_workers == 3
    with pytest.raises(DescriptionError, match=r"at most 0 on this cluster: .* of 2 CPU fit on its 1 node, got 4"):
        decide(Capacity(nodes=small, limits=None), gpus=0, num=4, cpus=2.0)
    with pytest.raises(
        DescriptionError, match=r"at most 3 on this cluster: .* fit on the nodes that it may have, got 4"
    ):
        decide(Capacity(nodes=small, limits={"CPU": 7.0}), gpus=0, num=4, cpus=2.0)


def test_a_kind_of_gpu_that_no_node_group_names_may_not_come_unless_it_is_declared() -> None:
    with pytest.raises(DescriptionError) as caught:
        decide(GROWS, accelerator="H100")
    assert str(caught.value) == (
        "workers.num must be at most 0 on this cluster: so many workers of 0.01 CPU, 1 GPU, H100 fit on the nodes that "
        "it may have, got 2; add nodes, or lower workers.num; if its autoscaler may start such nodes, write them as "
        "cluster.autoscaler"
    )
    h100s = NodeGroup(most=2, resources=node_resources(8.0, 1, "H100"))
    assert decide(GROWS.declared([h100s]), accelerator="H100").gpus == 1
    with pytest.raises(DescriptionError, match=r"at most 2 on this cluster: .* got 4; .* lower workers.num$"):
        decide(GROWS.declared([h100s]), num=4, accelerator="H100")
    named = {"CPU": 32.0, "GPU": 4.0, "accelerator_type:H100": 2.0}
    assert decide(Capacity(nodes=HEAD, limits=named), accelerator="H100").gpus == 1


def test_what_is_declared_of_an_autoscaler_counts_node_by_node() -> None:
    """Of what a cluster tells only the sum is known."""
    head, h100s = [node(cpus=0.0)], NodeGroup(most=4, resources=node_resources(8.0, 1, "H100"))
    grows = Capacity(nodes=head, limits=None, groups=[h100s])

    assert decide(grows, num=4, cpus=8.0, accelerator="H100") == Decision(gpus=1, num_workers=4, why_cpu="")
    assert decide(grows, num=4, cpus=2.0, gpus=0, accelerator="H100").num_workers == 4
    for workers in ({"cpus": 9.0}, {"accelerator": "A100"}):
        with pytest.raises(DescriptionError, match="at most 0 on this cluster: .* fit on the nodes that it may have"):
            decide(grows, **workers)
    with pytest.raises(DescriptionError, match=r"at most 0 on this cluster: .* fit on its 1 node, got 2; add nodes"):
        decide(Capacity(nodes=head, limits=None))


def test_what_a_run_would_wait_for_is_told() -> None:
    full = replace(node(), free={"CPU": 0.01})
    assert why_wait(job(), Capacity(nodes=[node()], limits=None), gpus=0) == why_wait(job(), None, gpus=0) == ""
    assert why_wait(job(num=(1, 4)), Capacity(nodes=[full], limits=None), gpus=0) == ""
    assert why_wait(job(wait_s=60.0), Capacity(nodes=[full], limits=None), gpus=0) == (
        "there is room for 1 of 2 workers now; the run waits for more, for up to 60 s (workers.wait_s)"
    )
    assert why_wait(job(), GROWS, gpus=1).startswith("there is room for 0 of 2 workers now; ")


def test_an_accelerator_that_this_machine_lacks() -> None:
    with pytest.raises(DescriptionError) as caught:
        decide(None, accelerator="H100")
    assert str(caught.value) == (
        "workers.accelerator=H100: this machine has no accelerator; remove it, or run on a cluster that has such nodes"
    )
    with pytest.raises(DescriptionError, match="^workers.accelerator=H100: this machine has A100; "):
        decide_workers(job(accelerator="H100"), None, gpus_here=2, accelerator_here="A100")
    assert decide_workers(job(accelerator="H100"), None, gpus_here=2, accelerator_here="H100").gpus == 1
