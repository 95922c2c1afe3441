"""Which interface has an address."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest

from cluster.host.interfaces import interface_of
from jobs.training.worker import choose_interface


def test_loopback_has_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"


def test_an_address_that_is_not_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses(*of: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(family=socket.AF_INET, address=address) for address in of]

    found = {"lo": addresses("127.0.0.1"), "eth0": addresses("192.0.2.1", "192.0.2.77")}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    assert interface_of("192.0.2.77") == "eth0"


def test_an_address_of_another_host() -> None:
    with pytest.raises(OSError, match=r"no network interface has the address 192\.0\.2\.77"):
        interface_of("192.0.2.77")


def test_the_interface_that_a_user_has_chosen_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    choose_interface("127.0.0.1")
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["GLOO_SOCKET_IFNAME"]) == ("ib0", "lo")
