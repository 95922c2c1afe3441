"""The user's code as a run takes it along: which files of a folder belong to it, and their reading.

Taken are the regular files of the folder of a job file, or of the package that it lies in, and the user's modules that
were imported from elsewhere, except for what git ignores and what no job needs: caches, environments, runs. What looks
like a secret is refused by its name and never opened, and what holds a token for a cluster is refused too. The format
of the bundle is the business of ``cluster.run.bundle``, which also unpacks it.
"""

import errno
import math
import os
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from cluster.errors import DescriptionError, listed
from cluster.ray.token import known_tokens, token_files
from cluster.run.bundle import MAX_BYTES, MAX_FILES, Bundle, CodeFile, make_bundle
from cluster.run.run_directory import is_run
from launcher.code.gitignore import GitIgnore
from launcher.code.user_code import code_folder, import_root, make_import_paths
from launcher.config.job_files import is_shipped

_NAMED = 10
"""How many files an error names."""
_READINGS = 4
"""Two that agree are enough; a folder that is being written to may need more."""

_LEFT_OUT = frozenset({".git", ".DS_Store"})
_LEFT_OUT_SUFFIXES = (".pyc", ".pyo")
_LEFT_OUT_FOLDERS = frozenset(
    {
        ".cache", ".eggs", ".hg", ".hypothesis", ".ipynb_checkpoints", ".mypy_cache", ".nox", ".pixi", ".pytest_cache",
        ".ruff_cache", ".svn", ".tox", "__pycache__", "node_modules", "wandb",
    }
)  # fmt: skip
"""A symbolic link of such a name is left out too, wherever it leads."""
_ENVIRONMENT_MARKERS = frozenset({"pyvenv.cfg", "conda-meta"})
_CACHE_MARKER = ("CACHEDIR.TAG", b"Signature: 8a477f597d28d172789f06886806bc55")
"""Source: https://bford.info/cachedir/"""

_SECRETS = (
    ".env", ".env.*", ".envrc", "secrets.ini", "secrets.json", "secrets.toml", "secrets.yaml", "secrets.yml",
    "credentials", ".credentials", "credentials.csv", "credentials.db", "credentials.ini", "credentials.json",
    "credentials.toml", "credentials.xml", "credentials.y*ml", "credentials.tfrc.json", "access_tokens.db",
    "application_default_credentials.json", "adc.json", "client_secret*.json", "*service-account*.json",
    "*service_account*.json", "accesskeys.csv", "rootkey.csv", "kaggle.json", "heroku.json",
    "auth_token", "*.token", "hf_token", ".hf_token", ".vault-token", "secret_token.rb",
    "*.pem", "*.key", "*.keypair", "*.p8", "*.p12", "*.pfx", "*.pkcs12", "*.ppk", "*.jks", "*.keystore", "*.keyring",
    "*.keychain", "*.keychain-db", "*.agilekeychain", "*.kwallet", "*.kdb", "*.kdbx", "*.psafe3", "*.ovpn",
    "*_rsa", "*_dsa", "*_ecdsa", "*_ed25519", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "otr.private_key",
    "*.tfstate", "*.tfstate.*", "*.tfvars", "*.tfvars.json", ".terraformrc", "terraform.rc", "*.cscfg",
    "*.publishsettings", "kubeconfig", "*.kubeconfig", "rclone.conf", ".modal.toml", ".tugboat",
    ".netrc", "_netrc", ".pypirc", ".npmrc", ".git-credentials", ".htpasswd", "htpasswd", ".pgpass", ".my.cnf",
    ".mylogin.cnf", ".dockercfg", ".dockerconfigjson", ".boto", ".s3cfg", ".databrickscfg", ".smbcredentials",
    "proftpdpasswd", ".*_history", ".ftpconfig", ".remote-sync.json", "sftp-config.json", "filezilla.xml",
    "recentservers.xml", "robomongo.json",
)  # fmt: skip
"""Names of files. Source: the files that gitrob and gitleaks look for, as far as their names leave no doubt."""
_NO_SECRETS = (".env*.example", ".env*.template", ".env*.sample", "id_*.pub", "*example.tfvars")
_SECRET_FOLDERS = frozenset(
    {
        ".aliyun", ".aws", ".azure", ".databricks", ".gcloud", ".gnupg", ".huggingface", ".kaggle", ".kube", ".oci",
        ".password-store", ".ray", ".ssh",
    }
)  # fmt: skip
_SECRETS_IN_FOLDERS = (
    ".docker/config.json", ".config/doctl", ".config/gcloud", ".config/gh", ".config/glab-cli", ".config/hub",
    ".config/op", ".config/rclone", ".config/sops", ".cargo/credentials*", ".gem/credentials", ".m2/settings*.xml",
    ".vscode/sftp.json", ".purple/accounts.xml", "etc/shadow",
)  # fmt: skip
"""Files and folders that are known by the folder that they lie in."""
_SHORTEST_TOKEN = 8
"""Characters of a token that is looked for in files: a shorter one may be a word of any text."""


