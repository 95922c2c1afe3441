"""A checkpoint is whole and verified, or it does not exist."""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable

import pytest
from counting_file_system import CountingFileSystem, start_counting
from crashing_file_system import Killed, copy_of_store, fresh_faults, restore

from cluster.errors import CheckpointError, StorageError
from cluster.run.checkpoints import Checkpoints
from cluster.run.manifest import FileEntry, Part, Share, digest_of_files, divide, join
from cluster.storage.store import Store
from tests import saved

MODEL = "model.safetensors"
SHA = "0123456789abcdef" * 4


@pytest.fixture
def faults():
    return fresh_faults()


@pytest.fixture
def store(faults) -> Store:
    assert faults.fired == 0
    return Store("crash://run/checkpoints", patience_s=0)


@pytest.fixture(autouse=True)
def _one_call_at_a_time(monkeypatch) -> None:
    """What is killed at one call makes no other."""
    monkeypatch.setattr("cluster.run.checkpoints.CONCURRENT_REQUESTS", 1)


@pytest.fixture
def checkpoints(store) -> Checkpoints:
    return Checkpoints(store)


def files_of(step: int, version: int = 0) -> dict[str, bytes]:
    return {"model.safetensors": f"model {step} {version}".encode() * 9, "optimizer.bin": b"o" * step}


def save(checkpoints: Checkpoints, *steps: int, version: int = 0) -> None:
    for step in steps:
        saved.save(checkpoints, step, files_of(step, version))


def objects(checkpoints: Checkpoints, step: int) -> dict[str, str]:
    """The object of each file, which has one part."""
    return {name: entry.parts[0].object for name, entry in checkpoints.manifest(step).files.items()}


def retain(checkpoints: Checkpoints, *args, **options) -> list[int]:
    """The steps of the checkpoints that are deleted."""
    return sorted(step for step in checkpoints.retain(*args, **options) if step is not None)


def newest_good(checkpoints: Checkpoints) -> tuple[int | None, dict[int, str]]:
    """The step of the newest good checkpoint, and what was said of the newer ones."""
    bad: dict[int, str] = {}
    good = checkpoints.newest_good(lambda step, error: bad.update({step: str(error)}))
    return (good[0].step if good else None), bad


def test_a_checkpoint_is_read_as_it_was_committed(checkpoints, store):
    manifest = saved.manifest_of(500, saved.write_files(checkpoints, 500, files_of(500)))
    checkpoints.commit(manifest)
    assert checkpoints.read(500) == (manifest, files_of(500))
    assert checkpoints.read(500, ["optimizer.bin", "nothing"])[1] == {"optimizer.bin": files_of(500)["optimizer.bin"]}
    assert store.names() == sorted(["step-00000500/manifest.json", *objects(checkpoints, 500).values()])
    assert re.fullmatch(r"step-00000500/model-[0-9a-f]{8}-00000\.safetensors", objects(checkpoints, 500)[MODEL])


def test_a_file_may_have_parts_and_the_parts_other_writers(checkpoints, store):
    parts = [b"first", b"", b"third"]
    writers = [Checkpoints(store) for _ in parts]
    written = [writer.write_part(5, (MODEL, n), data) for n, (writer, data) in enumerate(zip(writers, parts))]
    shares = [share(5, {(MODEL, n): part}, num_parts={MODEL: 3}) for n, part in enumerate(written)]
    assert [join(shares[:count]) for count in (1, 2)] == [None, None]
    manifest = join(shares)
    checkpoints.commit(manifest)
    assert checkpoints.read(5) == (manifest, {MODEL: b"firstthird"})
    assert manifest.size == manifest.files[MODEL].size == 10
    assert manifest.state_sha256 == join(shares[::-1]).state_sha256 == digest_of_files(manifest.files)
    assert len({part.object for part in written}) == 3


def share(step: int, parts: dict[tuple[str, int], Part], num_parts: dict[str, int]) -> Share:
    return Share(
        step=step, parts=parts, num_parts=num_parts, state_files=list(num_parts), metrics={}, versions={},
        created="2026-11-23T11:24:00+00:00",
    )  # fmt: skip


