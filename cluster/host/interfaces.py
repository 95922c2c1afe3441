"""Which network interface has an address."""

import psutil


def interface_of(address: str) -> str:
    """The name of the interface that has an address of this host, be it its first one or another.

    Raises:
        OSError: No interface of this host has the address.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    raise OSError(f"no network interface has the address {address}; check the node's address in Ray")
