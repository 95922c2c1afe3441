"""Which interface has an address."""

import os

import pytest

from cluster.host.interfaces import interface_of
from jobs.training.worker import choose_interface


def test_loopback_has_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"


def test_an_address_of_another_host() -> None:
    with pytest.raises(OSError, match=r"no network interface has the address 192\.0\.2\.77"):
        interface_of("192.0.2.77")


def test_the_interface_that_a_user_has_chosen_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    choose_interface("127.0.0.1")
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["GLOO_SOCKET_IFNAME"]) == ("ib0", "lo")
