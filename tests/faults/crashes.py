"""What stores make of crashes: ``python -m tests.faults.crashes``.

Every storage call of a first save, of a resume with all its saves and retention, and of a going back is disturbed, one
at a time, on four kinds of store: a memory, a folder, a real S3 server and a real SFTP server; beside it, the same for
stock Ray Train. ``tests.faults.enumeration`` tells what a point is. The last line is JSON; the exit status is 1 if one
of ours came to a bad end.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from tests.faults.enumeration import BAD, GOOD, Place, Runs, Tally, enumerate_act
from tests.faults.lives import OurRuns
from tests.faults.stock_lives import StockRuns
from tests.stores import S3Server, SSHServer, s3_server, ssh_server

STORES = ("memory", "folder", "s3", "sftp")
_TOLD = 3


@contextmanager
def place_at(store: str, folder: Path) -> Iterator[Place]:
    """Where runs are made on a kind of store; a server that it needs runs as long as the context lasts."""
    if store == "memory":
        yield Place(store, "memory://crashes")
    elif store == "folder":
        yield Place(store, str(folder / "runs"))
    elif store == "s3":
        with s3_server(folder / "s3") as s3, place_on_s3(s3) as place:
            yield place
    else:
        with ssh_server(folder / "sftp") as ssh, place_on_sftp(ssh) as place:
            yield place


@contextmanager
def place_on_s3(s3: S3Server) -> Iterator[Place]:
    with mock.patch.dict(os.environ, s3.environment):
        yield Place("s3", f"s3://{s3.bucket}/crashes", can_tear=False, counts_looks=False)


@contextmanager
def place_on_sftp(ssh: SSHServer) -> Iterator[Place]:
    with mock.patch.dict(os.environ, ssh.environment):
        os.environ.pop("SSH_AUTH_SOCK", None)  # else the agent's keys would be tried first
        yield Place("sftp", f"sftp://127.0.0.1:{ssh.port}{ssh.folder}/crashes", counts_looks=False)


def enumerate_runs(runs: Runs, place: Place, most: int | None = None) -> Tally:
    """All points of runs of a kind at a place, or of their first few acts."""
    tally = Tally()
    for act in runs.acts()[:most]:
        tally += enumerate_act(runs, act, place)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stores", nargs="+", choices=STORES, default=STORES)
    arguments = parser.parse_args()
    print(" ".join(f"{word:>12}" for word in ("store", "runs", "points", *GOOD, *BAD, "seconds")))
    totals: dict[str, Tally] = {}
    for store in arguments.stores:
        with tempfile.TemporaryDirectory(prefix="launcher-crashes-") as folder, place_at(store, Path(folder)) as place:
            for runs in (OurRuns(), StockRuns()):
                began = time.monotonic()
                tally = enumerate_runs(runs, place)
                totals[runs.name] = totals.get(runs.name, Tally()) + tally
                counts = [tally.count(outcome) for outcome in (*GOOD, *BAD)]
                columns = (store, runs.name, tally.num_points, *counts, f"{time.monotonic() - began:.0f}")
                print(" ".join(f"{column!s:>12}" for column in columns), flush=True)
                for told in tally.told[:_TOLD]:
                    print(f"{'':13}such as: {told}")
    print(json.dumps({name: tally.as_dict() for name, tally in totals.items()}))
    sys.exit(bool(totals[OurRuns.name].told))


if __name__ == "__main__":
    main()
