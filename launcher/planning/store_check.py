"""Checks that a job's store can be used, by writing, reading and deleting an object in it."""

from cluster.errors import DescriptionError, StorageError
from cluster.storage.store import Store
from jobs.spec import JobSpec
from launcher.config.description import Description, named_errors


def checked_store(description: Description) -> Store:
    """Return the store of a description after ``check_store``, with the name of the job file in errors.

    Raises:
        DescriptionError: The store cannot be used.
    """
    with named_errors(description.source):
        return check_store(description.spec)


def check_store(spec: JobSpec) -> Store:
    """Open the store of a job, and write, read and delete one object in it.

    Raises:
        DescriptionError: The store cannot be used, or no other process would see what is written there.
    """
    try:
        store = Store(spec.store)
        if not store.is_shared:
            raise DescriptionError(
                f"store {spec.store!r} is seen by one process alone, and workers are others; "
                "use a folder, or a URL such as s3://bucket/runs"
            )
        store.probe()
    except StorageError as error:
        raise DescriptionError(f"store: {error}") from error
    return store
