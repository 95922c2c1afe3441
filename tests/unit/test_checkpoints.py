"""A checkpoint is whole and verified, or it does not exist."""

import json
from collections.abc import Callable

import pytest
from crashing_file_system import Killed, copy_of_store, fresh_faults, restore

from cluster.checkpoints import Checkpoints, FileEntry, Manifest
from cluster.errors import CheckpointError, StorageError
from cluster.storage import Store

SHA = "0123456789abcdef" * 4


@pytest.fixture
def faults():
    return fresh_faults()


@pytest.fixture
def store(faults) -> Store:
    assert faults.fired == 0
    return Store("crash://run/checkpoints")


@pytest.fixture
def checkpoints(store) -> Checkpoints:
    return Checkpoints(store)


def files_of(step: int, version: int = 0) -> dict[str, bytes]:
    return {"model.safetensors": f"model {step} {version}".encode() * 9, "optimizer.bin": b"o" * step}


def save(checkpoints: Checkpoints, *steps: int, version: int = 0) -> None:
    for step in steps:
        checkpoints.commit(manifest(step, checkpoints.write_files(step, files_of(step, version))))


def manifest(step: int, files: dict[str, FileEntry]) -> Manifest:
    return Manifest(
        step=step,
        files=files,
        state_sha256=SHA,
        metrics={"val/loss": 0.5, "train/loss": float("inf")},
        versions={"torch": "2.13.0"},
        created="2026-11-23T11:24:00.123456+00:00",
    )


def newest_good(checkpoints: Checkpoints, at_most: int | None = None) -> tuple[int | None, dict[int, str]]:
    """The step of the newest good checkpoint, and what was said of the newer ones."""
    bad: dict[int, str] = {}
    good = checkpoints.newest_good(lambda step, error: bad.update({step: str(error)}), at_most)
    return (good[0].step if good else None), bad


def test_a_checkpoint_is_read_as_it_was_committed(checkpoints, store):
    save(checkpoints, 500)
    read_manifest, files = checkpoints.read(500)
    assert read_manifest == checkpoints.manifest(500) == manifest(500, {n: FileEntry.of(d) for n, d in files.items()})
    assert files == files_of(500)
    assert store.names() == [
        "step-00000500/manifest.json", "step-00000500/model.safetensors", "step-00000500/optimizer.bin",
    ]  # fmt: skip


def test_without_its_manifest_it_does_not_exist(checkpoints):
    save(checkpoints, 5)
    checkpoints.write_files(10, files_of(10))
    assert checkpoints.steps() == [5]
    assert newest_good(checkpoints) == (5, {})
    with pytest.raises(CheckpointError, match=r"step-00000010: manifest.json is missing"):
        checkpoints.read(10)


def test_there_is_none_in_an_empty_store(checkpoints):
    assert checkpoints.steps() == []
    assert newest_good(checkpoints) == (None, {})
    assert checkpoints.retain(1) == []


def test_steps_ascend_as_numbers(checkpoints):
    save(checkpoints, 100_000_000, 99_999_999, 7)
    assert checkpoints.steps() == [7, 99_999_999, 100_000_000]


def test_at_most_limits_the_step(checkpoints):
    save(checkpoints, 5, 10, 15)
    assert newest_good(checkpoints, at_most=12) == (10, {})
    assert newest_good(checkpoints, at_most=4) == (None, {})


def shorten(data: bytes) -> bytes:
    return data[:-1]


def flip_a_bit(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shorten, "model.safetensors has 89 bytes, the manifest says 90; restore it, or use an older checkpoint"),
        (flip_a_bit, "model.safetensors has other bytes than were written: its SHA-256 differs"),
        (None, "model.safetensors is missing"),
    ],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(checkpoints, store, damage, said):
    save(checkpoints, 5, 10)
    name = "step-00000010/model.safetensors"
    if damage is None:
        store.delete([name])
    else:
        store.write(name, damage(store.read(name)))
    step, bad = newest_good(checkpoints)
    assert step == 5
    assert list(bad) == [10]
    assert bad[10].startswith(f"{store.url}/step-00000010: {said}")


def changed(**changes) -> Callable[[dict], str]:
    return lambda fields: json.dumps(fields | changes)


def with_file(name: str, **entry) -> Callable[[dict], str]:
    return lambda fields: json.dumps(fields | {"files": {name: {"size": 1, "sha256": SHA} | entry}})


