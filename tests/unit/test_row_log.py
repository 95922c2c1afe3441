"""The rows that are read, whatever happened while they were written."""

import json

import pytest
from crashing_file_system import Killed, copy_of_store, fresh_faults, restore

from cluster import row_log
from cluster.errors import StorageError
from cluster.row_log import RowLog
from cluster.storage import Store


@pytest.fixture
def faults():
    return fresh_faults()


@pytest.fixture
def store(faults) -> Store:
    assert faults.fired == 0
    return Store("crash://run", patience_s=0)


def metrics(store: Store) -> RowLog:
    return RowLog(store, "metrics", key="step")


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


def test_events_are_numbered_on_over_writers_and_compactions(store):
    for writer in range(3):
        log = RowLog(store, "events")
        for kind in ("started", "stopped"):
            log.append({"kind": kind, "writer": writer})
            log.flush()
        if writer:
            log.compact()
    assert [(row["seq"], row["writer"]) for row in RowLog(store, "events").read()] == [
        (0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2),
    ]  # fmt: skip


def test_small_flushes_share_a_part_and_a_full_part_is_left_alone(store, faults, monkeypatch):
    monkeypatch.setattr(row_log, "_PART_BYTES", 200)
    log = metrics(store)
    for step in range(40):
        write(log, step)
    assert steps(log) == list(range(40))
    assert len(store.names("metrics")) == 5
    assert len(faults.calls) == 40 + 35  # each flush one part, that replaces the one before unless that was full


def test_a_new_writer_adds_parts_beyond_those_there_are(store):
    write(metrics(store), 1)
    write(metrics(store), 2)
    assert store.names() == ["metrics/part-00000000.jsonl", "metrics/part-00000001.jsonl"]


def test_compacting_leaves_one_object_of_plain_rows(store):
    write(metrics(store), 1, 2)
    log = metrics(store)
    write(log, 2, 3)
    log.compact()
    assert store.names() == ["metrics.jsonl"]
    assert [json.loads(line)["step"] for line in store.read("metrics.jsonl").splitlines()] == [1, 2, 3]
    write(log, 4)
    assert steps(log) == [1, 2, 3, 4]


def test_compacting_the_rows_of_a_resume_drops_the_rest(store):
    write(metrics(store), 1, 2, 3, 4)
    log = metrics(store)
    log.compact(row for row in log.read() if row["step"] <= 2)
    assert steps(log) == [1, 2]
    write(log, 3, loss=0.9)
    assert log.read()[-1] == {"step": 3, "loss": 0.9}


def test_rows_not_flushed_outlive_a_compaction(store):
    log = metrics(store)
    write(log, 1)
    log.append({"step": 2})
    log.compact()
    log.flush()
    assert steps(log) == [1, 2]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b"\0\0\0\0", b"\xff\xfe", b"7", b"[1]", b'{"loss": 1}', b"[" * 99999]
)
def test_a_torn_line_is_left_out(store, torn):
    write(metrics(store), 1, 2)
    store.write("metrics/part-00000001.jsonl", b'{"step": 9}\n' + torn)
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
    log = RowLog(store, "events")
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


@pytest.mark.parametrize("kind", ["before", "torn", "after"])
@pytest.mark.parametrize("key", ["step", "seq"])
def test_a_kill_at_any_call_of_a_compaction_changes_no_row(store, kind, key):
    """Also while the compacted file of an earlier time is overwritten, when nothing else holds its rows."""
    for first in (0, 10, 20):
        log = RowLog(store, "log", key=key)
        for step in range(first, first + 10):
            log.append({"step": step, "text": "x" * step})
            log.flush()
        if first < 20:
            log.compact()
    for loss in (0.1, 0.2, 0.3):  # of the keyed log, rows that replace each other from part to part
        write(RowLog(store, "log", key=key), 29, 30, loss=loss)
    before = RowLog(store, "log", key=key).read()
    assert len(before) == {"step": 31, "seq": 36}[key]

    content, at = copy_of_store(), 0
    while True:
        faults = restore(content)
        faults.at, faults.kind = at, kind
        try:
            RowLog(store, "log", key=key).compact()
        except Killed:
            assert faults.fired == 1
            assert RowLog(store, "log", key=key).read() == before, faults.calls[-1]
            faults.at = None
            RowLog(store, "log", key=key).compact()
        assert RowLog(store, "log", key=key).read() == before
        assert store.names() == ["log.jsonl"]
        if not faults.fired:
            break
        at += 1
    assert at >= 5  # a copy, the file, and at least three parts


@pytest.mark.parametrize("kind", ["before", "torn", "after"])
def test_a_kill_at_any_call_of_a_resume_keeps_the_rows_it_goes_on_from(store, kind):
    for first in (0, 4, 8):
        write(metrics(store), *range(first, first + 4))
    content, at = copy_of_store(), 0
    while True:
        faults = restore(content)
        faults.at, faults.kind = at, kind
        log = metrics(store)
        try:
            log.compact([row for row in log.read() if row["step"] <= 5])
        except Killed:
            assert faults.fired == 1
            assert steps(metrics(store))[:6] == [0, 1, 2, 3, 4, 5]
        if not faults.fired:
            break
        at += 1
    assert at == 6  # a copy, the file, three parts, the copy
    assert steps(metrics(store)) == [0, 1, 2, 3, 4, 5]


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
    assert at == 6 + 5  # six parts written, five of them replaced by the next


@pytest.mark.parametrize("verb", ["list", "read"])
def test_a_store_that_does_not_answer_is_no_empty_log(store, faults, verb):
    write(metrics(store), 1)
    faults.deny = verb
    with pytest.raises(StorageError, match="the network is down"):
        metrics(store).read()
    assert faults.fired
