"""Which interface has an address, and which one gloo and NCCL use."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest

from cluster.host.interfaces import choose_interface, interface_of


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


@pytest.mark.parametrize("chosen", ["ib0", "eth1,eth2", "=ens", "^docker"])
def test_the_interface_that_a_user_has_chosen_is_taken(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", chosen)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
    choose_interface("192.0.2.77")  # of no interface, so it is not looked for
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["GLOO_SOCKET_IFNAME"]) == (chosen, chosen)


def test_gloo_and_nccl_are_chosen_for_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    choose_interface("127.0.0.1")
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["GLOO_SOCKET_IFNAME"]) == ("ib0", "lo")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    choose_interface("127.0.0.1")
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["GLOO_SOCKET_IFNAME"]) == ("=lo", "eth1")