def test_the_digest_of_a_file_is_its_sha256_or_that_of_its_parts():
    one, two = Part.of("a", b"one"), Part.of("b", b"two")
    assert FileEntry((one,)).sha256 == hashlib.sha256(b"one").hexdigest()
    assert FileEntry((one, two)).sha256 == hashlib.sha256((one.sha256 + two.sha256).encode()).hexdigest()
    assert digest_of_files({"x": FileEntry((one,))}) != digest_of_files({"y": FileEntry((one,))})


@pytest.mark.parametrize(
    ("sizes", "count", "shares"),
    [
        ([], 2, [[], []]),
        ([5], 3, [[0], [], []]),
        ([1, 1, 1, 1], 2, [[0, 1], [2, 3]]),
        ([1, 1, 1], 2, [[0, 1], [2]]),
        ([4, 4, 1, 1, 1, 1], 3, [[0], [1], [2, 3, 4, 5]]),
        ([0, 0], 2, [[0, 1], []]),
        ([9, 1, 1], 2, [[0], [1, 2]]),
    ],
)
def test_shares_are_contiguous_and_about_equal(sizes, count, shares):
    assert [list(share) for share in divide(sizes, count)] == shares


def test_what_has_not_changed_is_not_written_again(checkpoints, store):
    first = checkpoints.write_part(5, (MODEL, 0), b"trunk")
    assert checkpoints.write_part(10, (MODEL, 0), b"trunk", first) is first
    assert checkpoints.write_part(10, (MODEL, 0), b"other", first).object.startswith("step-00000010/")
    assert len(store.names()) == 2


def test_a_part_lives_as_long_as_a_checkpoint_that_names_it(checkpoints, store):
    trunk = checkpoints.write_part(1, ("trunk", 0), b"trunk")
    for step in range(1, 5):
        again = checkpoints.write_part(step, ("trunk", 0), b"trunk", trunk)
        files = {"trunk": FileEntry((again,)), **saved.write_files(checkpoints, step, {"head": b"%d" % step})}
        checkpoints.commit(saved.manifest_of(step, files))
        retain(checkpoints, step, 1)
        assert checkpoints.read(step)[1] == {"trunk": b"trunk", "head": b"%d" % step}
        assert len(store.names()) == 3
    assert retain(Checkpoints(store), 4, 1) == []
    assert trunk.object in store.names()
    save(checkpoints, 5)
    assert retain(Checkpoints(store), 5, 1) == [4]
    assert trunk.object not in store.names()


def test_without_its_manifest_it_does_not_exist(checkpoints):
    save(checkpoints, 5)
    saved.write_files(checkpoints, 10, files_of(10))
    assert checkpoints.steps() == [5]
    assert newest_good(checkpoints) == (5, {})
    with pytest.raises(CheckpointError, match=r"step-00000010: its manifest is missing"):
        checkpoints.read(10)


def test_there_is_none_in_an_empty_store(checkpoints):
    assert checkpoints.steps() == []
    assert newest_good(checkpoints) == (None, {})
    assert retain(checkpoints, 5, 1) == []


def test_steps_ascend_as_numbers(checkpoints):
    save(checkpoints, 100_000_000, 99_999_999, 7)
    assert checkpoints.steps() == [7, 99_999_999, 100_000_000]


def shorten(data: bytes) -> bytes:
    return data[:-1]


def flip_a_bit(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shorten, " has 89 bytes, the manifest says 90; restore it, or use an older checkpoint"),
        (flip_a_bit, " has other bytes than were written: its SHA-256 differs"),
        (None, " is missing"),
    ],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(checkpoints, store, damage, said):
    save(checkpoints, 5, 10)
    name = objects(checkpoints, 10)[MODEL]
    if damage is None:
        store.delete([name])
    else:
        store.write(name, damage(store.read(name)))
    step, bad = newest_good(checkpoints)
    assert step == 5
    assert list(bad) == [10]
    assert bad[10].startswith(f"{store.url}/step-00000010: {name.partition('/')[2]}{said}")


