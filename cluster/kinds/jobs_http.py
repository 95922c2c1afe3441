"""HTTP requests to the Jobs API of a Ray cluster: the token, time limits, redirects and what errors say.

This module speaks the HTTP interface that Ray documents, and imports no Ray. Ray's own client has no time limits, takes
its address from RAY_ADDRESS if that is set, lets ~/.netrc replace the token, and needs ``ray[default]``, while a laptop
has ``ray[train]``.

Source: Ray Jobs REST API, docs.ray.io, as of Ray 2.60; the names are the same in 2.55.
"""

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import requests

from cluster.errors import ClusterError, one_line
from cluster.ray.token import TOKEN_ADVICE, find_token
from cluster.storage.redaction import redacted

_CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 30.0
"""Read timeout: at the first job of a session the head starts another process, which takes seconds."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_Decoded = TypeVar("_Decoded")


class Refused(Exception):  # noqa: N818  # callers decide whether it is an error
    """The cluster answered with an HTTP error status; the message is the body, without the token."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(body)
        self.status = status


class OtherShape(Exception):  # noqa: N818  # ``JobsHttp.decoded`` makes a ClusterError of it
    """A field is missing from an answer or has the wrong type; the message names the field."""


class _Bearer(requests.auth.AuthBase):
    """Send the token if there is one. Without an ``auth`` object, requests would send credentials from ~/.netrc."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class _Session(requests.Session):
    """A session that returns a redirect as the answer.

    To follow one would turn a POST into a GET, and send the request to an address that the user did not write. Even
    with ``allow_redirects=False``, requests parses the ``Location`` and raises if it is malformed.
    """

    def get_redirect_target(self, resp: requests.Response) -> None:  # noqa: ARG002  # the name that requests uses
        return None


class JobsHttp:
    """HTTP client of the Jobs API at one URL. It reads the token for each request and never stores it."""

    def __init__(self, url: str) -> None:
        """Only assigns.

        Args:
            url: Such as ``http://HEAD:8265``, without a slash at the end.
        """
        self._url = url

    def request(self, method: str, path: str, content: Any = None) -> Any:
        """Send one request and return the JSON of the answer. Redirects are errors.

        Raises:
            ClusterError: Nothing answers at the address, it is no Ray cluster, or it refuses access.
            Refused: The answer has another HTTP error status.
        """
        token = find_token()
        secrets = {"token": token or ""}
        try:
            with _Session() as session:
                answer = session.request(
                    method,
                    self._url + path,
                    json=content,
                    auth=_Bearer(token),
                    timeout=(_CONNECT_TIMEOUT_S, _ANSWER_TIMEOUT_S),
                )
        except requests.RequestException as error:
            raise ClusterError(
                f"{self._url}: nobody answers there: {redacted(_root_cause(error), secrets)}; is the cluster up, "
                "started with --dashboard-host, and the address that of its Jobs API?"
            ) from error
        if 300 <= answer.status_code < 400:
            raise self._redirected(path, answer.headers.get("Location", ""))
        if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
            what = "does not take this token" if token else "asks for a token"
            raise ClusterError(f"{self._url}: {what}; {TOKEN_ADVICE}")
        if answer.status_code != requests.codes.ok:
            raise Refused(answer.status_code, redacted(answer.text, secrets))
        try:
            return answer.json()
        except requests.JSONDecodeError as error:
            raise self.no_jobs_api("answers with something else") from error

    def decoded(self, decode: Callable[[Any], _Decoded], answer: Any) -> _Decoded:
        """Return ``decode(answer)``, where ``decode`` reads fields with ``field``.

        Raises:
            ClusterError: ``decode`` raised ``OtherShape``: the answer is not from the Jobs API.
        """
        try:
            return decode(answer)
        except OtherShape as error:
            raise self.no_jobs_api("answers with something else") from error

    def no_jobs_api(self, what: str) -> ClusterError:
        """Return the error for an answer that does not come from the Jobs API. ``what``: the predicate of the text."""
        return ClusterError(
            f"{self._url}: {what}, and not as the Jobs API does; give the address of Ray's dashboard, port 8265 unless "
            "told otherwise, on a head that has ray[default]"
        )

    def failed(self, what: str, refused: Refused) -> ClusterError:
        """Return the error for a refused request. ``what``: the predicate of the text."""
        lines = [line.strip() for line in str(refused).splitlines() if line.strip()]
        return ClusterError(f"{self._url}: {what}: {lines[-1][:300] if lines else refused.status}; see its dashboard")

    def _redirected(self, path: str, location: str) -> ClusterError:
        """Return the error for a redirect. It shows scheme, host, port and path alone: the rest may hold a secret."""
        try:
            to = urlsplit(urljoin(self._url + path, location))
            host, port = to.hostname or "", to.port or _DEFAULT_PORTS[to.scheme]
        except (ValueError, KeyError):  # not a URL, or neither HTTP nor HTTPS
            return self.no_jobs_api("redirects to another place")
        address = f"{to.scheme}://[{host}]:{port}" if ":" in host else f"{to.scheme}://{host}:{port}"
        if to.path != path or address == self._url:
            return self.no_jobs_api(f"redirects to {address}{to.path}")
        return ClusterError(
            f"{self._url}: redirects to {address}, which is not followed, for it would get the token; write {address} "
            "as the address if it is the cluster's own"
        )


def field(answer: Any, name: str, *kinds: type) -> Any:
    """Return a field of an answer; a missing field counts as None.

    Raises:
        OtherShape: The answer is no JSON object, or the value is of none of the ``kinds``. A bool is no int here.
    """
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(answer, dict) or not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise OtherShape(name)
    return value


def _root_cause(error: BaseException) -> str:
    """Return the message of the innermost exception, which requests and urllib3 wrap in others."""
    while True:
        inner = error.__cause__ or error.__context__
        if inner is None:
            return one_line(error)
        error = inner
