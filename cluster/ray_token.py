"""Where the token of a Ray cluster comes from: the places that Ray's own tools look at, and no description."""

import os
from pathlib import Path

from cluster.errors import ClusterError

TOKEN_ADVICE = "give the cluster's token in RAY_AUTH_TOKEN, or in the file that RAY_AUTH_TOKEN_PATH names"


def find_token() -> str | None:
    """The token of RAY_AUTH_TOKEN, of the file RAY_AUTH_TOKEN_PATH, or of ~/.ray/auth_token; none: there is none here.

    Raises:
        ClusterError: The file that is named cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray/auth_token"
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        if named is None:
            return None
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH={named}: is not there; {TOKEN_ADVICE}") from None
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}; {TOKEN_ADVICE}") from error