def changed(**changes) -> Callable[[dict], str]:
    return lambda fields: json.dumps(fields | changes)


def with_file(name: str, **part) -> Callable[[dict], str]:
    whole = {"object": "step-00000005/model", "size": 1, "sha256": SHA} | part
    return lambda fields: json.dumps(fields | {"files": {name: [whole]}})


def twice_the_same_object(fields: dict) -> str:
    part = {"object": "step-00000005/model", "size": 1, "sha256": SHA}
    return json.dumps(fields | {"files": {"a": [part], "b": [part]}})


def without(key: str) -> Callable[[dict], str]:
    return lambda fields: json.dumps({name: value for name, value in fields.items() if name != key})


def test_metrics_may_be_many_and_named_after_files_that_are_not_utf_8(checkpoints, store):
    """Classes are named after folders, and a metric may have a value for each."""
    save(checkpoints, 5)
    name = "step-00000005/manifest.json"
    fields = json.loads(store.read(name))
    fields["metrics"] = {"val/recall/\udcff": 0.5, "val/recall/\U0001f600": 1.0}
    fields["metrics"] |= {f"val/recall/{number}": 0.25 for number in range(150_000)}
    store.write(name, json.dumps(fields).encode())
    metrics = checkpoints.manifest(5).metrics
    assert (metrics["val/recall/\\udcff"], metrics["val/recall/\U0001f600"], len(metrics)) == (0.5, 1.0, 150_002)


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
        (lambda fields: " " * (1 << 26) + json.dumps(fields), "more than any manifest"),
        (lambda _: "[]", "has no schema version"),
        (without("schema"), "has no schema version"),
        (changed(schema=1), "has schema 1, this version reads 2"),
        (changed(schema=True), "has no schema version"),
        (without("versions"), "versions: Field required"),
        (changed(extra=1), "extra: unknown key, got 1"),
        (lambda fields: json.dumps(fields)[:-1] + ', "step": 5}', "has a key twice"),
        (changed(step=6), "says step 6"),
        (changed(schema=2.0), "has no schema version"),
        (changed(step=5.0), "step: Input should be a valid integer, got 5.0"),
        (changed(created="yesterday\n"), "created: has the wrong form, got"),
        (changed(created="2026-11-23T11:24:00+01:00"), "created: has the wrong form, got"),
        (changed(state_sha256=SHA.upper()), "state_sha256: has the wrong form"),
        (changed(state_sha256=f"{SHA}\n"), "state_sha256: has the wrong form"),
        (changed(metrics=[]), "metrics: Input should be an object, got []"),
        (changed(metrics={"loss": "low"}), "metrics.loss: Input should be a valid number, got 'low'"),
        (changed(metrics={"loss": True}), "metrics.loss: Input should be a valid number, got True"),
        (changed(versions={"torch": 2}), "versions.torch: Input should be a valid string, got 2"),
        (changed(files={}), "files: Dictionary should have at least 1 item"),
        (changed(files=["model"]), "files: Input should be an object, got ['model']"),
        (changed(files={"model": SHA}), "files.model: Input should be a valid array"),
        (changed(files={"model": []}), "files.model: Tuple should have at least 1 item"),
        (changed(files={"model": [SHA]}), "files.model[0]: Input should be an object"),
        (with_file("model", object="step-00000006/model"), "not an object of a step up to its own"),
        (with_file("model", object="step-00000005/../model"), "not an object of a step"),
        (with_file("model", object="step-00000005/manifest.json"), "not an object of a step"),
        (with_file("model", object="../step-00000005/model"), "not an object of a step"),
        (with_file("model", object="step-5/model"), "not an object of a step"),
        (with_file("model", object="/etc/passwd"), "not an object of a step"),
        (with_file("model", object="model"), "not an object of a step"),
        (with_file("model", object=["step-00000005/model"]), "files.model[0].object: Input should be a valid string"),
        (twice_the_same_object, "names an object twice"),
        (with_file("../../../etc/passwd"), "not a plain name"),
        (with_file("/etc/passwd"), "not a plain name"),
        (with_file("a/b"), "not a plain name"),
        (with_file("a\\b"), "not a plain name"),
        (with_file(".."), "not a plain name"),
        (with_file(""), "not a plain name"),
        (with_file("a\n"), "not a plain name"),
        (with_file("x" * 129), "not a plain name"),
        (with_file("manifest.json"), "not a plain name"),
        (with_file("manifest-00000002-1f3ac0de.json"), "not a plain name"),
        (with_file("model", size=-1), "files.model[0].size: Input should be greater than or equal to 0, got -1"),
        (with_file("model", size=1 << 60), "files.model[0].size: Input should be less than or equal to 4294967296"),
        (with_file("model", size=True), "files.model[0].size: Input should be a valid integer, got True"),
        (with_file("model", size="1"), "files.model[0].size: Input should be a valid integer, got '1'"),
        (
            with_file("model", sha256="abc"),
            "files.model[0].sha256: has the wrong form",
        ),
        (with_file("model", sha256=None), "files.model[0].sha256: Input should be a valid string, got None"),
        (with_file("model", mode=0o777), "files.model[0].mode: unknown key, got 511"),
        (with_file("model", size=1.0), "files.model[0].size: Input should be a valid integer, got 1.0"),
        (with_file("model\n" * 99), "names the file 'model"),
        (changed(versions={"a\n" * 999: 1}), "versions.a"),
        (changed(metrics={str(number): "" for number in range(99_999)}), "metrics.0: Input should be a valid number"),
        (changed(**{f"more {number}": 1 for number in range(999_999)}), "has 1000006 keys in one object"),
        (changed(files={"model": [""] * 999_999}), "files.model[0]: Input should be an object"),
        (lambda fields: json.dumps(fields)[:-1] + f', "extra": {"[" * 300}{"]" * 300}}}', "recursion limit exceeded"),
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


