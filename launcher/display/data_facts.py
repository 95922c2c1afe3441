"""What a plan tells of its data: the indexes, and the order of samples."""

from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING

from cluster.errors import storable
from jobs.spec import ShuffleSpec

if TYPE_CHECKING:
    from launcher.planning.built_index import BuiltIndex
    from launcher.planning.plan import Plan
    from launcher.planning.shuffle_cost import ShufflePlan


def data_facts(plan: "Plan", shuffle: ShuffleSpec | None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each fact."""
    yield from (("index", _index(index)) for index in plan.indexes)
    if shuffle is not None and plan.shuffle is not None:
        yield "order", _mixing(plan.shuffle, shuffle)
        yield "reads", _price(plan.shuffle)
        if plan.shuffle.kept_bytes is not None:
            yield "keeps", _memory(plan.shuffle, plan.shuffle.kept_bytes, plan.most_per_host)


def _index(index: "BuiltIndex") -> str:
    """Return what an index lists, and what lies beside it and is no sample."""
    classes = f" of {index.num_classes:,} classes" if index.num_classes else ""
    places = f" in {index.num_objects:,} objects" if index.num_objects != index.num_samples else ""
    passed_over = [f"{reason} ({count:,}, first {name})" for reason, (count, name) in index.passed_over.items()]
    beside = f"; passed over: {', '.join(passed_over)}" if passed_over else ""
    return f"{index.place}: {index.num_samples:,} samples{classes}{places}{storable(beside)}"


def _mixing(plan: "ShufflePlan", shuffle: ShuffleSpec) -> str:
    """Return how often neighbours meet, beside a full shuffle."""
    own, full = plan.own, plan.full
    streams = f", {shuffle.streams} for each shard" if shuffle.streams > 1 else ""
    return (
        f"blocks of {shuffle.block:,} in buffers of {shuffle.buffer:,}{streams}; of neighbours, "
        f"{_percent(own.meet_in_micro_batch)} meet in a micro-batch and {_percent(own.meet_in_step)} in a step (in "
        f"{plan.micro_batches:,} that were drawn), with a full shuffle {_percent(full.meet_in_micro_batch)} and "
        f"{_percent(full.meet_in_step)}"
    )


def _price(plan: "ShufflePlan") -> str:
    """Return what reading costs, beside a full shuffle."""
    own, full = plan.own, plan.full
    if own.requests is None or own.read is None or full.requests is None or full.read is None:
        return "each sample by itself, as with a full shuffle: the dataset reads no blocks"
    where = more = ""
    if plan.readers > 1:
        where = " (all workers on one host)"
        more = (
            f"; up to {plan.readers} loader processes read each block, or one with data.shuffle.streams: {plan.streams}"
        )
    return (
        f"{_short(own.requests)} requests a sample and {_short(own.read)} bytes for each byte used{where}, with a "
        f"full shuffle {_short(full.requests)} and {_short(full.read)}{more}"
    )


def _memory(plan: "ShufflePlan", kept_bytes: int, most_per_host: int) -> str:
    """Return what processes that read samples hold, beside the batches that are ready."""
    processes = most_per_host * plan.processes
    row_groups = f" and {_mebibytes(plan.row_group_bytes)} of row groups" if plan.row_group_bytes else ""
    on_host = f"; in the {processes:,} on a host, {_mebibytes(processes * (kept_bytes + plan.row_group_bytes))}"
    return (
        f"in a process that reads samples, up to {_mebibytes(kept_bytes)} of images until they are used{row_groups}"
        f"{on_host if processes > 1 else ''}"
    )


def _mebibytes(size: int) -> str:
    return f"{_short(size / 2**20)} MiB"


def _percent(fraction: float) -> str:
    return f"{_short(100 * fraction, 2)}%"


def _short(value: float, digits: int = 3) -> str:
    """Format a number with at most ``digits`` significant digits, and no exponent."""
    return f"{Decimal(f'{value:.{digits}g}'):,f}"
