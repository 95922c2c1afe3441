"""A W&B server for tests: it speaks enough of the protocol for the real client, and records what arrives.

It knows the client's HTTP requests and nothing of ours. Fetch it up with ``with WandbServer() as server``;
``server.runs[run_id]`` is what W&B would hold of a run; ``server.fault`` breaks it from the next request on.
"""

import json
import re
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self


@dataclass
class RecordedRun:
    """What the server was told of one run, by however many processes."""

    bucket: dict[str, Any] = field(default_factory=dict)
    """The variables of the UpsertBucket mutations, later ones on top: displayName, groupName, tags, ..."""
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    """History rows by their line number: a repeated upload overwrites, as W&B does."""
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    """One entry per process that finished the run."""

    @property
    def config(self) -> dict[str, Any]:
        """The user's part of the config."""
        config = json.loads(self.bucket.get("config", "{}"))
        return {key: item["value"] for key, item in config.items() if key != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        """History rows in the order of the file."""
        return [self.lines[number] for number in sorted(self.lines)]

    def resume_status(self, run_id: str) -> dict[str, Any]:
        """The ``bucket`` of the answer to RunResumeStatus."""
        return {
            "id": run_id,
            "name": run_id,
            "displayName": self.bucket.get("displayName"),
            "summaryMetrics": json.dumps(self.summary),
            "config": self.bucket.get("config", "{}"),
            "historyLineCount": len(self.lines),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": "[]",
            "tags": self.bucket.get("tags") or [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }


class WandbServer:
    """Listens on a free port of loopback while the ``with`` block lasts."""

    def __init__(self) -> None:
        self.runs: dict[str, RecordedRun] = defaultdict(RecordedRun)
        self.keys: set[str] = set()
        """The Authorization headers seen."""
        self.other_paths: set[str] = set()
        """What else was posted to, such as telemetry."""
        self.fault: Literal["hang", 500, 403] | None = None
        """Answer no more, or with this status only."""
        self.errors: list[BaseException | None] = []
        """What went wrong in the server itself; a test asserts that there is nothing."""
        self._closing = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: self._note_error()  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Refuse connections from now on, as a server that died."""
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def wait_for(self, run_id: str, num_rows: int, timeout_s: float = 20.0) -> None:
        """Wait until so many history rows of the run have arrived."""
        deadline = time.monotonic() + timeout_s
        while len(self.runs[run_id].lines) < num_rows:
            assert time.monotonic() < deadline, f"only {self.runs[run_id].history} arrived"
            time.sleep(0.02)

    def _handler(server) -> type[BaseHTTPRequestHandler]:  # noqa: N805  (the handler's own self is below)
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                """Tests print nothing."""

            def do_POST(self) -> None:
                body = self.body()
                if server._fails(self):
                    return
                server.keys.add(self.headers.get("Authorization", ""))
                if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                    self.answer(server._stream(stream[1], json.loads(body)))
                elif self.path == "/graphql":
                    self.answer({"data": server._graphql(json.loads(body))})
                else:
                    server.other_paths.add(self.path)
                    self.answer({})

            def do_PUT(self) -> None:
                body = self.body()
                if server._fails(self):
                    return
                run_id, _, name = self.path.removeprefix("/upload/").partition("/")
                server.runs[run_id].files[name] = body
                self.answer({})

            def body(self) -> bytes:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                if len(body) < length:
                    raise ConnectionError("the client hung up")
                return body

            def answer(self, document: Any, status: int = 200) -> None:
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        return Handler

    def _note_error(self) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # a client may hang up
            self.errors.append(error)

    def _fails(self, request: Any) -> bool:
        if self.fault == "hang":
            self._closing.wait()
            request.close_connection = True
        elif self.fault is not None:
            request.answer({"errors": [{"message": "the test broke the server"}]}, self.fault)
        return self.fault is not None

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        variables = request.get("variables") or {}
        operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        match operation and operation[1]:
            case "Viewer":
                viewer = {"id": "1", "entity": "tester", "username": "tester", "email": "", "flags": "{}"}
                return {"viewer": viewer | {"teams": {"edges": []}}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "RunResumeStatus":
                run_id = variables["name"]
                bucket = self.runs[run_id].resume_status(run_id) if run_id in self.runs else None
                return {"model": _project() | {"bucket": bucket}}
            case "UpsertBucket":
                run_id = variables["name"]
                inserted = run_id not in self.runs
                run = self.runs[run_id]
                run.bucket |= {key: value for key, value in variables.items() if value is not None}
                return {
                    "upsertBucket": {
                        "bucket": run.resume_status(run_id) | {"project": _project()},
                        "inserted": inserted,
                    }
                }
            case "CreateRunFiles":
                run_id = variables["run"]
                files = [
                    {"name": name, "uploadUrl": f"{self.url}/upload/{run_id}/{name}"} for name in variables["files"]
                ]
                return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}
            case _:
                return {}

    def _stream(self, run_id: str, body: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[run_id]
        files = body.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            for number, line in enumerate(history["content"], history["offset"]):
                run.lines[number] = json.loads(line)
        if summary := files.get("wandb-summary.json"):
            run.summary = json.loads(summary["content"][-1])
        if body.get("complete"):
            run.exit_codes.append(body.get("exitcode", 0))
        return {}


def _project() -> dict[str, Any]:
    return {"id": "p", "name": "digits", "entity": {"id": "e", "name": "tester"}}
