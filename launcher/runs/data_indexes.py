"""The indexes of a run's data in its directory: written before workers start, compared when the run goes on."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from cluster.errors import DescriptionError, StorageError
from cluster.run.lease import STATUS_INTERVAL_S
from cluster.run.run_directory import RunDirectory
from launcher.planning.built_index import BuiltIndex
from launcher.runs.environment import recorded_indexes


def write_indexes(run: RunDirectory, indexes: Sequence[BuiltIndex]) -> None:
    """Write the indexes that a run directory lacks; the caller holds the lease.

    One of a million samples may take a minute, so the heartbeat goes on meanwhile.
    """
    if not indexes:
        return
    run.check_lease()
    with ThreadPoolExecutor(1, thread_name_prefix="indexes") as pool:
        for index in indexes:
            writing = pool.submit(run.write_index, index.digest, index.content)
            while not wait([writing], timeout=STATUS_INTERVAL_S).done:
                run.stay_alive()
            writing.result()


def check_indexes(run: RunDirectory, source: str, indexes: Sequence[BuiltIndex]) -> None:
    """Check that the data is what the run has recorded of it; a source that only one of them has is no difference.

    Args:
        run: The run that goes on.
        source: The name of its description, for errors.
        indexes: Those of its data as it is now.

    Raises:
        DescriptionError: The data has changed since; the message names what.
        StorageError: The run directory cannot be read.
    """
    recorded = recorded_indexes(run.read_environment())
    for index in indexes:
        digest = recorded.get(index.source)
        if digest in (None, index.digest):
            continue
        from jobs.images.indexing.index_difference import index_difference  # takes pyarrow, which takes 0.3 s
        from jobs.images.indexing.index_files import fetch_index, unpack_index

        try:
            what = index_difference(fetch_index(run, digest), unpack_index(index.content, index.digest))
        except StorageError as error:
            what = f"what is not known, since the index of the run cannot be read: {error}"
        if not what:  # other files have come or gone
            continue
        raise DescriptionError(
            f"{source}: data has changed since the run began: {index.url}: {what}; restore it, or resume with --force"
        )