def pack(folder: Path) -> Bundle:
    """Packs the code in a folder; the bundle may be empty, if git ignores everything there.

    Raises:
        DescriptionError: Something there looks like a secret, is too large, is a symbolic link that leads out of the
            folder or nowhere, cannot be read, or does not stop changing.
    """
    folder = Path(os.path.realpath(folder))
    if not folder.is_dir():
        raise DescriptionError(f"{folder}: is not a folder; give the folder of the job file")
    return _pack(folder, {"": folder})


def pack_job(folder: Path, modules: Collection[str]) -> Bundle:
    """Packs the code of a job.

    Args:
        folder: Of the job file. If it is a package, it is packed with the packages that it lies in. That of a
            description that is shipped is not packed: only modules of the working directory are.
        modules: The user's own that the job has imported, by name. What is imported later from beside them, and from
            nowhere in ``folder``, is not known yet.

    Raises:
        DescriptionError: As ``pack``, or a module that was imported would not be packed.
    """
    folder = Path(os.path.realpath(folder))
    named = code_folder(folder)
    bundle = _pack(named, _sources(folder, modules))
    left_out = [module for module in sorted(modules) if _is_left_behind(module, bundle.names, folder)]
    if left_out:
        raise DescriptionError(
            f"{named}: {_listed(left_out)} would be missing on the cluster: the job imports what git ignores, or what "
            "is never packed; take it out of .gitignore, or move it"
        )
    return bundle


def directory_in_code(folder: Path) -> str | None:
    """The folder in the bundle of a job's code that is the working directory; none: that is not packed."""
    if is_shipped(folder):
        return None
    root, here = import_root(folder), Path.cwd().resolve()
    top = folder.resolve() if root == folder.resolve() else root / folder.resolve().relative_to(root).parts[0]
    return here.relative_to(root).as_posix() if here.is_relative_to(top) else None


def _sources(folder: Path, modules: Collection[str]) -> dict[str, Path]:
    """Files and folders to be packed, by their names in the bundle, which is one import path; '' is all of it."""
    root, found = import_root(folder), dict[str, Path]()
    if root == folder:
        found[""] = folder
    elif not is_shipped(folder):  # else its code is on the cluster
        package = folder.relative_to(root).parts[0]
        found[package] = root / package
    for name in sorted({module.partition(".")[0] for module in modules}):
        place = _place_of(name, make_import_paths(folder))
        if place is not None and not (place.parent == folder and "" in found):
            found.setdefault(place.name, place)
    return found


def _place_of(name: str, import_paths: Sequence[str]) -> Path | None:
    """The file of a module or the folder of a package, as Python finds it."""
    for path in map(Path, import_paths):
        if (path / name / "__init__.py").exists():
            return path / name
        if (path / f"{name}.py").exists():
            return path / f"{name}.py"
    return next((Path(path) / name for path in import_paths if (Path(path) / name).is_dir()), None)


def _is_left_behind(module: str, packed: Collection[str], folder: Path) -> bool:
    """Whether the file of a module is where its name says, and not in the bundle."""
    stem = module.replace(".", "/")
    names = [f"{stem}/__init__.py", f"{stem}.py"]
    there = [name for name in names for path in make_import_paths(folder) if (Path(path) / name).exists()]
    return bool(there) and not set(names) & set(packed)


def _pack(folder: Path, sources: Mapping[str, Path]) -> Bundle:
    """``folder``: what to call it in errors."""
    before = _read_files(sources)
    for _ in range(_READINGS - 1):
        files = _read_files(sources)
        whole = {name: file for name, file in files.items() if file is not None}
        # Each file was read twice. If no two readings differ, the folder held exactly these files between them.
        changed = [name for name in sorted(before.keys() | files.keys()) if whole.get(name, ...) != before.get(name)]
        if not changed:
            _check_whole(folder, whole)
            return make_bundle(whole)
        before = files
    raise DescriptionError(
        f"{folder}: {_listed(changed)} changed while the code was read; "
        "wait until nothing writes there, or add what is not code to .gitignore"
    )