OLD, NEW = "00000002-ffffffff", "00000010-00000000"


def test_of_two_drivers_the_later_claim_counts_whoever_writes_last(store):
    old, new = Checkpoints(store, OLD), Checkpoints(store, NEW)
    save(old, 4, 5)
    save(new, 5, version=1)
    late = Checkpoints(store, OLD)
    save(late, 5)
    assert late.read(5)[1] == files_of(5, version=1)
    assert new.exists(5)
    assert retain(old, 5, 1) == [4]
    assert len(store.names()) == 3, "what the older one wrote is needed by nobody"
    assert Checkpoints(store).read(5)[1] == files_of(5, version=1)


def test_a_writer_that_was_taken_over_from_deletes_nothing_of_the_later_one(store):
    """Nor do later checkpoints count among those that it keeps: its own would go, on which they may rest."""
    old, new = Checkpoints(store, OLD), Checkpoints(store, NEW)
    save(old, 4, 5)
    save(new, 6, 7, 8)
    saved.write_files(new, 9, files_of(9))
    there = store.names()
    assert retain(old, 5, 2) == []
    assert store.names() == there
    assert retain(old, 5, 1) == [4]
    assert new.steps() == [5, 6, 7, 8]


def test_a_manifest_that_does_not_count_is_an_orphan_with_all_its_parts(store):
    save(Checkpoints(store, OLD), 5)
    superseded = store.names()
    save(Checkpoints(store, NEW), 5, version=1)
    survey = Checkpoints(store).survey()
    assert sorted(survey.orphans) == superseded
    assert survey.manifests.keys() == {5}


def test_a_later_claim_counts_over_none(store):
    save(Checkpoints(store), 5, 6)
    save(Checkpoints(store, NEW), 5, version=1)
    assert newest_good(Checkpoints(store)) == (6, {})
    assert Checkpoints(store).read(5)[1] == files_of(5, version=1)


