"""The process that others are forked from: what they need is imported, no thread runs in it, no GPU was touched.

It is the standard library's fork server, with one thing added: any process of the same user and host can fork
from it, not only the one that started it. So one import of torch, begun while Ray starts, serves all agents of the
driver's host, every restart of a training process, and the loader processes of each.
"""

import multiprocessing.forkserver
import os
import sys
from collections.abc import Sequence
from multiprocessing.forkserver import ForkServer
from multiprocessing.resource_tracker import ensure_running as ensure_tracker_running
from typing import Any

# From 3.14 on a client needs a key, which would have to travel; there, every process starts its own server.
_CAN_SHARE = sys.version_info < (3, 14)


def start(modules: Sequence[str]) -> str | None:
    """Starts this process's own server, which imports the modules in the background and ends with this process.

    Returns:
        The server's address for ``use``, or None if others cannot use it.
    """
    multiprocessing.forkserver.set_forkserver_preload(list(modules))
    multiprocessing.forkserver.ensure_running()
    return own_address()


def use(address: str) -> None:
    """From now on ``multiprocessing.get_context("forkserver")`` forks from the server at ``address``."""
    shared = _SharedServer(address)
    multiprocessing.forkserver._forkserver = shared
    multiprocessing.forkserver.connect_to_new_process = shared.connect_to_new_process


def own_address() -> str | None:
    """The address of the server that this process has started, or was forked from."""
    server: Any = multiprocessing.forkserver._forkserver
    return server._forkserver_address if _CAN_SHARE else None


def is_here(address: str) -> bool:
    """Whether the server is on this host: its address is a socket's path in a temporary folder of its own."""
    return os.path.exists(address)


class _SharedServer(ForkServer):
    """The client's side of a server that another process has started, and will end."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._forkserver_address = address
        # Every request hands over a descriptor that keeps the server alive; this one keeps nothing alive.
        self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)

    def ensure_running(self) -> None:
        ensure_tracker_running()