def _check_whole(folder: Path, files: Mapping[str, CodeFile]) -> None:
    """What holds for each source holds for all of them together."""
    tokens = [token.encode() for token in known_tokens() if len(token) >= _SHORTEST_TOKEN]
    leaks = [name for name, file in files.items() if any(token in file.data for token in tokens)]
    if leaks:
        raise DescriptionError(
            f"{folder}: files that hold a token of yours for a cluster would be uploaded: {_listed(sorted(leaks))}; "
            "take it out of them, or add them to .gitignore"
        )
    size = sum(len(file.data) for file in files.values())
    if size > MAX_BYTES or len(files) > MAX_FILES:
        raise DescriptionError(
            f"{folder}: with the modules that it uses, the code has {_mebibytes(size)} in {len(files):,} files, the "
            f"limits are {MAX_BYTES >> 20} MiB and {MAX_FILES:,}; add what is not code to .gitignore"
        )


# --- Reading ---


def _read_files(sources: Mapping[str, Path]) -> dict[str, CodeFile | None]:
    """The files of the code by name; None for one that changed or vanished meanwhile."""
    files: dict[str, CodeFile | None] = {}
    for place, source in sources.items():
        is_folder = source.is_dir()
        top = source if is_folder else source.parent
        listing = _Listing(top)
        if is_folder:
            listing.visit(top, GitIgnore.above(top), (os.path.realpath(top),))
        else:
            listing.add(source, source.name)
        listing.check()
        prefix = f"{place}/" if place and is_folder else ""
        files |= {prefix + name: _read(top / name, size) for name, size in listing.sizes.items()}
    return files


def _read(path: Path, size: int) -> CodeFile | None:
    try:
        # Without O_NONBLOCK, opening a named pipe that has just taken the place of a file would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(size + 1) if stat.S_ISREG(status.st_mode) else b""
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    is_whole = stat.S_ISREG(status.st_mode) and len(data) == size
    return CodeFile(data, bool(status.st_mode & stat.S_IXUSR)) if is_whole else None


def _unreadable(path: Path, error: OSError) -> DescriptionError:
    return DescriptionError(
        f"{_shown(str(path))}: cannot be read, {error.strerror}; make it readable, or add it to .gitignore"
    )


# --- Which files there are ---


