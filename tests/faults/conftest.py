from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.faults.hosts import Host, hosts, why_there_can_be_none
from tests.faults.slurm import Slurm, slurm
from tests.faults.slurm import why_there_can_be_none as why_no_slurm


@pytest.fixture
def make_hosts() -> Iterator[Callable[..., list[Host]]]:
    """Makes hosts of these names, which last as long as the test; skips the test where there can be none."""
    if reason := why_there_can_be_none():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield lambda *names: stack.enter_context(hosts(*names))


@pytest.fixture
def make_slurm() -> Iterator[Callable[..., Slurm]]:
    """Makes a Slurm with nodes of these names, which lasts as long as the test; skips where there can be none."""
    if reason := why_no_slurm():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield lambda *names, **settings: stack.enter_context(slurm(*names, settings=settings))
