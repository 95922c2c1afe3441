"""A server that lists the keys of a bucket as S3 does, for more keys than a test could write; it holds no content."""

import contextlib
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, urlsplit

BUCKET = "listed"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
_LAST = "\U0010ffff"
_MOST = 1000


class ListedBucket(ThreadingHTTPServer):
    """Answers ``ListObjectsV2`` for one bucket, and says that its keys hold 3 bytes each.

    Args:
        keys: Sorted.
        latency_s: How long an answer takes.
        port: Where it listens; 0: anywhere.

    Attributes:
        url: What a client needs as its endpoint.
        asked: The queries of listings, in the order of their arrival.
        busy: How many of the next queries are turned away, as by a busy server.
    """

    daemon_threads = True

    def __init__(self, keys: Sequence[str], latency_s: float = 0.0, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.keys, self.latency_s = keys, latency_s
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[dict[str, str]] = []
        self.busy = 0

    @contextlib.contextmanager
    def serving(self) -> Iterator["ListedBucket"]:
        """Serves for the duration, in a thread."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()

    def page(self, query: dict[str, str]) -> str:
        """Returns the answer to a listing, without its XML declaration."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        position = bisect_left(self.keys, prefix)
        if token := bytes.fromhex(query.get("continuation-token", "")).decode():
            position = bisect_right(self.keys, token + _LAST if delimiter and token.endswith(delimiter) else token)
        parts, count, last = list[str](), 0, ""
        while position < len(self.keys) and self.keys[position].startswith(prefix):
            if count == min(_MOST, int(query.get("max-keys", _MOST))):
                parts.append(f"<NextContinuationToken>{last.encode().hex()}</NextContinuationToken>")
                break
            last = key = self.keys[position]
            end = key.find(delimiter, len(prefix)) if delimiter else -1
            if end >= 0:
                last = key[: end + 1]
                parts.append(f"<CommonPrefixes><Prefix>{quote(last)}</Prefix></CommonPrefixes>")
                position = bisect_right(self.keys, last + _LAST)
            else:
                parts.append(
                    f"<Contents><Key>{quote(key)}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
                    f"<ETag>&quot;{position:032x}&quot;</ETag><Size>3</Size><StorageClass>STANDARD</StorageClass>"
                    "</Contents>"
                )
                position += 1
            count += 1
        is_truncated = str("<NextContinuationToken>" in parts[-1] if parts else False).lower()
        return (
            f"<ListBucketResult><Name>{BUCKET}</Name><Prefix>{quote(prefix)}</Prefix><KeyCount>{count}</KeyCount>"
            f"<EncodingType>url</EncodingType><IsTruncated>{is_truncated}</IsTruncated>{''.join(parts)}"
            "</ListBucketResult>"
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ListedBucket

    def do_GET(self) -> None:
        query = dict(parse_qsl(urlsplit(self.path).query))
        self.server.asked.append(query)
        time.sleep(self.server.latency_s)
        if self.server.busy:
            self.server.busy -= 1
            self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
            return
        self._answer(200, f'<?xml version="1.0" encoding="UTF-8"?>\n{self.server.page(query)}'.encode())

    def do_HEAD(self) -> None:
        """Answers that the bucket exists, and no object."""
        self._answer(200 if "/" not in urlsplit(self.path).path.strip("/") else 404, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Writes nothing."""
