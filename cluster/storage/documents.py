"""Small JSON documents in a store: written whole, and readable while another process overwrites them."""

import json
import time
from collections.abc import Mapping
from typing import Any

from cluster.storage.store import MissingObject, Store

# On a store without renames, a document is torn while it is being overwritten.
_READS = 4
_SECONDS_BETWEEN_READS = 0.05


def write_document(store: Store, name: str, document: Mapping[str, Any], indent: int | None = 1) -> None:
    """Writes or overwrites a document."""
    store.write(name, (json.dumps(document, indent=indent) + "\n").encode())


def read_document(store: Store, name: str) -> dict[str, Any] | None:
    """Returns a document; None if it is missing or stays torn, as after a kill on a store without renames."""
    for attempt in range(_READS):
        if attempt:
            time.sleep(_SECONDS_BETWEEN_READS)
        try:
            document = json.loads(store.read(name))
        except MissingObject:
            return None
        except ValueError:
            continue
        return document if isinstance(document, dict) else None
    return None
