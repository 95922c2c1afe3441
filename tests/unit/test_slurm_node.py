"""What the program of each node of a Slurm job asks: its address, its folder, and whether the script still lives."""

import socket
import tempfile
from collections.abc import Callable

import pytest

from cluster.errors import ClusterError
from cluster.kinds.slurm import node


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, ...]]]:
    """Have Slurm answer one question after the other, and return the list of what is asked."""

    def plan(*answers: str) -> list[tuple[str, ...]]:
        asked: list[tuple[str, ...]] = []
        left = iter(answers)
        monkeypatch.setattr(node, "_ask", lambda *command: asked.append(command) or next(left, ""))
        return asked

    return plan


@pytest.mark.parametrize(
    ("names", "num_nodes", "shown", "head", "address"),
    [
        ({"n2": "10.0.0.2"}, 2, "", "10.0.0.1:6379", "10.0.0.2"),
        ({"n2": "127.0.1.1"}, 2, "NodeName=n2 NodeAddr=n2.ib NodeHostName=n2", None, "10.1.0.2"),
        ({}, 2, "NodeName=n2 NodeAddr=10.9.0.2 X=1", None, "10.9.0.2"),
        ({"n2": "127.0.1.1"}, 1, "", None, "127.0.0.1"),
        ({}, 2, "NodeName=n2 NodeAddr=n2 X=1", "127.0.0.1:6379", "127.0.0.1"),  # on the way to its head
    ],
)
def test_the_address_of_a_node(monkeypatch, answers, names, num_nodes, shown, head, address) -> None:
    def resolve(name: str) -> str:
        known = {"n2.ib": "10.1.0.2", "10.9.0.2": "10.9.0.2", **names}
        if name not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return known[name]

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(num_nodes))
    answers(shown)
    assert node._address_of("n2", head) == address


def test_a_first_node_without_an_address_says_what_to_look_at(monkeypatch, answers) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    answers("")
    with pytest.raises(ClusterError, match=r"n1 and Slurm's NodeAddr, have no address here .*/etc/hosts and DNS"):
        node._address_of("n1", None)


def test_a_temporary_folder_with_a_long_path_is_not_for_sockets(monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/scratch/local/me")
    assert node._parent() == "/scratch/local/me"
    monkeypatch.setattr(tempfile, "tempdir", f"/scratch/{'a-long-name/' * 5}")
    assert node._parent() == "/tmp"


def test_a_suspended_job_is_watched_until_it_runs_or_ends(monkeypatch, answers) -> None:
    monkeypatch.setattr(node, "_has_ended", lambda _: False)
    monkeypatch.setenv("LAUNCHER_JOB_REQUEUES", "1")
    shown = "JobId=7 JobState={} Restarts=0 NodeList=n2 "
    asked = answers(shown.format("SUSPENDED"), shown.format("RUNNING"), "n2", "", shown.format("COMPLETING"))
    node._end_without_script("7_3", "n1")
    assert ("scontrol", "requeue", "7_3") in asked
    assert {command[-1] for command in asked} == {"7_3", "n2"}


def test_a_job_whose_nodes_slurm_does_not_name_is_left_alone(monkeypatch, answers) -> None:
    monkeypatch.setattr(node, "_has_ended", lambda _: False)
    shown = "JobId=7 JobState={} Restarts=0 NodeList=n[1-2] "
    asked = answers(shown.format("RUNNING"), "", shown.format("COMPLETED"))
    node._end_without_script("7", "n1")
    assert [command[1] for command in asked] == ["show"] * 3
