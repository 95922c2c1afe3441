"""Small JSON documents in a store: written whole, and read also while somebody overwrites them."""

import json
import time
from collections.abc import Mapping
from typing import Any

from cluster.storage.store import MissingObject, Store

# A document that is being overwritten is torn for a moment, on a store that cannot rename.
_READS = 4
_SECONDS_BETWEEN_READS = 0.05


def write_document(store: Store, name: str, document: Mapping[str, Any], indent: int | None = 1) -> None:
    """Overwrites a document."""
    store.write(name, (json.dumps(document, indent=indent) + "\n").encode())


def read_document(store: Store, name: str) -> dict[str, Any] | None:
    """A document; none if it is missing, or stays torn: its writer was killed, on a store that cannot rename."""
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
