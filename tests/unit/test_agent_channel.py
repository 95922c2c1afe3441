"""The way between agents and driver, over Ray."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.process.orders import Orders
from cluster.ray import worker_group


def test_orders_are_asked_for_again_when_their_connection_was_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray  # takes a second or two

    answers: list[Any] = [ray.exceptions.ActorUnavailableError("reset", None), Orders(version=3), Orders(version=4)]

    def get(_: object) -> Orders:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(worker_group, "_RETRY_INTERVAL_S", 0.0)
    switchboard = SimpleNamespace(orders_after=SimpleNamespace(remote=lambda *_: None))
    assert worker_group._RayChannel(switchboard).orders_after(3) == Orders(version=4)
