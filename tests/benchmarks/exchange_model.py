"""What an exchange of gradients costs on more hosts than a test has: ``python -m tests.benchmarks.exchange_model``.

A message costs the latency of its link, and its bytes over the bandwidth of the link: the alpha-beta model. The step of
ResNet-50 in it, 102 MB of float32 gradients in buckets of 25 MiB, on H hosts of L = 8 GPUs, W = HL workers, in ms:

                                  flat          hierarchical         overlap
a host has            hosts  in turn  at once  in turn  at once  in turn  at once     ring     tree
1 NIC of 100 Gbit/s       2     66.5     65.5      8.9      8.7      8.4      8.4     15.8      8.7
                          8    121.0    114.6     15.7     14.8     15.2     14.5     18.4     17.4
                         32    154.7    126.9     19.9     16.4     19.5     16.1     25.9     18.0
                        128    243.8    129.9     31.0     16.8     30.6     16.4     54.9     18.5
1 NIC of 400 Gbit/s       2     17.4     16.5      2.7      2.6      2.3      2.3      4.3      2.4
                          8     35.1     28.7      4.9      4.1      4.5      3.8      6.3      4.8
                         32     59.7     31.8      8.0      4.5      7.6      4.2     13.6      5.1
                        128    146.4     32.6     18.9      4.6     18.4      4.3     42.7      5.4
8 NICs of 400 Gbit/s      2      3.1      2.2      1.0      0.8      0.6      0.5      1.0      0.8
                          8     10.0      3.7      1.8      1.0      1.4      0.7      2.8      1.1
                         32     31.9      4.1      4.6      1.0      4.1      0.7     10.1      1.3
                        128    118.0      4.2     15.3      1.0     14.9      0.7     39.1      1.6

*Links.* Inside a host NVLink 4 through an NVSwitch: 450 GB/s per GPU and direction, 3.4 us a message. Between hosts
what the NICs of a host carry together, in each direction, and 14 us. The bandwidths are those of the data sheets, of
which about nine tenths are reached; the latencies are those with which NCCL chooses its algorithms (``hwLat`` of
``src/graph/tuning.cc``: ring, protocol Simple). Switches are never a bottleneck.

*Exchanges.* For a bucket of B bytes:
- ``flat``: each worker sends every other a slice of B/W, adds up its own slice, and sends the sum to all: twice W-1
  messages a worker, and twice B L(W-L)/W out of a host.
- ``hierarchical``: the workers of a host exchange slices of B/L, those of all hosts with the same slice exchange its H
  pieces, and both once more with the sums: twice (L-1) + (H-1) messages, and twice B(H-1)/H out of a host, the least.
- ``overlap``: the same, and while one bucket is between hosts, its neighbours are inside, so that the slower of the
  two kinds of links is busy all the time: no schedule of these phases is faster.
- ``ring``: around all workers, host by host: 2(W-1) hops one after the other, 2(H-1) of them between hosts, and
  2B(W-1)/W out of a host.
- ``tree``: NCCL's double binary tree between hosts, with the workers of a host in a chain: 2(L-1) hops inside and
  2 log2(H) between hosts, each of which first waits for a chunk of 256 KB, and 2B out of a host; B on two hosts, where
  each is the leaf of one of the two trees.

*Assumptions.* The latencies of a worker's messages to several peers add up in the columns ``in turn``; in those ``at
once`` all of a phase together cost one, as if all were posted before the first arrives. Real libraries are in between:
NCCL has a few in flight. Ring and tree have one peer at a time. Bytes of a phase fill the links inside and between at
once. Buckets go one after the other, but for ``overlap``. Additions, and the copies into a bucket, cost nothing, and
there is no backward pass to hide behind.

``predicted_step_s`` gives the same for hosts that are namespaces on one machine (``on_one_machine``), where a limited
interface is the link between hosts, and the processors of the machine move all bytes, those inside hosts too. A step
there is what it takes until the last gradient is computed, and then the exchange: ``overlap`` for the product's, in
buckets of 3 MiB, and ``ring`` for plain DDP. Measured by ``tests.benchmarks.exchange`` (torch 2.14, 2 cores, 20 MB, n=5
blocks of 2 steps, medians in ms) and predicted from DDP's steps without a limit:

                         exact                     DDP
hosts  Mbit/s  measured  predicted       measured  predicted
2x1      1000       183        187  +2%       180        187  +4%
          300       604        580  -4%       576        580  +1%
2x4      1000       246        225  -9%       326        341  +5%
          300       633        618  -2%      1034       1029   0%
3x2      1000       290        264  -9%       304        314  +3%
          300       864        788  -9%       951        969  +2%

A second run was off by at most 11 % for ``exact`` and 6 % for DDP, the same way where it was much. DDP's first bucket
leaves before the last gradient is computed, which the model does not count; and its ``overlap`` is the least there is:
it takes the link to be busy all the time, and additions to cost nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

MIB = 2**20
RESNET50_BYTES = 4 * 25_557_032
_CHUNK_BYTES = 256_000
_PAYLOAD = 0.95
"""Of the bytes of packets; the others are headers."""


@dataclass(frozen=True, slots=True)
class Link:
    """What a message costs: its latency, and its bytes over the bandwidth, which is the same in both directions."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Hosts with the same number of workers each.

    Attributes:
        hosts: The number of hosts.
        workers: The number of workers on each.
        inside: The link of a worker to those of its host.
        between: The link of a host to other hosts, which its workers share.
        moved_bytes_per_s: What the machine moves that all hosts are part of; infinite: they are machines of their own.
    """

    hosts: int
    workers: int
    inside: Link
    between: Link
    moved_bytes_per_s: float = math.inf

    @property
    def world_size(self) -> int:
        """The number of all workers."""
        return self.hosts * self.workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of an exchange, of which all workers do theirs at the same time.

    Attributes:
        inside: Messages of a worker to others of its host; in a chain: hops inside hosts.
        between: The same for other hosts.
        worker_bytes: What a worker sends inside its host; of the worker that sends most.
        senders: The number of workers of a host that send so much.
        host_bytes: What leaves a host; the host that sends most.
        is_chain: Each message waits for the one before.
        chunk_bytes: What a hop of a chain has received before the next begins, beside its share of the bytes above.
    """

    inside: int = 0
    between: int = 0
    worker_bytes: float = 0.0
    senders: int = 0
    host_bytes: float = 0.0
    is_chain: bool = False
    chunk_bytes: float = 0.0

    def seconds(self, cluster: Cluster, *, at_once: bool = False) -> float:
        """Returns how long it takes; ``at_once``: the latencies of messages to several peers overlap."""
        counts = [self.inside, self.between]
        links = (cluster.inside, cluster.between)
        latencies = [link.latency_s + self.chunk_bytes / link.bytes_per_s for link in links]
        if at_once and not self.is_chain:
            latency = max((one for count, one in zip(counts, latencies) if count), default=0.0)
        else:
            latency = sum(count * one for count, one in zip(counts, latencies))
        return latency + max(
            self.worker_bytes / cluster.inside.bytes_per_s,
            self.host_bytes / cluster.between.bytes_per_s,
            self.moved_bytes(cluster) / cluster.moved_bytes_per_s,
        )

    def moved_bytes(self, cluster: Cluster) -> float:
        """Returns what all workers send, to whomever."""
        return cluster.hosts * (self.senders * self.worker_bytes + self.host_bytes)


