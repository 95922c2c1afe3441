from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.faults.hosts import Host, hosts, why_there_can_be_none


@pytest.fixture
def make_hosts() -> Iterator[Callable[..., list[Host]]]:
    """Makes hosts of these names, which last as long as the test; skips the test where there can be none."""
    if reason := why_there_can_be_none():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield lambda *names: stack.enter_context(hosts(*names))
