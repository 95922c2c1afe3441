"""fsspec's SFTP file system with verified hosts and pipelined writes.

By default fsspec accepts any host key, and a write waits for an answer after each 32 KiB. Here hosts, users, keys and
known hosts come from OpenSSH's own files, and an unknown host is refused. The only module that knows paramiko.
"""

import errno
import os
import stat
import weakref
from typing import Any

import paramiko
from fsspec.implementations.sftp import SFTPFileSystem

from cluster.errors import StorageError

_CONFIG = "~/.ssh/config"
_KNOWN_HOSTS = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")

_CONNECT_S = 10.0
"""Time limit of each step of opening a session."""
_SILENCE_S = 30.0
"""How long the server may keep a session waiting for data."""
_KEEPALIVE_S = 15
"""Interval of the keepalives that keep routers and firewalls from dropping an idle session."""


class PinnedSFTPFileSystem(SFTPFileSystem):
    """Files on a host whose key is in a ``known_hosts`` file.

    ``Host`` entries of ``~/.ssh/config`` apply (HostName, Port, User, IdentityFile, UserKnownHostsFile); then the URL,
    the user's agent and keys, and options that fsspec reads from the environment, such as ``FSSPEC_SFTP_KEY_FILENAME``.

    Raises:
        StorageError: The host is unknown, its key has changed, or it accepts none of the keys.
    """

    def _connect(self) -> None:
        options, known_hosts = _read_ssh_config(self.host)
        options |= self.ssh_kwargs
        where = f"sftp://{options['hostname']}:{options.get('port', 22)}"
        self.client = paramiko.SSHClient()
        # Paramiko does not close a session that is garbage-collected.
        weakref.finalize(self, self.client.close)
        for path in map(os.path.expanduser, known_hosts):
            if os.path.exists(path):
                self.client.load_system_host_keys(path)
        self.client.set_missing_host_key_policy(_RefuseUnknownHosts(where, known_hosts[0]))
        try:
            self.client.connect(**options)
        except paramiko.BadHostKeyException as error:
            raise StorageError(
                f"{where}: has another host key than {known_hosts[0]} says, {error.key.get_name()} "
                f"{error.key.fingerprint}; if the server was set up anew, take the old key out: ssh-keygen -R, "
                "else somebody is in between"
            ) from error
        except paramiko.SSHException as error:
            # If there is no key to try, paramiko raises no special type.
            if isinstance(error, paramiko.AuthenticationException) or "No authentication methods" in str(error):
                raise StorageError(
                    f"{where}: takes none of the keys of {options.get('username') or 'this user'}; load the right one "
                    f"(ssh-add), name it as IdentityFile in {_CONFIG} or in FSSPEC_SFTP_KEY_FILENAME"
                ) from error
            raise
        self.client.get_transport().set_keepalive(_KEEPALIVE_S)
        self.ftp = self.client.open_sftp()
        self.ftp.get_channel().settimeout(_SILENCE_S)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        assert mode == "overwrite"
        data = memoryview(value)
        with self.ftp.open(path, "wb") as file:
            try:
                # Many packets are in flight at a time. The last byte is sent unpipelined, which waits for the answers
                # to all packets: paramiko drops answers that nobody waits for, even "disk full".
                file.set_pipelined(True)
                file.write(data[:-1])
                file.set_pipelined(False)
                file.write(data[-1:])
            except OSError as error:
                if error.errno is None:  # SFTP has no code for a full disk
                    raise OSError(errno.EIO, f"the server only says {str(error)!r}, its disk may be full") from error
                raise
        # Closing reports no error, and some file systems find it only then.
        size = self.ftp.stat(path).st_size
        if size != len(data):
            raise OSError(errno.EIO, f"{size} of {len(data)} bytes arrived")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        with self.ftp.open(path, "rb") as file:
            found = file.stat()
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            begin, end = start or 0, found.st_size if end is None else min(end, found.st_size)
            if begin >= end:
                return b""
            file.seek(begin)
            file.prefetch(end)  # from there to here, in packets that are in flight together
            data: bytes = file.read(end - begin)
        return data

    def ls(self, path: str, detail: bool = False) -> list[Any]:
        found: list[Any] = super().ls(path, detail)
        for entry in found if detail else []:
            if entry["type"] == "link":
                entry["size"] = self._size_behind(entry["name"])
        return found

    def _size_behind(self, link: str) -> int | None:
        """Returns the size of the file that a link leads to; None: it leads to none."""
        try:
            found = self.ftp.stat(link)
        except TimeoutError:
            raise
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def makedirs(self, path: str, exist_ok: bool = False, mode: int = 0o777) -> None:
        """Works like ``os.makedirs``; several processes may make the same folder at once."""
        try:
            found = self.ftp.stat(path)
        except FileNotFoundError:
            self.makedirs(os.path.dirname(path), exist_ok=True, mode=mode)
            try:
                self.ftp.mkdir(path, mode)
            except OSError:
                if not self.isdir(path):
                    raise
        else:
            if not stat.S_ISDIR(found.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            if not exist_ok:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    def rm_file(self, path: str) -> None:
        self.ftp.remove(path)

    def replace(self, path: str, new_path: str) -> None:
        """Renames a file over whatever has the new name, by OpenSSH's extension ``posix-rename``, which other servers
        have too.

        A server without it renames only to a free name. There the old file is moved aside for a moment, under a hidden
        name, and is lost if this process is killed in that moment.
        """
        try:
            self.ftp.posix_rename(path, new_path)
        except (FileNotFoundError, TimeoutError):
            raise
        except OSError:
            if self._has_posix_rename(path):
                raise
            self._replace_without_posix_rename(path, new_path)

    def _replace_without_posix_rename(self, path: str, new_path: str) -> None:
        aside = f"{path}-aside"
        try:
            self.ftp.rename(new_path, aside)
        except FileNotFoundError:
            self.ftp.rename(path, new_path)
            return
        try:
            self.ftp.rename(path, new_path)
        except Exception:  # whatever it is, restore the old file
            self.ftp.rename(aside, new_path)
            raise
        self.ftp.remove(aside)

    def _has_posix_rename(self, path: str) -> bool:
        """Returns whether the server has the extension: it can then rename a file to itself, which changes nothing."""
        try:
            self.ftp.posix_rename(path, path)
        except (FileNotFoundError, TimeoutError):  # says nothing about the extension
            raise
        except OSError:
            return False
        return True


class _RefuseUnknownHosts(paramiko.MissingHostKeyPolicy):
    """Trusts no host at first sight."""

    def __init__(self, where: str, known_hosts: str) -> None:
        self._where = where
        self._known_hosts = known_hosts

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:  # noqa: ARG002
        port = self._where.rpartition(":")[2]
        host = hostname.partition("]")[0].removeprefix("[")
        raise StorageError(
            f"{self._where}: its host key is not in {self._known_hosts}, got {key.get_name()} {key.fingerprint}; "
            f"compare it with the server's own, then: ssh-keyscan -p {port} {host} >> {self._known_hosts}"
        )


def _read_ssh_config(host: str) -> tuple[dict[str, Any], list[str]]:
    """Returns the options to connect to a host, and its files of known hosts, the user's own first."""
    options: dict[str, Any] = {
        "hostname": host,
        "timeout": _CONNECT_S,
        "banner_timeout": _CONNECT_S,
        "auth_timeout": _CONNECT_S,
        "channel_timeout": _CONNECT_S,
    }
    known_hosts = list(_KNOWN_HOSTS)
    path = os.path.expanduser(_CONFIG)
    if os.path.exists(path):
        found = paramiko.SSHConfig.from_path(path).lookup(host)
        for way in ("proxyjump", "proxycommand"):
            if found.get(way, "none") != "none":
                raise StorageError(
                    f"sftp://{host}: {_CONFIG} has {way} {found[way]} for it, which is not supported; forward a port "
                    "(ssh -L) and use that"
                )
        options["hostname"] = found["hostname"]
        if "port" in found:
            options["port"] = int(found["port"])
        if "user" in found:
            options["username"] = found["user"]
        if "identityfile" in found:
            options["key_filename"] = [name for name in found["identityfile"] if os.path.exists(name)]
        known_hosts[:1] = found.get("userknownhostsfile", known_hosts[0]).split()
    return options, known_hosts