Exchange = Callable[[Cluster, float], Sequence[Phase]]
"""The phases of the exchange of a bucket, from the cluster and the bytes of the bucket."""


def flat(cluster: Cluster, bucket: float) -> list[Phase]:
    """Slices from everyone to everyone, and back."""
    own, others = cluster.workers - 1, cluster.world_size - cluster.workers
    slice_bytes = bucket / cluster.world_size
    there = Phase(
        inside=own,
        between=others,
        worker_bytes=slice_bytes * own,
        senders=cluster.workers,
        host_bytes=slice_bytes * others * cluster.workers,
    )
    return [there, there]


def hierarchical(cluster: Cluster, bucket: float) -> list[Phase]:
    """Slices inside the hosts, pieces of a slice between hosts, and back the same way."""
    peers, other_hosts = cluster.workers - 1, cluster.hosts - 1
    inside = Phase(inside=peers, worker_bytes=bucket * peers / cluster.workers, senders=cluster.workers)
    between = Phase(between=other_hosts, host_bytes=bucket * other_hosts / cluster.hosts)
    return [inside, between, between, inside]


def ring(cluster: Cluster, bucket: float) -> list[Phase]:
    """Around all workers, host by host. A host sends on as much as a worker does."""
    hops = cluster.world_size - 1
    num_bytes = 2 * bucket * hops / cluster.world_size
    is_alone = cluster.hosts == 1
    senders = cluster.workers if is_alone else cluster.workers - 1  # the last of a host sends to the next host
    crossings = cluster.hosts - 1
    return [
        Phase(
            inside=2 * (hops - crossings),
            between=2 * crossings,
            worker_bytes=num_bytes if senders else 0.0,
            senders=senders,
            host_bytes=0.0 if is_alone else num_bytes,
            is_chain=True,
        )
    ]


