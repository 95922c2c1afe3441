"""Which interface has an address."""

import pytest

from cluster.network import interface_of


def test_loopback_has_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"


def test_an_address_of_another_host() -> None:
    with pytest.raises(OSError, match=r"no network interface has the address 192\.0\.2\.77"):
        interface_of("192.0.2.77")
