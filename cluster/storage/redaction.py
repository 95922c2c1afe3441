"""Texts without credentials: vendors' errors may quote a signed URL, a header or an option."""

import os
import re
import traceback
from collections.abc import Mapping

_HIDDEN = "***"
_SHORTEST = 6  # of a value that is looked for: a shorter one would hide half of every text

_SECRET_NAME = re.compile(
    r"secret|token(?!iz)|passw|passphrase|(access|account|api)_?key(?!_?id)|connection_string", re.I
)
# Where a secret lies, and no secret.
_PLACE_NAME = re.compile(r"(file|filename|path|dir|url|uri)$", re.I)

_PATTERNS = [
    # In a query, a connection string or a header: the name stays.
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
    """The text without what is secret in the environment or these options, or looks like a credential."""
    for value in sorted(_secrets(options), key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def harmless(error: BaseException, options: Mapping[str, object]) -> BaseException | None:
    """The exception, to be another's cause, unless its traceback would tell a secret."""
    told = "".join(traceback.format_exception(error))
    return error if redacted(told, options) == told else None


def _secrets(options: Mapping[str, object]) -> set[str]:
    """The values of environment variables and options with a telling name."""
    return {
        value
        for name, value in [*os.environ.items(), *options.items()]
        if isinstance(value, str) and len(value) >= _SHORTEST
        if _SECRET_NAME.search(name) and not _PLACE_NAME.search(name)
    }
