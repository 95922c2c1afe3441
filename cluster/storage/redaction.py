"""Removal of credentials from texts: errors of vendors' libraries may quote a signed URL, a header or an option."""

import os
import re
import traceback
from collections.abc import Mapping

_HIDDEN = "***"
_SHORTEST = 6  # characters of a secret value; replacing shorter ones would hide half of every text

_SECRET_NAME = re.compile(
    r"secret|token(?!iz)|passw|passphrase|(access|account|api)_?key(?!_?id)|connection_string", re.I
)
# The name of a place that holds a secret, not of a secret.
_PLACE_NAME = re.compile(r"(file|filename|path|dir|url|uri)$", re.I)

_PATTERNS = [
    # In a query, a connection string or a header: hide the value, keep the name.
    (
        re.compile(
            r"\b(X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature|sig|AccountKey"
            r"|SharedAccessSignature|(?:access_|id_|refresh_)?token|secret|password|api_?key)(\s*[=:]\s*)[^\s&;,'\"<>]+",
            re.I,
        ),
        rf"\1\2{_HIDDEN}",
    ),
    (re.compile(r"(\bAuthorization\b['\"]?\s*[=:]\s*['\"]?)[^'\"\n]+", re.I), rf"\1{_HIDDEN}"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.I), rf"\1 {_HIDDEN}"),
    (re.compile(r"(://[^/@\s:]*:)[^/@\s]+@"), rf"\1{_HIDDEN}@"),
]


def redacted(text: str, options: Mapping[str, object]) -> str:
    """Returns the text without secrets of the environment or ``options``, and without apparent credentials."""
    for value in sorted(_secrets(options), key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def harmless(error: BaseException, options: Mapping[str, object]) -> BaseException | None:
    """Returns the exception for use as a cause, or None if its traceback would show a secret."""
    told = "".join(traceback.format_exception(error))
    return error if redacted(told, options) == told else None


def _secrets(options: Mapping[str, object]) -> set[str]:
    """Returns the values of environment variables and options whose names suggest a secret."""
    return {
        value
        for name, value in [*os.environ.items(), *options.items()]
        if isinstance(value, str) and len(value) >= _SHORTEST
        if _SECRET_NAME.search(name) and not _PLACE_NAME.search(name)
    }