def test_beyond_a_fence_no_manifest_of_an_earlier_claim_counts(store):
    old, new, reader = Checkpoints(store, OLD), Checkpoints(store, NEW), Checkpoints(store)
    save(old, 4, 6)
    new.fence(4)
    save(new, 6, 7, version=1)
    there = store.names()
    save(old, 6, 7, 8)
    save(Checkpoints(store), 9)
    assert reader.steps() == [4, 6, 7]
    assert newest_good(reader) == (7, {})
    assert reader.read(6)[1] == files_of(6, version=1)
    assert [step for step in range(10) if reader.exists(step)] == [4, 6, 7]
    with pytest.raises(CheckpointError, match=r"step-00000008: its manifest is missing: .* gone on without it"):
        reader.manifest(8)
    assert retain(new, 7, 1) == [4, 6]
    assert newest_good(reader) == (7, {})
    assert set(store.names("step-00000007")) < set(there), "what is late goes"
    assert store.names("step-00000008"), "it may be of a driver that has taken over"


def test_an_object_that_a_checkpoint_needs_is_no_orphan_though_its_manifest_does_not_count(store):
    old, new = Checkpoints(store, OLD), Checkpoints(store, NEW)
    trunk = FileEntry((old.write_part(5, ("trunk", 0), b"trunk"),))
    new.fence(4)
    old.commit(saved.manifest_of(5, {"trunk": trunk, **saved.write_files(old, 5, {"head": b"old"})}))
    new.commit(saved.manifest_of(6, {"trunk": trunk, **saved.write_files(new, 6, {"head": b"new"})}))
    survey = Checkpoints(store).survey()
    assert (list(survey.manifests), survey.defects) == ([6], {})
    assert [name.partition("-")[0] for name in map(base_name, survey.orphans)] == ["head", "manifest"]
    new.remove_orphans(survey)
    assert Checkpoints(store).read(6)[1] == {"trunk": b"trunk", "head": b"new"}


def base_name(name: str) -> str:
    return name.rpartition("/")[2]


def claim(number: int) -> str:
    return f"{number:08d}-00000000"


@pytest.mark.parametrize("writer", [0, 2])
def test_a_manifest_counts_if_all_later_fences_admit_it(store, writer):
    """Also those that were deleted: others cover them."""
    for fences in itertools.product(range(3), repeat=4):
        fresh_faults()
        for number, step in enumerate(fences, 1):
            Checkpoints(store, claim(number)).fence(step)
        save(Checkpoints(store, claim(writer)), *range(4))
        assert Checkpoints(store).steps() == list(range(min([3, *fences[writer:]]) + 1))


def test_a_run_that_restarts_again_and_again_at_a_step_has_few_fences(store):
    for number in range(1, 9):
        Checkpoints(store, claim(number)).fence(5)
    assert len(store.names()) == 2


def test_a_driver_that_goes_back_fences_off_what_it_has_taken_over(store):
    old, new = Checkpoints(store, OLD), Checkpoints(store, NEW)
    save(old, 4, 6)
    new.fence(6)
    new.fence(4)
    assert Checkpoints(store).steps() == [4]
    save(new, 6)
    later = Checkpoints(store, claim(11))
    later.fence(6)
    save(old, 5)
    assert Checkpoints(store).steps() == [4, 6]


@pytest.mark.parametrize("kind", ["before", "after"])
def test_a_kill_while_it_is_discarded_never_brings_back_what_was_superseded(store, kind):
    save(Checkpoints(store), 5, 6)
    save(Checkpoints(store, OLD), 6)
    save(Checkpoints(store, NEW), 6, version=1)
    content = copy_of_store()
    for at in itertools.count():
        faults = restore(content)
        faults.at, faults.kind = at, kind
        with contextlib.suppress(Killed):
            Checkpoints(store).discard_after(5)
        faults.at = None
        found = Checkpoints(store).newest_good(lambda step, error: pytest.fail(f"{step}: {error}"))
        assert found is not None
        assert found[1] in (files_of(5), files_of(6, version=1))
        if not faults.fired:
            break
    assert at == 9, "three manifests and two objects of each"