def without(key: str) -> Callable[[dict], str]:
    return lambda fields: json.dumps({name: value for name, value in fields.items() if name != key})


def test_every_torn_manifest_is_refused(checkpoints, store):
    save(checkpoints, 5)
    name = "step-00000005/manifest.json"
    whole = store.read(name).rstrip()
    for length in range(len(whole)):
        store.write(name, whole[:length])
        with pytest.raises(CheckpointError, match=r"step-00000005: manifest\.json is not JSON"):
            checkpoints.read(5)


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (lambda _: "\0" * 100, "is not JSON"),
        (lambda _: "[" * 100_000, "is not JSON"),
        (lambda _: "9" * 10_000, "is not JSON"),
        (lambda fields: " " * (1 << 20) + json.dumps(fields), "more than any manifest"),
        (lambda _: "[]", "has no schema version"),
        (without("schema"), "has no schema version"),
        (changed(schema=2), "has schema 2, this version reads 1"),
        (changed(schema=True), "has no schema version"),
        (without("versions"), "lacks versions"),
        (changed(extra=1), "unknown keys ['extra']"),
        (lambda fields: json.dumps(fields)[:-1] + ', "step": 5}', "has a key twice"),
        (changed(step=6), "says step 6"),
        (changed(step=5.0), "says step 5.0"),
        (changed(created="yesterday\n"), "not a time in UTC"),
        (changed(created="2026-11-23T11:24:00+01:00"), "not a time in UTC"),
        (changed(state_sha256=SHA.upper()), "not a SHA-256"),
        (changed(state_sha256=f"{SHA}\n"), "not a SHA-256"),
        (changed(metrics=[]), "not a mapping"),
        (changed(metrics={"loss": "low"}), "not a number"),
        (changed(metrics={"loss": True}), "not a number"),
        (changed(versions={"torch": 2}), "not a text"),
        (changed(files={}), "names no file"),
        (changed(files=["model"]), "not a mapping"),
        (changed(files={"model": SHA}), "not size and sha256"),
        (with_file("../../../etc/passwd"), "not a plain name"),
        (with_file("/etc/passwd"), "not a plain name"),
        (with_file("a/b"), "not a plain name"),
        (with_file("a\\b"), "not a plain name"),
        (with_file(".."), "not a plain name"),
        (with_file(""), "not a plain name"),
        (with_file("a\n"), "not a plain name"),
        (with_file("x" * 129), "not a plain name"),
        (with_file("manifest.json"), "not a plain name"),
        (with_file("model", size=-1), "the size -1"),
        (with_file("model", size=1 << 60), "the size"),
        (with_file("model", size=True), "the size True"),
        (with_file("model", size="1"), "the size '1'"),
        (with_file("model", sha256="abc"), "not a SHA-256"),
        (with_file("model", sha256=None), "not a SHA-256"),
        (with_file("model", mode=0o777), "unknown keys ['mode'] in model"),
        (
            lambda fields: json.dumps(fields).replace('"optimizer.bin"', '"model.safetensors"'),
            "has a key twice",
        ),
    ],
)
def test_a_manifest_we_could_not_have_written_is_refused_in_one_line(checkpoints, store, forge, said):
    save(checkpoints, 4, 5)
    name = "step-00000005/manifest.json"
    store.write(name, forge(json.loads(store.read(name))).encode())
    step, bad = newest_good(checkpoints)
    assert step == 4
    assert bad[5].startswith(f"{store.url}/step-00000005: manifest.json ")
    assert said in bad[5]
    assert "\n" not in bad[5]
    assert len(bad[5]) < 300


@pytest.mark.parametrize("verb", ["list", "read"])
def test_a_store_that_does_not_answer_is_no_bad_checkpoint(checkpoints, faults, verb):
    save(checkpoints, 5, 10)
    faults.deny = verb
    with pytest.raises(StorageError, match="the network is down"):
        newest_good(checkpoints)
    faults.deny = "nothing"
    assert newest_good(checkpoints) == (10, {})
    assert faults.fired


def test_saving_a_step_again_replaces_it_whole(checkpoints):
    save(checkpoints, 5)
    save(checkpoints, 5, version=1)
    assert checkpoints.read(5)[1] == files_of(5, version=1)