def tree(cluster: Cluster, bucket: float) -> list[Phase]:
    """NCCL's double binary tree: each tree sums one half of a bucket, and sends the sum back.

    Source: the latencies and the two trees, ``src/graph/tuning.cc`` and ``src/graph/trees.cc`` of NCCL.
    """
    inside, between = 2 * (cluster.workers - 1), 2 * math.ceil(math.log2(cluster.hosts))
    return [
        Phase(
            inside=inside,
            between=between,
            worker_bytes=_up_and_down(cluster.workers, bucket),
            senders=cluster.workers,
            host_bytes=_up_and_down(cluster.hosts, bucket),
            is_chain=True,
            chunk_bytes=min(_CHUNK_BYTES, bucket),
        )
    ]


def _up_and_down(members: int, num_bytes: float) -> float:
    """Returns what a member of a double tree or a chain sends, of those that send most."""
    return num_bytes * min(members - 1, 2)


def buckets_of(gradient_bytes: float, bucket_mb: float | None) -> list[float]:
    """Returns the bytes of each bucket of DDP; ``bucket_mb``: see ``train.bucket_mb``.

    No gradient is as large as a bucket here: each bucket holds exactly as much as it may.
    """
    first, others = (1.0, 25.0) if bucket_mb is None else (bucket_mb, bucket_mb)
    buckets: list[float] = []
    left = gradient_bytes
    while left > 0:
        buckets.append(min(left, MIB * (others if buckets else first)))
        left -= buckets[-1]
    return buckets


def step_s(exchange: Exchange, cluster: Cluster, buckets: Sequence[float], *, at_once: bool = False) -> float:
    """Returns the seconds of a step whose buckets go one after the other."""
    return sum(phase.seconds(cluster, at_once=at_once) for bucket in buckets for phase in exchange(cluster, bucket))


def overlapped_step_s(cluster: Cluster, buckets: Sequence[float], *, at_once: bool = False) -> float:
    """Returns the least seconds of a step of ``hierarchical`` in which the phases of neighbouring buckets overlap."""
    phases = [hierarchical(cluster, bucket) for bucket in buckets]
    seconds = [[phase.seconds(cluster, at_once=at_once) for phase in of_bucket] for of_bucket in phases]
    between = sum(first + second for _, first, second, _ in seconds)
    inside = sum(first + last for first, _, _, last in seconds)
    moved = sum(phase.moved_bytes(cluster) for of_bucket in phases for phase in of_bucket)
    return max(seconds[0][0] + between + seconds[-1][3], inside, moved / cluster.moved_bytes_per_s)


