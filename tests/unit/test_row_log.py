"""The rows that are read, whatever happened while they were written."""

import itertools
import json

import pytest
from crashing_file_system import Killed, copy_of_store, fresh_faults, restore

from cluster.errors import StorageError
from cluster.run import row_log
from cluster.run.row_log import RowLog
from cluster.storage.store import Store


@pytest.fixture
def faults():
    return fresh_faults()


@pytest.fixture
def store(faults) -> Store:
    assert faults.fired == 0
    return Store("crash://run", patience_s=0)


_numbers = itertools.count(1)


def open_log(store: Store, name: str, key: str = "seq") -> RowLog:
    """The log for a new writer, who comes after all others."""
    return RowLog(store, name, key=key, writer=f"{next(_numbers):08d}-00000000")


def metrics(store: Store) -> RowLog:
    return open_log(store, "metrics", key="step")


def write(log: RowLog, *steps: int, loss: float = 0.5) -> None:
    for step in steps:
        log.append({"step": step, "loss": loss})
    log.flush()


def steps(log: RowLog) -> list[int]:
    return [row["step"] for row in log.read()]


def test_nothing_is_read_where_nothing_was_written(store):
    assert metrics(store).read() == []
    metrics(store).flush()
    assert store.names() == []


def test_rows_are_read_as_they_were_appended(store):
    rows = [{"step": 1, "loss": 0.25, "note": "ü\n"}, {"step": 2, "loss": 1e-300}]
    log = metrics(store)
    for row in rows:
        log.append(row)
    log.flush()
    assert metrics(store).read() == rows


def test_a_row_is_not_in_the_store_before_a_flush(store):
    log = metrics(store)
    log.append({"step": 1})
    assert log.read() == []


def test_a_later_row_of_a_step_replaces_the_earlier_one(store):
    write(metrics(store), 1, 2, 3, loss=0.1)
    write(metrics(store), 3, 2, 4, loss=0.2)
    assert [(row["step"], row["loss"]) for row in metrics(store).read()] == [(1, 0.1), (2, 0.2), (3, 0.2), (4, 0.2)]


def test_events_are_numbered_on_over_writers(store):
    for writer in range(3):
        log = open_log(store, "events")
        for kind in ("started", "stopped"):
            log.append({"kind": kind, "writer": writer})
            log.flush()
        if writer:
            log.publish()
    assert [(row["seq"], row["writer"]) for row in RowLog(store, "events").read()] == [
        (0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2),
    ]  # fmt: skip


def test_small_flushes_share_a_part_and_a_full_part_is_left_alone(store, faults, monkeypatch):
    monkeypatch.setattr(row_log, "_PART_BYTES", 200)
    log = metrics(store)
    for step in range(40):
        write(log, step)
    assert steps(log) == list(range(40))
    assert len(store.names("metrics")) == 1 + 5
    # A cut; then each flush one part, that replaces the one before unless that was full.
    assert len(faults.calls) == 1 + 40 + 35


def test_a_new_writer_leaves_nothing_of_the_one_before(store):
    write(metrics(store), 1)
    first = set(store.names())
    write(metrics(store), 2)
    assert steps(metrics(store)) == [1, 2]
    assert first.isdisjoint(store.names())
    assert len(store.names()) == 2  # a cut, and a part with the rows of both


def test_a_writer_may_open_its_log_again(store, monkeypatch):
    """A run that goes back cuts its rows off, and its driver then opens the log; full parts are not written again."""
    monkeypatch.setattr(row_log, "_PART_BYTES", 200)
    write(metrics(store), *range(30))
    for last in (20, 10):
        log = RowLog(store, "metrics", key="step", writer="99999999-00000000")
        log.cut(last)
        log.flush()
        assert steps(log) == list(range(last))