@dataclass(slots=True)
class _Listing:
    """The code in a folder, by name and size; no file of it is opened."""

    top: Path
    """Without symbolic links."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes, by name: a relative path with forward slashes."""
    secrets: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    """Symbolic links that are refused, and why."""
    _token_files: list[os.stat_result] = field(default_factory=lambda: _existing(token_files()))
    """Of this person's tokens for clusters, by whatever name, link or hard link they are found."""

    def visit(self, folder: Path, ignore: GitIgnore, around: tuple[str, ...]) -> None:
        """Lists a folder.

        Args:
            folder: Below ``top``; there may be symbolic links on the way.
            ignore: What applies in the folder that it lies in.
            around: It and the folders on the way to it, without symbolic links.
        """
        ignore = ignore.inside(folder)
        for entry in _entries(folder):
            path, name = folder / entry.name, (folder / entry.name).relative_to(self.top).as_posix()
            is_link = entry.is_symlink()
            is_folder = entry.is_dir(follow_symlinks=False)
            if _is_left_out(entry.name, is_folder or is_link) or ignore.ignores(path, is_folder=is_folder):
                continue
            if _is_secret(path, is_folder):
                self.secrets.append(name)
                continue
            real = os.path.join(around[-1], entry.name)
            if is_link:
                real, problem = self._follow(path, around)
                if problem:
                    self.links.append(f"{_shown(name)} {problem}")
                    continue
                if self._is_link_left_out(name, Path(real)):
                    continue
            if is_folder or os.path.isdir(real):
                if not _is_marked(Path(real)):
                    self.visit(path, ignore, (*around, real))
            else:
                self.add(path, name)

    def check(self) -> None:
        """Makes sure that what was found may be packed."""
        if self.links:
            raise DescriptionError(
                f"{self.top}: symbolic links that cannot be packed: {listed(self.links, _NAMED)}; "
                "replace them by files, or add them to .gitignore without a slash at the end"
            )
        if self.secrets:
            raise DescriptionError(
                f"{self.top}: files that look like secrets would be uploaded: {_listed(self.secrets)}; "
                "add them to .gitignore"
            )
        size = sum(self.sizes.values())
        if size > MAX_BYTES:
            largest = sorted(self.sizes, key=lambda name: (-self.sizes[name], name))
            told = ", ".join(f"{_shown(name)} {_mebibytes(self.sizes[name])}" for name in largest[:_NAMED])
            raise DescriptionError(
                f"{self.top}: the code has {_mebibytes(size)}, the limit is {MAX_BYTES >> 20} MiB; the largest files: "
                f"{told}; add what is not code to .gitignore, data belongs in the store"
            )

    def add(self, path: Path, name: str) -> None:
        """Lists a file."""
        try:
            status = path.stat()
        except FileNotFoundError:  # vanished since
            return
        except OSError as error:
            raise _unreadable(path, error) from error
        if not stat.S_ISREG(status.st_mode):  # a socket, a pipe, a device
            return
        if any(os.path.samestat(status, token) for token in self._token_files):
            self.secrets.append(name)
            return
        if not _is_utf8(name):
            raise DescriptionError(
                f"{self.top}: the name {_shown(name)} is not UTF-8; rename the file, or add it to .gitignore"
            )
        self.sizes[name] = status.st_size
        if len(self.sizes) > MAX_FILES:
            fullest = Counter(os.path.dirname(name) or "." for name in self.sizes).most_common(3)
            raise DescriptionError(
                f"{self.top}: the code has more than {MAX_FILES:,} files, most of them in "
                f"{_listed([folder for folder, _ in fullest])}; "
                "add what is not code to .gitignore, data belongs in the store"
            )

    def _follow(self, path: Path, around: tuple[str, ...]) -> tuple[str, str]:
        """Where a symbolic link leads, and why it is refused if it is."""
        try:
            real = os.path.realpath(path, strict=True)
        except FileNotFoundError:
            return "", "leads nowhere"
        except OSError as error:
            return "", "leads to itself" if error.errno == errno.ELOOP else f"cannot be followed ({error.strerror})"
        if real in around:
            return real, "leads to a folder that it lies in"
        return real, "" if Path(real).is_relative_to(self.top) else "leads out of the folder"

    def _is_link_left_out(self, name: str, real: Path) -> bool:
        """Whether a symbolic link is left out, or recorded as a secret, for where it leads within the folder."""
        inside = real.relative_to(self.top)
        folders = [self.top / parent for parent in inside.parents if parent.name]
        if any(_is_left_out(parent.name, True) or _is_marked(parent) for parent in folders):
            return True
        if _is_left_out(inside.name, real.is_dir()):
            return True
        if _is_secret(real, real.is_dir()) or any(_is_secret(parent, True) for parent in folders):
            self.secrets.append(name)
            return True
        return False


def _existing(paths: Sequence[Path]) -> list[os.stat_result]:
    found = []
    for path in paths:
        with suppress(OSError):
            found.append(path.stat())
    return found


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):  # vanished since
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error


def _is_left_out(name: str, may_be_folder: bool) -> bool:
    return name in _LEFT_OUT or name.endswith(_LEFT_OUT_SUFFIXES) or (may_be_folder and name in _LEFT_OUT_FOLDERS)


def _is_marked(folder: Path) -> bool:
    """Whether something in a folder tells that it is an environment, a cache or a run."""
    names = {entry.name for entry in _entries(folder)}
    return not _ENVIRONMENT_MARKERS.isdisjoint(names) or is_run(names) or _is_cache(folder, names)


def _is_cache(folder: Path, names: set[str]) -> bool:
    name, signature = _CACHE_MARKER
    if name not in names:
        return False
    try:
        with open(folder / name, "rb") as file:
            return file.read(len(signature)) == signature
    except OSError:
        return False


def _is_secret(path: Path, is_folder: bool) -> bool:
    name = path.name.lower()
    if _matches(f"{path.parent.name.lower()}/{name}", _SECRETS_IN_FOLDERS):
        return True
    if is_folder:
        return name in _SECRET_FOLDERS
    return _matches(name, _SECRETS) and not _matches(name, _NO_SECRETS)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# --- What is said ---


def _listed(names: list[str]) -> str:
    return listed([_shown(name) for name in names], _NAMED)


def _shown(name: str) -> str:
    """A name that fits in a line."""
    return name if name.isprintable() else ascii(name)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mebibytes(size: int) -> str:
    """Rounded up, so that what is above a limit looks so."""
    return f"{math.ceil(size / 2**20 * 100) / 100:,.2f} MiB"
