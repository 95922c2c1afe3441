"""How a person names a cluster whose address is known: some addresses can be typed, others are names for people."""

import re
import shlex

_TYPED = re.compile(r"(?!slurm:.*:)[^/]+:\d+|https?://.*")
"""Not slurm:LOGIN, whose login may be an IPv6 address; slurm:6379 is a Ray head."""


def is_typed(address: str) -> bool:
    """Return whether ``--cluster`` takes an address: HOST:PORT of a Ray head, http(s)://HOST:PORT of its Jobs API."""
    return _TYPED.fullmatch(address) is not None


def cluster_option(address: str | None) -> str:
    """Return ``--cluster`` and the address, for a command to copy; a placeholder if the address cannot be typed."""
    return f"--cluster {shlex.quote(address) if address and is_typed(address) else 'CLUSTER'}"


def give_cluster(address: str) -> str:
    """Return what to do with ``--cluster``, for a sentence that has told the address of a cluster."""
    return f"give --cluster {'that' if is_typed(address) else 'its file'}"
