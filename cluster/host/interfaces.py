"""The network interface that workers use."""

import os
from typing import Any

import psutil


def choose_interface(address: str) -> None:
    """Makes gloo and NCCL use the interface with this host's address in the cluster, unless the user chose one.

    By default gloo takes the interface that the host's name resolves to, which other hosts may be unable to reach. NCCL
    takes a name as a prefix, eth1 for eth10 too, unless it begins with ``=``.

    Raises:
        OSError: No interface has the address.
    """
    for name, exactly in (("GLOO_SOCKET_IFNAME", ""), ("NCCL_SOCKET_IFNAME", "=")):
        if not os.environ.get(name):
            os.environ[name] = exactly + interface_of(address)


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
