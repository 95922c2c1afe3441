"""Replaces ``time.sleep`` in the code under test."""

import threading
import time
from collections.abc import Callable

import pytest


def replace_sleep(monkeypatch: pytest.MonkeyPatch, sleep: Callable[[float], object]) -> None:
    """Replace ``time.sleep`` in the thread of a test alone: a thread that an earlier test has left sleeps on."""
    own, real = threading.get_ident(), time.sleep

    def of_this_thread(seconds: float) -> None:
        (sleep if threading.get_ident() == own else real)(seconds)

    monkeypatch.setattr(time, "sleep", of_this_thread)