def test_what_an_older_writer_adds_does_not_count(store):
    old, new = metrics(store), metrics(store)
    write(old, 1, 2, 3, 4)
    new.cut(3)
    new.flush()
    old.cut(1)  # it stands at the beginning again
    write(old, 3, 9, loss=0.9)
    write(new, 3)
    assert [(row["step"], row["loss"]) for row in metrics(store).read()] == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_a_log_from_before_writers_had_names(store):
    store.write("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n')
    store.write("metrics/part-00000000.jsonl", b'{"step": 2, "loss": 1}\n{"step": 3}\n')
    store.write("metrics/part-00000001.jsonl", b'{"step": 3, "loss": 2}\n')
    rows = [{"step": 1}, {"step": 2, "loss": 1}, {"step": 3, "loss": 2}]
    assert metrics(store).read() == rows
    write(metrics(store), 4)
    assert metrics(store).read() == [*rows, {"step": 4, "loss": 0.5}]
    assert not any("part-" in name for name in store.names())


def test_the_copy_for_people_is_plain_rows_and_counts_least(store):
    write(metrics(store), 1, 2)
    log = metrics(store)
    write(log, 2, 3)
    log.publish()
    assert [json.loads(line)["step"] for line in store.read("metrics.jsonl").splitlines()] == [1, 2, 3]
    store.write("metrics.jsonl", b'{"step": 1, "loss": 7}\n{"step": 9}\n')
    write(log, 4)
    assert [(row["step"], row["loss"]) for row in log.read()] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)]


def test_a_cut_drops_the_rows_before_it_and_not_those_after_it(store):
    write(metrics(store), 1, 2, 3, 4)
    log = metrics(store)
    log.append({"step": 5})
    log.cut(3)
    assert steps(metrics(store)) == [1, 2, 3, 4], "it waits for a flush"
    log.append({"step": 3, "loss": 0.9})
    log.flush()
    assert steps(log) == [1, 2, 3]
    assert log.read()[-1] == {"step": 3, "loss": 0.9}


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b"\0\0\0\0", b"\xff\xfe", b"7", b"[1]", b'{"loss": 1}', b"[" * 99999]
)
def test_a_torn_line_is_left_out(store, torn):
    write(metrics(store), 1, 2)
    store.write("metrics/99999999-00000000-00000000.jsonl", b'{"step": 9}\n' + torn)
    store.write("metrics/notes.txt", b'{"step": 10}\n')
    assert steps(metrics(store)) == [1, 2, 9]


def test_a_refused_flush_loses_and_repeats_nothing(store, faults):
    log = metrics(store)
    write(log, 1)
    faults.at, faults.kind = len(faults.calls), "refused"
    log.append({"step": 2})
    with pytest.raises(StorageError, match="the network is down"):
        log.flush()
    assert faults.fired == 1
    write(log, 3)
    assert steps(metrics(store)) == [1, 2, 3]


def test_a_refused_delete_loses_and_repeats_nothing(store, faults):
    log = open_log(store, "events")
    log.append({"kind": "a"})
    log.flush()
    faults.at, faults.kind = len(faults.calls) + 1, "refused"
    log.append({"kind": "b"})
    with pytest.raises(StorageError, match="cannot delete"):
        log.flush()
    assert faults.fired == 1
    log.append({"kind": "c"})
    log.flush()
    assert [(row["seq"], row["kind"]) for row in RowLog(store, "events").read()] == [(0, "a"), (1, "b"), (2, "c")]


BATCHES = [[1, 2], [3], [4, -3, 3, 4], [5], [-5], [5, 6], [7, 8], []]
"""The steps of the rows of each flush; a negative one is a cut there."""


def write_batches(log: RowLog) -> list[list[dict] | None]:
    """The rows in the store after each flush; none after one that failed, whose entries are written by the next."""
    found, numbers = list[list[dict] | None](), itertools.count()
    for batch in BATCHES:
        for step in batch:
            if step < 0:
                log.cut(-step)
            else:
                log.append({"step": step, "number": next(numbers)})
        try:
            log.flush()
        except StorageError:
            found.append(None)
        else:
            found.append(log.read())
    return found