def on_one_machine(hosts: int, workers: int, mbit_per_s: float | None, moved_bytes_per_s: float = math.inf) -> Cluster:
    """Describes hosts that are namespaces on one machine.

    Args:
        hosts: Their number.
        workers: The workers of each.
        mbit_per_s: The limit of a host's interface, in bits of packets; None: no limit.
        moved_bytes_per_s: What the machine's processors move; ``moving_rate`` has it from a step without a limit.
    """
    no_limit = Link(latency_s=50e-6, bytes_per_s=math.inf)  # about that of TCP; of little weight beside the bytes
    between = no_limit if mbit_per_s is None else replace(no_limit, bytes_per_s=_PAYLOAD * mbit_per_s * 1e6 / 8)
    return Cluster(hosts, workers, no_limit, between, moved_bytes_per_s)


def moving_rate(exchange: Exchange, hosts: int, workers: int, gradient_bytes: float, exchange_s: float) -> float:
    """Returns the bytes per second that a machine moves, from an exchange without a limit of any interface.

    Not for ``tree``, whose workers do not all send as much as the one that sends most.
    """
    cluster = on_one_machine(hosts, workers, None)
    return sum(phase.moved_bytes(cluster) for phase in exchange(cluster, gradient_bytes)) / exchange_s


def predicted_step_s(
    cluster: Cluster, gradient_bytes: float, bucket_mb: float | None = None, computed_s: float = 0.0
) -> dict[str, float]:
    """Returns the seconds of a step for each exchange over gloo, which has no tree, and posts messages at once.

    Args:
        cluster: Describes the links.
        gradient_bytes: What is summed.
        bucket_mb: See ``train.bucket_mb``.
        computed_s: The seconds until the last gradient of a step is computed. The model sends nothing before.
    """
    buckets = buckets_of(gradient_bytes, bucket_mb)
    exchanges: dict[str, Exchange] = {"flat": flat, "hierarchical": hierarchical, "ring": ring}
    exchange_s = {name: step_s(exchange, cluster, buckets, at_once=True) for name, exchange in exchanges.items()}
    exchange_s["overlap"] = overlapped_step_s(cluster, buckets, at_once=True)
    return {name: computed_s + seconds for name, seconds in exchange_s.items()}


_NVLINK = Link(latency_s=3.4e-6, bytes_per_s=450e9)
_NICS = {"1 NIC of 100 Gbit/s": 100e9 / 8, "1 NIC of 400 Gbit/s": 400e9 / 8, "8 NICs of 400 Gbit/s": 8 * 400e9 / 8}


def table() -> str:
    """Returns the milliseconds of a step of ResNet-50, for each kind of NIC, number of hosts and exchange."""
    lines = [
        f"{'':27} {'flat':^17} {'hierarchical':^17} {'overlap':^17}",
        f"{'a host has':21} hosts" + f" {'in turn':>8} {'at once':>8}" * 3 + f" {'ring':>8} {'tree':>8}",
    ]
    buckets = buckets_of(RESNET50_BYTES, 25.0)
    for nics, bytes_per_s in _NICS.items():
        for hosts in (2, 8, 32, 128):
            cluster = Cluster(hosts, 8, _NVLINK, Link(latency_s=14e-6, bytes_per_s=bytes_per_s))
            seconds = [
                *(step_s(flat, cluster, buckets, at_once=at_once) for at_once in (False, True)),
                *(step_s(hierarchical, cluster, buckets, at_once=at_once) for at_once in (False, True)),
                *(overlapped_step_s(cluster, buckets, at_once=at_once) for at_once in (False, True)),
                *(step_s(exchange, cluster, buckets) for exchange in (ring, tree)),
            ]
            name = nics if hosts == 2 else ""
            lines.append(f"{name:21} {hosts:5}" + "".join(f" {1000 * each:8.1f}" for each in seconds))
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    print(table())
