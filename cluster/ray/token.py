"""The authentication token of a Ray cluster, read from where Ray's own tools read it and never from a description.

No error of this module contains the token or a part of it.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from cluster.errors import ClusterError

TOKEN_ADVICE = "give the cluster's token in RAY_AUTH_TOKEN, or in the file that RAY_AUTH_TOKEN_PATH names"

_TOKEN = re.compile("[!-~]+")
"""What an HTTP header can hold after ``Bearer ``."""


def find_token() -> str | None:
    """Return the token from RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token; None: none has one.

    Whitespace around it is removed, because many tools end a file or a variable with a newline.

    Raises:
        ClusterError: The file cannot be read, or what the source holds cannot be a token.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return _checked(token, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = _token_path()
    try:
        return _checked(path.read_bytes().decode().strip(), str(path)) or None
    except FileNotFoundError:
        if not named:
            return None
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH={named}: is not there; {TOKEN_ADVICE}") from None
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}; {TOKEN_ADVICE}") from error
    except UnicodeDecodeError:  # its message would quote the file
        raise _no_token(str(path)) from None


def token_files() -> list[Path]:
    """Return the files that may hold a token of this user, even if RAY_AUTH_TOKEN is set; they need not exist."""
    return list(dict.fromkeys([_token_path(), _usual_path()]))


def known_tokens() -> list[str]:
    """Return this user's tokens from every source that can be read."""
    texts = [os.environ.get("RAY_AUTH_TOKEN", "")]
    for path in token_files():
        with suppress(OSError, UnicodeDecodeError):
            texts.append(path.read_bytes().decode())
    return list(dict.fromkeys(token for text in texts if (token := text.strip())))


def _token_path() -> Path:
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else _usual_path()


def _usual_path() -> Path:
    return Path(os.path.expanduser("~/.ray/auth_token"))


def _checked(token: str, source: str) -> str:
    """Return the token, which may be empty.

    Raises:
        ClusterError: It cannot be a token.
    """
    if token and not _TOKEN.fullmatch(token):
        raise _no_token(source)
    return token


def _no_token(source: str) -> ClusterError:
    return ClusterError(f"{source}: holds more than a token, or other characters than a token has; {TOKEN_ADVICE}")
