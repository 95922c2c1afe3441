"""Changes of a run's description: which ones there are, and which ones leave the bits of the run as they are."""

from collections.abc import Sequence

from cluster.errors import DescriptionError
from cluster.run.run_directory import RunDirectory
from launcher.config.description import Description, Difference, differences, parse

_SAFE_KEYS = (
    "name", "store", "workers", "tracking", "checkpoint", "train.max_steps", "train.max_seconds", "data.loaders",
)  # fmt: skip
"""Keys that may change during a run: no bit of its state depends on them."""
_SAFE_IF_EXACT = ("train.bucket_mb",)
"""Keys that may also change while ``train.exact`` is true; the sum of the backend's all-reduce depends on them."""

_SAFE_CHANGES = (("data.on_bad_sample", "error", "skip"),)
"""Key, old and new value: no step so far would have been another one."""


def changes_of(stored: str, wanted: Description) -> list[Difference]:
    """Return what differs between a stored description and the wanted one.

    Worker settings that come from the cluster file are no change.
    """
    return differences(parse(stored, wanted.source, wanted.of_cluster).spec, wanted.spec)


def unsafe_changes(changes: list[Difference], wanted: Description) -> list[Difference]:
    """Return the changes that may alter the bits of a run that goes on with the wanted description."""
    safe_keys = _SAFE_KEYS + (_SAFE_IF_EXACT if wanted.spec.train.exact else ())
    return [
        change
        for change in changes
        if not _is_in(change.key, safe_keys) and (change.key, change.old, change.new) not in _SAFE_CHANGES
    ]


def compare(
    run: RunDirectory, stored: Description, wanted: Description, *, force: bool = False
) -> tuple[list[Difference], bool]:
    """Return what would change in an existing run, and whether all of it is safe, so that its bits stay the same.

    Raises:
        DescriptionError: A change is unsafe, and ``force`` is False.
    """
    changes = changes_of(stored.text, wanted)
    unsafe = unsafe_changes(changes, wanted)
    if unsafe and not force:
        listed = "; ".join(map(str, unsafe))
        raise DescriptionError(
            f"{wanted.source}: the run {run.url} exists with another description: {listed}; "
            "give this one another name, or resume with --force to change the run"
        )
    return changes, not unsafe


def _is_in(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)