def test_retention_keeps_the_newest_and_the_best(checkpoints, store):
    save(checkpoints, 1, 2, 3, 4, 5, 6)
    assert retain(checkpoints, 6, 2, best_step=3) == [1, 2, 4]
    assert checkpoints.steps() == [3, 5, 6]
    assert store.folders() == ["step-00000003", "step-00000005", "step-00000006"]
    assert retain(checkpoints, 6, 2, best_step=3) == []
    assert retain(checkpoints, 6, 1) == [3, 5]
    assert retain(checkpoints, 6, 9) == []


def test_retention_may_be_left_off_anywhere(checkpoints, store, monkeypatch):
    """Each of four checkpoints to remove has a part in the folder of the first; all that are left are whole."""
    monkeypatch.setattr("cluster.run.checkpoints._DELETED_AT_A_STRETCH", 1)
    trunk = {"trunk": FileEntry((checkpoints.write_part(1, ("trunk", 0), b"trunk"),))}
    for step in range(1, 5):
        files = {"head": b"%d" % step, "tail": b"t" * step}
        checkpoints.commit(saved.manifest_of(step, trunk | saved.write_files(checkpoints, step, files)))
    save(checkpoints, 5)
    content, left = copy_of_store(), list[list[int]]()
    for most in itertools.count():
        restore(content)
        taken = list(itertools.islice(Checkpoints(store).retain(5, 1), most))
        left.append(Checkpoints(store).steps())
        assert [step for step in range(1, 6) if step not in taken] == left[-1]
        for step in left[-1]:
            Checkpoints(store).read(step)
        if len(taken) < most:
            break
        assert retain(Checkpoints(store), 5, 1) == left[-1][:-1], "the rest goes later"
        assert store.folders() == ["step-00000005"]
    assert left[0] == [1, 2, 3, 4, 5]
    assert left[-1] == [5]
    assert most > 4 * 3, "a manifest and two or three parts of each"


def test_the_run_is_asked_for_before_each_step_of_which_something_is_deleted(checkpoints, store):
    save(checkpoints, 1, 2, 3, 4)

    def check() -> None:
        asked.append(store.folders())
        if len(asked) == 3:
            raise StorageError("another driver's")

    asked: list[list[str]] = []
    with pytest.raises(StorageError, match="another driver's"):
        list(checkpoints.retain(4, 1, check=check))
    assert [len(folders) for folders in asked] == [4, 3, 2]
    assert checkpoints.steps() == [1, 4]


def test_retention_yields_nothing_before_the_store_has_answered(checkpoints, monkeypatch):
    """Else parts that cannot be deleted, of no checkpoint, would pass for progress at every try."""

    def refuse(*_: object, **__: object) -> None:
        raise StorageError("memory://run: cannot delete")

    saved.write_files(checkpoints, 3, files_of(3))
    save(checkpoints, 5)
    monkeypatch.setattr(Store, "delete", refuse)
    with pytest.raises(StorageError, match="cannot delete"):
        next(checkpoints.retain(5, 1))


def test_a_manifest_is_deleted_first_and_alone_and_then_several_parts_at_a_time(checkpoints, faults, monkeypatch):
    monkeypatch.setattr("cluster.run.checkpoints.CONCURRENT_REQUESTS", 8)
    many = {f"{number:02}.bin": b"1" for number in range(40)}
    for step in (5, 6):
        saved.save(checkpoints, step, many)
    num_calls = len(faults.calls)
    assert retain(checkpoints, 6, 1) == [5]
    first, *others = faults.calls[num_calls:]
    assert first.endswith("/step-00000005/manifest.json")
    assert len(others) == 40

    CountingFileSystem.store.clear()
    counted = Checkpoints(Store("count://run/checkpoints"))
    for step in (5, 6):
        saved.save(counted, step, many)
    start_counting(latency_s=0.002)
    assert retain(counted, 6, 1) == [5]
    assert CountingFileSystem.calls["delete"] == 41
    assert 4 <= CountingFileSystem.most["delete"] <= 8


def test_retention_sweeps_half_written_folders_but_none_that_may_be_being_written(checkpoints, store):
    saved.write_files(checkpoints, 3, files_of(3))
    assert retain(checkpoints, 3, 1) == []
    assert store.folders() == ["step-00000003"]
    save(checkpoints, 5)
    saved.write_files(checkpoints, 7, files_of(7))
    assert retain(checkpoints, 5, 3) == []
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
    assert retain(checkpoints, 6, 1) == [5]
    checkpoints.discard_after(0)
    assert store.names() == sorted(foreign)


