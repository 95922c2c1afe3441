"""The text of the data of a job, for people: a pure function from the document of ``launcher data``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.errors import listed
from launcher.display.tables import number, table

_MOST_CLASSES = 20
"""More are shown as the largest and the smallest half of so many."""
_MOST_LISTED = 20
"""Broken samples and groups of duplicates; ``--json`` lists all."""
_BAR = 30
"""The longest bar, in characters."""


def data_text(document: Mapping[str, Any]) -> str:
    """Return what is known of each dataset, then what was verified, the duplicates and where the sheet is."""
    verified = (document["verified"] or {}).get("datasets", {})
    blocks: list[str] = []
    for split, dataset in document["datasets"].items():
        blocks += _dataset_blocks(dataset, verified.get(split))
        if document["verified"] is not None and split not in verified:
            blocks.append(f"{dataset['key']} is not verified: it does not list where the images of its samples lie")
    if document["verified"] is not None and document["verified"]["resumed"]:
        resumed = document["verified"]
        blocks.append(
            f"{resumed['resumed']:,} samples were not read again: earlier commands found them whole, the first at "
            f"{resumed['resumed_since']}, and their objects have not changed since"
        )
    if document["duplicates"] is not None:
        blocks.append(_duplicates(document["duplicates"]))
    if document["sheet"] is not None:
        sheet = document["sheet"]
        blocks.append(f"contact sheet: {sheet['url']} ({sheet['scaling']})")
        if sheet["broken"]:
            blocks.append(_broken("data.train", sheet["broken"], f"those for the {len(sheet['samples'])} tiles"))
    return "\n\n".join(blocks)


def _dataset_blocks(dataset: Mapping[str, Any], verified: Mapping[str, Any] | None) -> Iterator[str]:
    yield table([(dataset["key"], dataset["dataset"]), *_facts(dataset, verified)])
    if dataset["classes"]:
        yield _classes(dataset["classes"])
    sampled = dataset["sampled"]
    if sampled.get("bytes"):
        sizes = [(name, *sampled[name].values()) for name in ("width", "height", "bytes")]
        yield table([("", *sampled["bytes"]), *([name, *map(round, values)] for name, *values in sizes)])
    verified_broken = [] if verified is None else verified["broken"]
    if verified_broken:
        yield _broken(dataset["key"], verified_broken, "all")
    shown = {each["url"] for each in verified_broken}
    broken = [each for each in sampled["broken"] if each["url"] not in shown]
    if broken:
        but = "" if verified is None else ", but whole when verified"
        yield _broken(dataset["key"], broken, f"{sampled['samples']:,} sampled{but}")


def _broken(key: str, broken: Sequence[Mapping[str, str]], of: str) -> str:
    lines = [f"{each['url']}: {each['problem']}" for each in broken[:_MOST_LISTED]]
    return "\n".join([f"{key}: {len(broken):,} broken of {of}", *lines, *_rest(broken)])


def _facts(dataset: Mapping[str, Any], verified: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    sampled = dataset["sampled"]
    if dataset["source"] is not None:
        yield "source", f"{dataset['source']['format']} at {dataset['source']['place']}"
    yield "samples", number(dataset["samples"])
    if dataset["classes"]:
        yield "classes", _balance(dataset["classes"], dataset["imbalance"])
    elif dataset["targets"] is not None:
        targets = dataset["targets"]
        shape = f"{targets['shape']} " if targets["shape"] else ""
        yield (
            "targets",
            (
                f"{shape}{targets['type']} from {number(targets['min'])} to {number(targets['max'])}, mean "
                f"{number(targets['mean'])}"
            ),
        )
    elif dataset.get("unused_targets") is not None:
        yield "targets", f"not counted: {dataset['unused_targets']:,} are listed, not a number for each sample"
    else:
        yield "targets", "not listed"
    for reason, names in dataset["passed_over"].items():
        yield "passed over", f"{names['count']:,} {reason}, first {names['first']}"
    yield "sampled", number(sampled["samples"])
    for part, shapes in (dataset["shapes"] or {}).items():
        yield part, _shares(shapes)
    if sampled.get("formats"):
        yield "formats", _shares(sampled["formats"])
        odd = {"with several frames": sampled["with_frames"], "turned upright by EXIF": sampled["rotated"]}
        notes = "".join(f"; {count:,} {what}" for what, count in odd.items() if count)
        yield "modes", f"{_shares(sampled['modes'])}{notes}"
    if verified is not None:
        yield "verified", f"all {verified['samples']:,}: {len(verified['broken']):,} broken"


def _balance(classes: Sequence[Mapping[str, Any]], imbalance: float | None) -> str:
    empty = sum(not each["count"] for each in classes)
    if imbalance is None:
        return f"{len(classes):,}; {empty:,} without samples"
    return f"{len(classes):,}; the largest has {number(imbalance, digits=3)} times the samples of the smallest"


def _classes(classes: Sequence[Mapping[str, Any]]) -> str:
    """Return the classes with bars: all in their order; of many, the largest and the smallest."""
    most = max(each["count"] for each in classes)
    lines = [(each["name"], each["count"], _bar(each["count"], most)) for each in classes]
    if len(lines) > _MOST_CLASSES:
        by_size = sorted(lines, key=lambda line: -line[1])
        half = _MOST_CLASSES // 2
        lines = [*by_size[:half], (f"... {len(lines) - 2 * half:,} more", None, ""), *by_size[-half:]]
    return table([("class", "samples", ""), *lines])


def _bar(count: int, most: int) -> str:
    return "#" * max(round(_BAR * count / most) if most else 0, min(count, 1))


def _shares(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _duplicates(found: Mapping[str, Any]) -> str:
    if not found["groups"]:
        return "duplicates: none"
    lines = [
        f"duplicates: {found['samples']:,} samples in {found['groups']:,} group{'s' * (found['groups'] > 1)} of equal "
        f"content: {found['in_both']:,} in data.train and data.val, {found['labels_differ']:,} with different labels"
    ]
    for group in found["list"][:_MOST_LISTED]:
        marks = {"in_both": "in both", "labels_differ": "different labels"}
        marked = ", ".join(mark for name, mark in marks.items() if group[name]) or "equal"
        samples = [f"{each['key']} {each['url']} ({each['label']})" for each in group["samples"]]
        lines.append(f"{marked}: {listed(samples, most=4)}")
    return "\n".join([*lines, *_rest(found["list"])])


def _rest(items: Sequence[Any]) -> list[str]:
    left = len(items) - _MOST_LISTED
    return [f"... and {left:,} more, which --json lists"] if left > 0 else []
