"""The processes of a DataLoader, forked from the fork server."""

import os
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext

from cluster.host.gpus import WITHOUT_GPUS
from cluster.process.fork_server import ChildProcess


class _LoaderProcess(ChildProcess):
    """A process that sees no GPU: a dataset that uses one would share it with the training process, or take another's.

    A dataset that needs one fails, and CUDA says why.
    """

    def environment(self) -> Mapping[str, str]:
        return {**os.environ, **WITHOUT_GPUS}


class _Context(ForkServerContext):
    Process = _LoaderProcess


CONTEXT = _Context()
"""The ``multiprocessing`` context of a DataLoader."""
