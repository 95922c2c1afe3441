"""The cost model of the exchange: its limits, and the bytes of the formulas."""

import math

import pytest

from tests.benchmarks import exchange_model
from tests.benchmarks.exchange_model import (
    MIB,
    Cluster,
    Exchange,
    Link,
    buckets_of,
    flat,
    hierarchical,
    moving_rate,
    on_one_machine,
    overlapped_step_s,
    predicted_step_s,
    ring,
    step_s,
    table,
    tree,
)

B = 1e8
EXCHANGES: list[Exchange] = [flat, hierarchical, ring, tree]
FREE, FAST, SLOW = Link(0.0, math.inf), Link(0.0, 1e11), Link(0.0, 1e10)


def out_of_a_host(exchange: Exchange, hosts: int, workers: int) -> float:
    return sum(phase.host_bytes for phase in exchange(Cluster(hosts, workers, FREE, FREE), B))


@pytest.mark.parametrize("exchange", EXCHANGES)
class TestEveryExchange:
    def test_one_worker_costs_nothing(self, exchange: Exchange) -> None:
        assert step_s(exchange, Cluster(1, 1, Link(1.0, 1.0), Link(1.0, 1.0)), [B]) == 0

    def test_one_host_uses_no_link_between_hosts(self, exchange: Exchange) -> None:
        seconds = step_s(exchange, Cluster(1, 8, Link(1e-6, 1e11), Link(1e9, 1.0)), [B])
        assert 0 < seconds < 1

    def test_hosts_of_one_worker_use_no_link_inside(self, exchange: Exchange) -> None:
        seconds = step_s(exchange, Cluster(8, 1, Link(1e9, 1.0), Link(1e-6, 1e11)), [B])
        assert 0 < seconds < 1

    @pytest.mark.parametrize("hosts", [1, 2])
    def test_two_workers_send_everything_once(self, exchange: Exchange, hosts: int) -> None:
        """Half of it there, and the other half back."""
        seconds = step_s(exchange, Cluster(hosts, 2 // hosts, SLOW, SLOW), [B])
        assert seconds == pytest.approx(B / 1e10, rel=0.01)  # and the chunk with which a tree begins

    def test_without_latency_it_is_bytes_over_bandwidth(self, exchange: Exchange) -> None:
        cluster = Cluster(8, 8, FREE, SLOW)
        sent = out_of_a_host(exchange, 8, 8)
        assert step_s(exchange, cluster, [B]) == pytest.approx(sent / 1e10, rel=0.01)

    def test_without_bytes_it_is_messages_by_latency(self, exchange: Exchange) -> None:
        cluster = Cluster(4, 8, Link(1.0, math.inf), Link(100.0, math.inf))
        in_turn: dict[Exchange, float] = {
            flat: 2 * (7 + 24 * 100),
            hierarchical: 2 * (7 + 3 * 100),
            ring: 2 * (28 + 3 * 100),
            tree: 14 + 4 * 100,
        }
        at_once: dict[Exchange, float] = {
            flat: 2 * 100,
            hierarchical: 2 * (1 + 100),
            ring: in_turn[ring],
            tree: in_turn[tree],
        }
        assert step_s(exchange, cluster, [B]) == in_turn[exchange]
        assert step_s(exchange, cluster, [B], at_once=True) == at_once[exchange]

    def test_buckets_add_up(self, exchange: Exchange) -> None:
        cluster = Cluster(4, 8, Link(1e-6, 1e11), Link(1e-5, 1e10))
        assert step_s(exchange, cluster, [B, B]) == 2 * step_s(exchange, cluster, [B])


@pytest.mark.parametrize(("hosts", "workers"), [(1, 8), (2, 1), (2, 4), (8, 8), (128, 8)])
def test_bytes_out_of_a_host(hosts: int, workers: int) -> None:
    all_workers = hosts * workers
    assert out_of_a_host(hierarchical, hosts, workers) == pytest.approx(2 * B * (hosts - 1) / hosts)
    assert out_of_a_host(flat, hosts, workers) == pytest.approx(2 * B * workers * (all_workers - workers) / all_workers)
    assert out_of_a_host(ring, hosts, workers) == pytest.approx(
        2 * B * (all_workers - 1) / all_workers if hosts > 1 else 0
    )
    assert out_of_a_host(tree, hosts, workers) == B * min(hosts - 1, 2)


@pytest.mark.parametrize("exchange", [flat, hierarchical, ring])
def test_all_workers_send_what_an_all_reduce_sends_at_least(exchange: Exchange) -> None:
    """Hierarchical sends a slice inside and a piece of it between, which comes to more."""
    cluster = Cluster(4, 8, FREE, FREE)
    moved = sum(phase.moved_bytes(cluster) for phase in exchange(cluster, B))
    assert moved == pytest.approx(2 * B * (31 if exchange is not hierarchical else 4 * 7 + 3))


class TestOverlap:
    def test_one_bucket_has_nothing_to_overlap_with(self) -> None:
        cluster = Cluster(4, 8, Link(1e-6, 1e11), Link(1e-5, 1e10))
        assert overlapped_step_s(cluster, [B]) == pytest.approx(step_s(hierarchical, cluster, [B]))

    def test_the_slower_link_is_always_busy(self) -> None:
        slow_between, slow_inside = Cluster(4, 8, FAST, SLOW), Cluster(4, 8, SLOW, Link(0.0, 1e13))
        inside, between = B * 7 / 8 / 1e11, B * 3 / 4 / 1e10
        assert overlapped_step_s(slow_between, [B] * 10) == pytest.approx(inside + 10 * 2 * between + inside)
        assert overlapped_step_s(slow_inside, [B] * 10) == pytest.approx(10 * 2 * B * 7 / 8 / 1e10)

    def test_on_one_machine_there_is_nothing_to_gain(self) -> None:
        cluster = on_one_machine(2, 4, None, moved_bytes_per_s=1e9)
        alone = step_s(hierarchical, cluster, [B, B], at_once=True)
        assert overlapped_step_s(cluster, [B, B], at_once=True) == pytest.approx(alone, rel=0.01)


@pytest.mark.parametrize(("bucket_mb", "sizes"), [(None, [1, 25, 14]), (10.0, [10, 10, 10, 10]), (64.0, [40])])
def test_buckets(bucket_mb: float | None, sizes: list[int]) -> None:
    assert buckets_of(40 * MIB, bucket_mb) == [size * MIB for size in sizes]
    assert buckets_of(0, bucket_mb) == []


@pytest.mark.parametrize("mbit_per_s", [300.0, 1000.0])
def test_slow_cables_decide_in_namespaces(mbit_per_s: float) -> None:
    """2 hosts x 4 workers, 20 MB: ``flat`` took 2.25 times as long as plain DDP, whose backend has a ring, at 300."""
    predicted = predicted_step_s(on_one_machine(2, 4, mbit_per_s, moved_bytes_per_s=4e9), 20e6)
    whole = 20e6 / (0.95 * mbit_per_s * 1e6 / 8)
    assert predicted["flat"] / predicted["ring"] == pytest.approx(4 / 1.75, rel=0.02)
    assert predicted["ring"] == pytest.approx(1.75 * whole, rel=0.05)
    assert whole < predicted["hierarchical"] < 1.5 * whole


@pytest.mark.parametrize("exchange", [flat, hierarchical, ring])
def test_the_rate_of_a_machine_is_told_from_a_step_without_a_limit(exchange: Exchange) -> None:
    rate = moving_rate(exchange, 2, 4, 20e6, exchange_s=0.5)
    assert step_s(exchange, Cluster(2, 4, FREE, FREE, rate), [20e6]) == pytest.approx(0.5)


def test_an_exchange_begins_when_the_gradients_are_computed() -> None:
    cluster = on_one_machine(2, 4, 300.0, moved_bytes_per_s=4e9)
    at_once, later = predicted_step_s(cluster, 20e6, 3.0), predicted_step_s(cluster, 20e6, 3.0, computed_s=2.0)
    assert later == pytest.approx({name: seconds + 2.0 for name, seconds in at_once.items()})


def test_the_processors_decide_where_nothing_limits_the_cables() -> None:
    predicted = predicted_step_s(on_one_machine(2, 4, None, moved_bytes_per_s=1e9), 20e6)
    assert predicted["flat"] == pytest.approx(predicted["ring"], rel=0.02) == pytest.approx(14 * 20e6 / 1e9, rel=0.02)


def test_the_docstring_has_the_table() -> None:
    assert exchange_model.__doc__ is not None
    assert table() in exchange_model.__doc__