def test_a_bad_checkpoint_stays_and_does_not_count(checkpoints, store):
    save(checkpoints, 5, 10, 15)
    store.write(objects(checkpoints, 15)[MODEL], b"")
    store.write("step-00000005/manifest.json", b"")
    before = [name for name in store.names() if name.startswith("step-00000015/")]
    step, bad = newest_good(checkpoints)
    assert (step, list(bad)) == (10, [15])
    resumed = Checkpoints(store)
    save(resumed, 12)
    assert retain(resumed, 12, 9, bad=[15]) == []
    assert resumed.steps() == [5, 10, 12, 15]
    assert retain(resumed, 12, 1, bad=[15]) == [5, 10]
    save(resumed, 20)
    assert retain(resumed, 20, 1, bad=[15]) == [12]
    assert [name for name in store.names() if name.startswith("step-00000015/")] == before


def test_a_step_that_was_bad_is_good_again_once_it_is_made_again(checkpoints, store):
    save(checkpoints, 5, 10)
    store.write(objects(checkpoints, 10)[MODEL], b"")
    resumed = Checkpoints(store)
    save(resumed, 10, version=1)
    assert retain(resumed, 10, 1) == [5]
    assert resumed.read(10)[1] == files_of(10, version=1)
    assert len(store.names()) == 3


def test_going_back_discards_what_lies_beyond(checkpoints, store):
    save(checkpoints, 5, 10, 15)
    saved.write_files(checkpoints, 20, files_of(20))
    checkpoints.discard_after(10)
    assert store.folders() == ["step-00000005", "step-00000010"]


@pytest.mark.parametrize("kind", ["before", "torn", "after"])
@pytest.mark.parametrize("leftover", [False, True])
def test_a_kill_at_any_call_of_a_save_leaves_a_good_newest_checkpoint(store, kind, leftover):
    """And the run that goes on from there ends with exactly the checkpoints of an undisturbed one."""
    first = Checkpoints(store)
    save(first, 5, 10)
    if leftover:  # of a process killed here earlier, with other bytes
        saved.write_files(first, 15, files_of(15, version=1))
    content, outcomes = copy_of_store(), set()
    for at in itertools.count():
        faults = restore(content)
        faults.at, faults.kind = at, kind
        checkpoints = Checkpoints(store)
        try:
            save(checkpoints, 15)
            retain(checkpoints, 15, 1)
        except Killed:
            assert faults.fired == 1
        faults.at = None
        step, bad = newest_good(checkpoints)
        outcomes.add(step)
        assert list(bad) == ([15] if (kind, at) == ("torn", MANIFEST_AT) else [])
        assert step == (15 if at > MANIFEST_AT or (at, kind) == (MANIFEST_AT, "after") else 10), faults.calls[-1]
        for good in set(checkpoints.steps()) - set(bad):
            assert checkpoints.read(good)[1] == files_of(good)
        if not faults.fired:
            break
        resumed = Checkpoints(store)
        save(resumed, 15)
        retain(resumed, 15, 1, bad=bad.keys() - {15})
        assert store.folders() == ["step-00000015"]
        assert resumed.read(15)[1] == files_of(15)
        assert len(store.names()) == 3
    assert outcomes == {10, 15}
    assert at == MANIFEST_AT + 1 + 6 + 2 * leftover  # two checkpoints of three objects, and what was left over


MANIFEST_AT = 2
"""The write of a save that commits it."""


@pytest.mark.parametrize("kind", ["before", "torn", "after"])
def test_a_kill_while_a_step_is_saved_again_never_mixes_two(store, kind):
    first = Checkpoints(store)
    save(first, 5, 10)
    content = copy_of_store()
    for at in range(MANIFEST_AT + 2):
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
        assert bool(faults.fired) == (at <= MANIFEST_AT)
