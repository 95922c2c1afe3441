"""Classification of file system exceptions: whether a retry can help, what to report, what to advise.

fsspec passes on whatever a vendor's library raises, so exceptions are classified by type, by ``errno``, by class name
and by HTTP status. No text made here holds a credential.
"""

import errno

from fsspec.config import conf

from cluster.errors import StorageError
from cluster.storage.redaction import harmless, redacted

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What a file system raises if there is no object at a path."""

_PERMANENT = (
    StorageError,
    # Absent, not allowed, or in the way.
    *(FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError),
    # Wrong arguments or a wrong installation.
    *(TypeError, ValueError, NotImplementedError, ImportError),
)
_PERMANENT_NUMBERS = frozenset(
    getattr(errno, name)
    for name in ("EINVAL", "ENAMETOOLONG", "EMSGSIZE", "ENOTEMPTY", "ELOOP", "EROFS", "ENOSYS", "ENOTSUP", "EREMCHG")
    if hasattr(errno, name)
)
# By name, because their packages need not be installed.
_PERMANENT_NAMES = frozenset(
    {
        *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"),  # botocore
        *("NoRegionError", "InvalidConfigError", "UnknownEndpointError"),
        *("DefaultCredentialsError", "ClientAuthenticationError"),  # Google, Azure
    }
)
_TRANSIENT_STATUSES = frozenset({408, 425, 429})  # HTTP 4xx: time-out, too early, too many requests


def is_permanent(error: Exception) -> bool:
    """Returns whether a retry is useless because the caller or the configuration is at fault.

    An unknown exception counts as transient.
    """
    if isinstance(error, _PERMANENT) or getattr(error, "errno", None) in _PERMANENT_NUMBERS:
        return True
    if any(kind.__name__ in _PERMANENT_NAMES for kind in type(error).__mro__):
        return True
    status = getattr(error, "status", getattr(error, "code", None))
    return isinstance(status, int) and 400 <= status < 500 and status not in _TRANSIENT_STATUSES


def reason(error: Exception) -> str:
    """Returns the exception's own text, in one line of at most 200 characters, without secrets."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(redacted(str(text), _options()).split())[:200].rstrip(".")


def advice(error: Exception) -> str:
    """Returns what the user can do about an error, as an imperative."""
    if isinstance(error, FileNotFoundError):
        return "create the folder or the bucket, or correct the URL"
    if isinstance(error, PermissionError):
        return "check the credentials in the environment, and what they may do"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "make room, or use another store"
    return "check the URL, the network and the credentials in the environment"


def cause(error: Exception) -> BaseException | None:
    """Returns the exception for ``raise ... from``, or None if its traceback holds a secret."""
    return harmless(error, _options())


def _options() -> dict[str, object]:
    """Returns the options of all protocols that fsspec has read from its files and from the environment."""
    return {f"{protocol}.{name}": value for protocol, own in conf.items() for name, value in own.items()}