def test_retention_keeps_the_newest_and_the_best(checkpoints, store):
    save(checkpoints, 1, 2, 3, 4, 5, 6)
    assert checkpoints.retain(2, best_step=3) == [1, 2, 4]
    assert checkpoints.steps() == [3, 5, 6]
    assert store.folders() == ["step-00000003", "step-00000005", "step-00000006"]
    assert checkpoints.retain(2, best_step=3) == []
    assert checkpoints.retain(1) == [3, 5]
    assert checkpoints.retain(9) == []


def test_retention_sweeps_half_written_folders_but_none_that_may_be_being_written(checkpoints, store):
    checkpoints.write_files(3, files_of(3))
    assert checkpoints.retain(1) == []
    assert store.folders() == ["step-00000003"]
    save(checkpoints, 5)
    checkpoints.write_files(7, files_of(7))
    assert checkpoints.retain(3) == []
    assert store.folders() == ["step-00000005", "step-00000007"]


def test_what_is_not_ours_is_neither_read_nor_deleted(checkpoints, store):
    foreign = [
        "notes.txt",
        "step-1/manifest.json",
        "step-0000000001/manifest.json",
        "step-00000001",
        "old/manifest.json",
    ]
    for name in foreign:
        store.write(name, b"{}")
    save(checkpoints, 5, 6)
    assert checkpoints.steps() == [5, 6]
    assert checkpoints.retain(1) == [5]
    assert checkpoints.discard_after(0) == [6]
    assert store.names() == sorted(foreign)


def test_a_resume_discards_what_it_supersedes(checkpoints, store):
    """Else the bad newest one would count for ``retain``, and the good ones would go for it."""
    save(checkpoints, 5, 10, 15)
    store.write("step-00000015/optimizer.bin", b"")
    checkpoints.write_files(20, files_of(20))
    step, bad = newest_good(checkpoints)
    assert (step, list(bad)) == (10, [15])
    assert checkpoints.discard_after(10) == [15]
    assert store.folders() == ["step-00000005", "step-00000010"]
    save(checkpoints, 12)
    assert checkpoints.retain(1) == [5, 10]
    assert newest_good(checkpoints) == (12, {})


@pytest.mark.parametrize("kind", ["before", "torn", "after"])
@pytest.mark.parametrize("leftover", [False, True])
def test_a_kill_at_any_call_of_a_save_leaves_a_good_newest_checkpoint(store, kind, leftover):
    """And the run that goes on from there ends with exactly the checkpoints of an undisturbed one."""
    first = Checkpoints(store)
    save(first, 5, 10)
    if leftover:  # of a process killed here earlier, with other bytes
        first.write_files(15, files_of(15, version=1))
    content, at = copy_of_store(), 0
    outcomes = set()
    while True:
        faults = restore(content)
        faults.at, faults.kind = at, kind
        checkpoints = Checkpoints(store)
        try:
            save(checkpoints, 15)
            checkpoints.retain(1)
        except Killed:
            assert faults.fired == 1
        faults.at = None
        step, bad = newest_good(checkpoints)
        outcomes.add(step)
        torn_manifest = kind == "torn" and at == 3
        assert list(bad) == ([15] if torn_manifest else [])
        assert step == (15 if at > 3 or (at, kind) == (3, "after") else 10), faults.calls[-1]
        for good in set(checkpoints.steps()) - set(bad):
            assert checkpoints.read(good)[1] == files_of(good)
        if not faults.fired:
            break
        checkpoints.discard_after(step)
        save(checkpoints, 15)
        checkpoints.retain(1)
        assert store.folders() == ["step-00000015"]
        assert checkpoints.read(15)[1] == files_of(15)
        at += 1
    assert outcomes == {10, 15}
    assert at == 4 + 6  # the old manifest away, two files, the manifest; then two checkpoints of three objects


@pytest.mark.parametrize("kind", ["before", "torn", "after"])
def test_a_kill_while_a_step_is_saved_again_never_mixes_two(store, kind):
    first = Checkpoints(store)
    save(first, 5, 10)
    content = copy_of_store()
    for at in range(5):
        faults = restore(content)
        faults.at, faults.kind = at, kind
        checkpoints = Checkpoints(store)
        try:
            save(checkpoints, 10, version=1)
        except Killed:
            assert faults.fired == 1
        good = checkpoints.newest_good(lambda step, error: None)  # noqa: ARG005
        assert good is not None
        assert good[1] in (files_of(5), files_of(10), files_of(10, version=1))
        assert bool(faults.fired) == (at < 4)
