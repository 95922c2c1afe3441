"""The network interface of an address."""

from typing import Any

import psutil


def interface_of(address: str) -> str:
    """Returns the name of the interface that has an address of this host; an interface may have several.

    Raises:
        OSError: No interface of this host has the address.
    """
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(each.address == address for each in addresses):
            return name
    raise OSError(f"no network interface has the address {address}; check the node's address in Ray")