@pytest.mark.usefixtures("calls_in_this_thread")
@pytest.mark.parametrize("key", ["step", "seq"])
def test_a_call_that_was_given_up_changes_no_row_whenever_it_is_made(store, key, monkeypatch):
    """Any call of a writer fails, and is made before any later one, or after all."""
    monkeypatch.setattr(row_log, "_PART_BYTES", 100)
    for number in range(3):
        log = RowLog(store, "log", key=key, writer="00000001-00000000")
        log.append({"step": 1, "number": -number, "text": "x" * 50})
        log.flush()

    def open_next() -> RowLog:
        return RowLog(store, "log", key=key, writer="00000002-00000000")

    content = copy_of_store()
    undisturbed = write_batches(open_next())
    assert [row["step"] for row in undisturbed[-1]][-4:] == [5, 6, 7, 8]
    at, lands_at, num_points = 0, 1, 0
    while True:
        faults = restore(content)
        faults.at, faults.kind, faults.lands_at = at, "late", lands_at
        found = write_batches(open_next())
        if not faults.fired:
            break
        num_points += 1
        is_last = bool(faults.late)
        faults.land()
        assert found[-1] == undisturbed[-1]
        assert all(rows in (None, expected) for rows, expected in zip(found, undisturbed)), (at, lands_at)
        assert open_next().read() == undisturbed[-1], (at, lands_at)
        third = RowLog(store, "log", key=key, writer="00000003-00000000")
        write(third, 9)
        assert third.read()[:-1] == undisturbed[-1], (at, lands_at)
        at, lands_at = (at + 1, at + 2) if is_last else (at, lands_at + 1)
    assert num_points > 100


def test_a_part_that_is_there_though_its_write_failed_is_replaced_as_others_are(store, faults):
    log = metrics(store)
    write(log, 1)
    faults.at, faults.kind = len(faults.calls), "late"
    with pytest.raises(StorageError, match="the network is down"):
        write(log, 2)
    faults.land()
    assert not log.is_flushed
    assert steps(log) == [1, 2]
    write(log, 3)
    assert log.is_flushed
    assert steps(metrics(store)) == [1, 2, 3]
    assert len(store.names()) == 2, "a cut, and one part"


@pytest.mark.parametrize("kind", ["before", "torn", "after"])
@pytest.mark.parametrize("key", ["step", "seq"])
@pytest.mark.parametrize("cut", [None, 22])
def test_a_kill_at_any_call_of_a_new_writer_changes_no_row(store, kind, key, cut, monkeypatch):
    monkeypatch.setattr(row_log, "_PART_BYTES", 200)
    for first in (0, 10, 20):
        log = open_log(store, "log", key)
        for step in range(first, first + 10):
            log.append({"step": step, "text": "x" * step})
            log.flush()
        log.publish()
    log = open_log(store, "log", key)
    before = log.read()
    assert len(before) == 30

    def begin() -> None:
        log = open_log(store, "log", key)
        if cut is not None:
            log.cut(cut)
        log.append({"step": 30})
        log.flush()

    content, at = copy_of_store(), 0
    kept = [row for row in before if cut is None or row[key] < cut]
    while True:
        faults = restore(content)
        faults.at, faults.kind = at, kind
        try:
            begin()
        except Killed:
            assert faults.fired == 1
            found = open_log(store, "log", key).read()
            assert found[: len(kept)] == kept, faults.calls[-1]
            assert found in (before, kept, [*before, found[-1]], [*kept, found[-1]])
            faults.at = None
            begin()
        found = open_log(store, "log", key).read()
        assert found[: len(kept)] == kept
        assert found[-1]["step"] == 30
        if not faults.fired:
            break
        at += 1
    assert at >= 8  # a copy, a cut, the parts of the writer before, and what is new


@pytest.mark.parametrize("kind", ["before", "torn", "after"])
def test_a_kill_at_any_call_of_a_flush_keeps_all_rows_flushed_before(store, kind):
    at = 0
    while True:
        faults = restore({})
        faults.at, faults.kind = at, kind
        flushed: list[int] = []
        log = metrics(store)
        try:
            for step in range(6):
                write(log, step)
                flushed.append(step)
        except Killed:
            assert faults.fired == 1
        assert steps(metrics(store))[: len(flushed)] == flushed
        if not faults.fired:
            break
        at += 1
    assert at == 1 + 6 + 5  # a cut; six parts written, five of them replaced by the next


@pytest.mark.parametrize("verb", ["list", "read"])
def test_a_store_that_does_not_answer_is_no_empty_log(store, faults, verb):
    write(metrics(store), 1)
    faults.deny = verb
    with pytest.raises(StorageError, match="the network is down"):
        metrics(store).read()
    assert faults.fired
