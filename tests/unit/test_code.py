"""The user's code on its way: from the folder of a job file into a bundle, and out of it on a node."""

import fcntl
import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.errors import DescriptionError, StorageError
from cluster.host.scratch import is_own, make_own_folder, sweep_own_folders
from cluster.process import host_cache
from cluster.process.code_cache import copy_code, enter_copy, fetch_code
from cluster.run import bundle
from cluster.run.bundle import Bundle, CodeFile, is_intact, make_bundle, unpack
from cluster.run.run_directory import RunDirectory
from launcher.code import listing, packing
from launcher.code.packing import directory_in_code, pack, pack_job
from launcher.code.user_code import lasting_directory

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of a job file."""
    path = tmp_path / "job"
    path.mkdir()
    return path


@pytest.fixture
def nodes(tmp_path) -> Path:
    """Where bundles are unpacked."""
    return tmp_path / "node" / "code"


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def write(folder: Path, *names: str, **contents: str | bytes) -> None:
    """Writes files with their names for contents, or with the contents given."""
    for name, content in [*((name, name) for name in names), *contents.items()]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def link(folder: Path, name: str, to: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


def contents(packed: Bundle) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(packed.data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def refusal(folder: Path) -> str:
    with pytest.raises(DescriptionError) as caught:
        pack(folder)
    text = str(caught.value)
    assert text.splitlines() == [text]
    return text


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The files below a folder, with their modes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) for path in files}


# --- What is packed ---


def test_every_regular_file_is_packed(folder):
    write(folder, "job.yaml", "model.py", "parts/__init__.py", "parts/deep/er/data.json", ".hidden", "ünï code.txt")
    write(folder, **{"empty.py": b"", "binary": bytes(range(256))})
    (folder / "no_files").mkdir()
    os.mkfifo(folder / "pipe")
    packed = pack(folder)
    assert contents(packed) == {
        ".hidden": b".hidden", "binary": bytes(range(256)), "empty.py": b"", "job.yaml": b"job.yaml",
        "model.py": b"model.py", "parts/__init__.py": b"parts/__init__.py",
        "parts/deep/er/data.json": b"parts/deep/er/data.json", "ünï code.txt": "ünï code.txt".encode(),
    }  # fmt: skip
    assert packed.names == tuple(sorted(contents(packed)))
    assert packed.sha256 == hashlib.sha256(packed.data).hexdigest()


def test_a_folder_without_files_is_an_empty_bundle(folder, nodes):
    packed = pack(folder)
    assert packed.names == ()
    assert tree(unpack(packed.data, packed.sha256, nodes)) == {}


def test_what_is_no_folder_is_refused(folder):
    assert refusal(folder / "no") == f"{folder}/no: is not a folder; give the folder of the job file"


def test_caches_and_environments_are_left_out(folder):
    write(folder, "keep.py", "venv/keep.py", "wandb.py", "cache/keep.py", "a/wandb_keep/b.py")
    kept = pack(folder).names
    write(
        folder, ".git/config", "sub/.git", "__pycache__/a.cpython-311.pyc", "a.pyc", "sub/b.pyo", "node_modules/x/y.js",
        "wandb/run/file", ".mypy_cache/a", ".pytest_cache/a", ".ruff_cache/a", ".ipynb_checkpoints/a.ipynb", ".tox/a",
        ".cache/a", ".DS_Store", ".venv/pyvenv.cfg", ".venv/bin/python", "env/pyvenv.cfg", "env/lib/a.py",
        "conda/conda-meta/history", "conda/lib/a.py", "target/a.rlib",
    )  # fmt: skip
    write(folder, **{"target/CACHEDIR.TAG": "Signature: 8a477f597d28d172789f06886806bc55\n# of cargo\n"})
    assert pack(folder).names == kept
    write(folder, **{"target/CACHEDIR.TAG": "another"})
    assert set(pack(folder).names) - set(kept) == {"target/CACHEDIR.TAG", "target/a.rlib"}


def test_runs_are_left_out(folder):
    write(folder, "job.yaml", "experiments/a/job.yaml", "experiments/a/model.py", "submitted/code/ab.zip")
    run = RunDirectory(str(folder / "runs" / "digits"))
    run.take_lease()
    run.write_environment({})
    run.write_job("name: digits\n")
    write(folder, "submitted/submissions/0-ab.json", "submitted/job.yaml")
    assert pack(folder).names == ("experiments/a/job.yaml", "experiments/a/model.py", "job.yaml")


def test_the_folder_itself_may_be_anything(folder):
    write(folder, "job.yaml", "environment.json", "pyvenv.cfg")
    assert pack(folder).names == ("environment.json", "job.yaml", "pyvenv.cfg")


# --- .gitignore: in the table, and in the nested ones, git 2.39 keeps the same files ---


@pytest.mark.parametrize(
    ("lines", "ignored", "kept"),
    [
        ("*.log", ["a.log", "b/c.log"], ["a.txt"]),
        ("/a", ["a"], ["b/a"]),
        ("a/b", ["a/b"], ["c/a/b"]),
        ("data/", ["data/x", "b/data/y"], ["c/data"]),
        ("*\n!*.py\n!*/", ["a.txt", "b/c.txt", ".gitignore"], ["a.py", "b/c.py"]),
        ("logs\n!logs/keep.txt", ["logs/keep.txt"], ["a"]),
        ("logs/*\n!logs/keep.txt", ["logs/a", "logs/b/c"], ["logs/keep.txt"]),
        ("*.txt\n!keep/", ["keep/a.txt", "b.txt"], ["keep/a.py"]),
        ("a/**/z", ["a/z", "a/b/c/z"], ["z", "b/z"]),
        ("a/**", ["a/b", "a/c/d"], ["b/a"]),
        ("**/a/b", ["a/b", "c/a/b"], ["a/c"]),
        ("[ab].txt\n?.py\n[!x].md", ["a.txt", "b.txt", "q.py", "y.md"], ["c.txt", "qq.py", "x.md"]),
        ("A.txt", ["A.txt"], ["a.txt"]),
        ("# no\n\n\\#a\n\\!b\n!!c", ["#a", "!b"], ["# no", "!c"]),
        ("a  \nb\\ \n c", ["a", "b ", " c"], ["a  ", "b", "c"]),
        ("a.log\r\n/b/\r\n", ["a.log", "b/x"], ["c"]),
        ("\ufeffa.log", ["a.log"], ["b.log"]),
        ("a.log\n!a.log\na.log", ["a.log"], []),
        ("/\n!\n//", [], ["a", "b/c"]),
        ("ä*", ["äb"], ["a"]),
    ],
)
def test_a_gitignore(folder, lines, ignored, kept):
    write(folder, *ignored, *kept)
    write(folder, **{".gitignore": lines})
    own = [] if ".gitignore" in ignored else [".gitignore"]
    assert pack(folder).names == tuple(sorted([*kept, *own]))


def test_nested_gitignores(folder):
    write(folder, "a.log", "b/a.log", "b/c/a.log", "b/only.txt", "only.txt", "b/c/only.txt", "d/x", "d/e/x")
    write(folder, **{".gitignore": "*.log\n/d/x", "b/.gitignore": "!a.log\n/only.txt", "b/c/.gitignore": "a.log"})
    assert pack(folder).names == (
        ".gitignore", "b/.gitignore", "b/a.log", "b/c/.gitignore", "b/c/only.txt", "d/e/x", "only.txt",
    )  # fmt: skip


def test_a_nested_gitignore_reaches_no_farther_than_git_lets_it(folder):
    """``!c`` is about the folder, not about the files in it."""
    write(folder, "b/c/a", "b/c/z")
    write(folder, **{".gitignore": "[a]", "b/.gitignore": "!c"})
    assert pack(folder).names == (".gitignore", "b/.gitignore", "b/c/z")


def test_gitignores_above_count_up_to_the_root_of_the_checkout(tmp_path, folder):
    inner = folder / "jobs" / "one"
    write(inner, "a.log", "b.tmp", "c.txt", "d.py", "out/x")
    write(folder, **{".gitignore": "*.tmp\n/jobs/one/out", "jobs/.gitignore": "*.txt"})
    write(tmp_path, **{".gitignore": "*.py\n*.log"})
    assert pack(inner).names == ("a.log", "b.tmp", "c.txt", "d.py", "out/x")  # in no checkout
    (folder / ".git").mkdir()
    assert pack(inner).names == ("a.log", "d.py")


def test_a_checkout_in_a_checkout_has_its_own_gitignores(folder):
    write(folder, ".git/HEAD", "sub/.git", "sub/a.log", "sub/b.tmp", "a.log")
    write(folder, **{".gitignore": "*.log", "sub/.gitignore": "*.tmp"})
    assert pack(folder).names == (".gitignore", "sub/.gitignore", "sub/a.log")


def test_a_folder_that_git_ignores_is_packed_if_it_is_asked_for(folder):
    write(folder, ".git/HEAD", "scratch/job.yaml", "scratch/a.log")
    write(folder, **{".gitignore": "/scratch\n*.log"})
    assert pack(folder / "scratch").names == ("job.yaml",)


def test_a_gitignore_that_is_a_link_does_not_count(folder):
    write(folder, "a.log", rules="*.log")
    link(folder, ".gitignore", "rules")
    assert pack(folder).names == (".gitignore", "a.log", "rules")


@pytest.mark.parametrize("pattern", ["[[:alpha:]]x", "[^[:space:]]", "[a", "a[b/c]d", "a\\/b", "a\\", "x[[]"])
def test_a_pattern_that_is_not_read_as_git_reads_it_is_refused(folder, pattern):
    write(folder, **{"sub/.gitignore": f"*.log\n{pattern}\n"})
    assert refusal(folder) == (
        f"{folder}/sub/.gitignore: line 2, {pattern!r}, is not supported; write it in another way"
    )


# --- Symbolic links ---


def test_links_within_the_folder_are_stored_as_what_they_lead_to(folder):
    write(folder, "shared/a.py", "shared/deep/b.py", "main.py")
    link(folder, "one/a.py", "../shared/a.py")
    link(folder, "two", "shared")
    link(folder, "chain.py", "one/a.py")
    link(folder, "absolute.py", str(folder / "main.py"))
    assert contents(pack(folder)) == {
        "absolute.py": b"main.py", "chain.py": b"shared/a.py", "main.py": b"main.py", "one/a.py": b"shared/a.py",
        "shared/a.py": b"shared/a.py", "shared/deep/b.py": b"shared/deep/b.py", "two/a.py": b"shared/a.py",
        "two/deep/b.py": b"shared/deep/b.py",
    }  # fmt: skip


def test_the_folder_may_be_given_by_a_link(folder, tmp_path):
    write(folder, "a.py")
    link(tmp_path, "alias", "job")
    link(folder, "b.py", str(tmp_path / "alias" / "a.py"))
    assert pack(tmp_path / "alias") == pack(folder)
    assert pack(folder).names == ("a.py", "b.py")


def test_links_that_lead_elsewhere_are_refused_by_name(folder, tmp_path):
    write(tmp_path, "data/x.bin", "job-too/a.py")
    link(folder, "data", "../data")
    link(folder, "sub/file", str(tmp_path / "data" / "x.bin"))
    link(folder, "prefix.py", "../job-too/a.py")
    link(folder, "gone", "no/where")
    link(folder, "me", "me")
    link(folder, "sub/up", "..")
    assert refusal(folder) == (
        f"{folder}: symbolic links that cannot be packed: data leads out of the folder, gone leads nowhere, "
        "me leads to itself, prefix.py leads out of the folder, sub/file leads out of the folder, sub/up leads to a "
        "folder that it lies in; replace them by files, or add them to .gitignore without a slash at the end"
    )


def test_folders_that_lead_to_each_other_are_refused(folder):
    link(folder, "x/to_y", "../y")
    link(folder, "y/to_x", "../x")
    assert "x/to_y/to_x leads to a folder that it lies in" in refusal(folder)


def test_links_that_git_ignores_may_lead_anywhere(folder):
    link(folder, "data", "/")
    write(folder, **{".gitignore": "data/"})
    assert "data leads out of the folder" in refusal(folder)  # for git, a link is no folder
    write(folder, **{".gitignore": "data"})
    assert pack(folder).names == (".gitignore",)


def test_links_to_what_is_left_out_are_left_out(folder):
    write(folder, ".git/config", "env/pyvenv.cfg", "env/bin/tool", "a.py")
    link(folder, "config", ".git/config")
    link(folder, "repository", ".git")
    link(folder, "tool", "env/bin/tool")
    link(folder, "other_env", "env")
    link(folder, "wandb", "/")
    assert pack(folder).names == ("a.py",)


# --- The same files, the same bytes ---


def test_the_bytes_are_known():
    """They were the same with Python 3.11, 3.12 and 3.13; if they differ, runs cannot find their code any more."""
    packed = make_bundle({"b.py": CodeFile(b"print()\n" * 99, True), "a/ü.py": CodeFile(b"", False)})
    assert packed.names == ("a/ü.py", "b.py")
    assert packed.sha256 == "d3308f262f45ec70df11259b71b84c2b35cc1ccf81989f6ac689509d1809212f"


def test_neither_times_nor_umask_nor_order_matter(tmp_path, umask):
    packed = []
    for number, mask in enumerate((0o022, 0o077, 0o002)):
        umask(mask)
        names = ["z.py", "a/b.py", "a.py", "a/c.py", "Z.py"]
        write(tmp_path / str(number), *(names if number else names[::-1]))
        for path in (tmp_path / str(number)).rglob("*"):
            os.utime(path, (1e9 + number, 1e9 + number * 77))
        packed.append(pack(tmp_path / str(number)))
    assert packed[0] == packed[1] == packed[2]
    assert packed[0].names == ("Z.py", "a.py", "a/b.py", "a/c.py", "z.py")


@pytest.mark.parametrize("change", ["content", "name", "mode"])
def test_whatever_else_differs_makes_another_digest(folder, change):
    write(folder, "a.py", "b.py")
    before = pack(folder).sha256
    if change == "content":
        write(folder, **{"a.py": "A.py"})
    elif change == "name":
        (folder / "a.py").rename(folder / "c.py")
    else:
        (folder / "a.py").chmod(0o755)
    assert pack(folder).sha256 != before


# --- Limits ---


def test_too_much_is_refused_with_the_ten_largest(folder):
    for number in range(12):
        write(folder, **{f"data/{number:02}.bin": b"x" * (MIB * (number + 1) // 4)})
    write(folder, **{"big.bin": b"x" * (12 * MIB + 1), "job.yaml": ""})
    write(folder, **{"ignored.bin": b"x" * MIB, ".gitignore": "ignored.bin\n" + "#" * (MIB // 4)})
    assert len(pack(folder).data) < 33 * MIB
    write(folder, **{"more.bin": b"x" * (8 * MIB)})
    assert refusal(folder) == (
        f"{folder}: the code has 39.76 MiB, the limit is 32 MiB; the largest files: big.bin 12.01 MiB, "
        "more.bin 8.00 MiB, data/11.bin 3.00 MiB, data/10.bin 2.75 MiB, data/09.bin 2.50 MiB, data/08.bin 2.25 MiB, "
        "data/07.bin 2.00 MiB, data/06.bin 1.75 MiB, data/05.bin 1.50 MiB, data/04.bin 1.25 MiB; "
        "add what is not code to .gitignore, data belongs in the store"
    )


def test_the_limit_is_met_to_the_byte(folder):
    with open(folder / "data.bin", "wb") as file:
        file.truncate(32 * MIB)
    assert pack(folder).names == ("data.bin",)
    write(folder, a="x")
    told = refusal(folder)
    assert "the code has 32.01 MiB, the limit is 32 MiB; the largest files: data.bin 32.00 MiB, a 0.01 MiB" in told


def test_too_many_files_are_refused(folder, monkeypatch):
    monkeypatch.setattr(listing, "MAX_FILES", 5)
    write(folder, "job.yaml", "a/1", "a/2", "a/3", "b/1")
    assert len(pack(folder).names) == 5
    write(folder, "c/1")
    assert refusal(folder) == (
        f"{folder}: the code has more than 5 files, most of them in a, b, c; "
        "add what is not code to .gitignore, data belongs in the store"
    )


# --- Secrets ---


@pytest.mark.parametrize(
    "name",
    [
        ".env", ".env.local", ".ENV", ".envrc", ".netrc", "server.pem", "tls.key", "a.p12", "a.pfx", "id_rsa",
        "id_rsa.old", "id_ed25519", "id_ecdsa_work", "credentials", "credentials.json", "my-service-account-1.json",
        "service_account.json", "kubeconfig", ".pypirc", ".npmrc", ".git-credentials", ".aws/config",
        ".ssh/known_hosts", ".kube/config", "client_secret_1.json", ".pgpass", "kaggle.json", "secrets.yaml",
        ".ray/auth_token", "auth_token", "my.token", "credentials.yaml", "credentials.yml", "terraform.tfstate",
        "terraform.tfstate.backup", "prod.tfvars", ".huggingface/token", "deploy_rsa", "a.keychain-db", ".bash_history",
        ".oci/config", "rclone.conf", "sftp-config.json",
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_refused(folder, name):
    write(folder, f"sub/{name}", "job.yaml")
    told = f"sub/{name.partition('/')[0]}"
    assert refusal(folder) == (
        f"{folder}: files that look like secrets would be uploaded: {told}; add them to .gitignore"
    )
    write(folder, **{".gitignore": told})
    assert pack(folder).names == (".gitignore", "job.yaml")


def test_what_only_resembles_a_secret_is_packed(folder):
    names = [
        ".env.example", ".env.sample", ".env.template", "credentials.py", "credentials/a.py", "env", "example.tfvars",
        "id_rsa.pub", "keys.py", "pem.txt", "secrets.py", "ssh/config",
    ]  # fmt: skip
    write(folder, *names)
    assert pack(folder).names == tuple(names)


@pytest.mark.parametrize(
    "name",
    [
        ".docker/config.json", ".config/gcloud", ".config/gh", ".config/hub", ".config/rclone",
        ".cargo/credentials.toml", ".gem/credentials", ".m2/settings.xml", ".vscode/sftp.json",
    ],
)  # fmt: skip
def test_a_secret_is_also_known_by_the_folder_that_it_lies_in(folder, name):
    parent, base = name.split("/")
    write(folder, "job.yaml", "config.json/a", "gh/a", "hub", f"{parent}/other", f"own/{base}x")
    kept = pack(folder).names
    write(folder, name if "." in base[1:] or parent == ".gem" else f"{name}/a")
    assert f"would be uploaded: {name}; add" in refusal(folder)
    write(folder, **{".gitignore": name})
    assert set(pack(folder).names) == {*kept, ".gitignore"}


@pytest.fixture
def token(tmp_path, monkeypatch) -> Path:
    """The file of a token, in a place of its own."""
    path = tmp_path / "elsewhere/my cluster"
    path.parent.mkdir()
    path.write_text("s3cret-of-mine\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    return path


@pytest.mark.parametrize("how", ["itself", "link", "hard link", "through a link"])
def test_the_file_of_the_token_is_refused_by_whatever_name(folder, token, monkeypatch, how):
    write(folder, "job.yaml", "a.txt")
    if how in ("itself", "through a link"):
        token.rename(folder / "mine.txt")
        where = folder / "mine.txt"
        if how == "through a link":
            token.symlink_to(where)
            where = token
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(where))
    elif how == "hard link":
        os.link(token, folder / "mine.txt")
    else:
        token.rename(folder / "kept.bin")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "kept.bin"))
        write(folder, **{".gitignore": "kept.bin"})
        link(folder, "mine.txt", "kept.bin")
    monkeypatch.setattr(packing, "known_tokens", list)
    assert "would be uploaded: mine.txt; add" in refusal(folder)


@pytest.mark.parametrize("source", ["file", "variable", "both"])
@pytest.mark.usefixtures("token")
def test_a_file_that_holds_the_token_is_refused_and_the_token_is_not_shown(folder, monkeypatch, source):
    if source != "file":
        monkeypatch.setenv("RAY_AUTH_TOKEN", " s3cret-of-mine\n" if source == "variable" else "another-one")
    if source == "variable":
        monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    write(folder, "job.yaml", **{"sub/a.py": b"\xffTOKEN='s3cret-of-mine'\n"})
    told = refusal(folder)
    assert told == (
        f"{folder}: files that hold a token of yours for a cluster would be uploaded: sub/a.py; "
        "take it out of them, or add them to .gitignore"
    )
    write(folder, **{".gitignore": "a.py"})
    assert pack(folder).names == (".gitignore", "job.yaml")


def test_a_token_that_may_be_a_word_is_not_looked_for(folder, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "test")
    write(folder, "test.py")
    assert pack(folder).names == ("test.py",)


def test_ten_secrets_are_named(folder):
    write(folder, *(f"{number:02}.pem" for number in range(12)))
    assert refusal(folder) == (
        f"{folder}: files that look like secrets would be uploaded: 00.pem, 01.pem, 02.pem, 03.pem, 04.pem, 05.pem, "
        "06.pem, 07.pem, 08.pem, 09.pem and 2 more; add them to .gitignore"
    )


@pytest.mark.parametrize("target", ["secret/.env", "secret/.ssh/config"])
def test_a_secret_behind_a_link_is_refused(folder, target):
    write(folder, target, **{".gitignore": "/secret"})
    link(folder, "settings", target)
    assert "would be uploaded: settings; add" in refusal(folder)


def test_no_secret_is_opened(folder, monkeypatch):
    opened = []

    def observed(path, *arguments, **options):
        opened.append(os.path.basename(path))
        return real_open(path, *arguments, **options)

    real_open = os.open
    monkeypatch.setattr(os, "open", observed)
    write(folder, ".env", "a.py")
    refusal(folder)
    write(folder, **{".gitignore": ".env"})
    pack(folder)
    assert set(opened) == {".gitignore", "a.py"}


# --- Names, and files that cannot be read ---


def test_a_name_that_is_not_utf8_is_refused(folder):
    (folder / os.fsdecode(b"b\xff.py")).write_text("")
    assert refusal(folder) == (
        f"{folder}: the name 'b\\udcff.py' is not UTF-8; rename the file, or add it to .gitignore"
    )


def test_an_error_is_one_line_whatever_the_name(folder):
    write(folder, "a\nb.pem")
    assert "would be uploaded: 'a\\nb.pem'; add" in refusal(folder)


def test_odd_names_survive(folder, nodes):
    names = ("#a", "*.py", "-x", "a\nb", "a b", "a\\b", "c:d", "~", "… .py")
    write(folder, *names)
    packed = pack(folder)
    assert tuple(sorted(tree(unpack(packed.data, packed.sha256, nodes)))) == names


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    write(folder, "a.py")
    monkeypatch.setattr(os, "open", refuse)
    assert refusal(folder) == (
        f"{folder}/a.py: cannot be read, Permission denied; make it readable, or add it to .gitignore"
    )


# --- Files that change meanwhile ---


@pytest.fixture
def on_open(monkeypatch) -> Callable[[str, Callable[[int], None]], None]:
    """Does something whenever a file of a name is about to be opened; it is given the count of times before."""

    def install(name: str, action: Callable[[int], None]) -> None:
        real_open, count = os.open, iter(range(100))

        def interrupted(path, *arguments, **options):
            if os.path.basename(path) == name:
                action(next(count))
            return real_open(path, *arguments, **options)

        monkeypatch.setattr(os, "open", interrupted)

    return install


def only_first(action: Callable[[], None]) -> Callable[[int], None]:
    return lambda count: action() if count == 0 else None


def test_files_that_change_together_are_packed_together(folder, on_open):
    """``b.py`` is opened when the old ``a.py`` was read already."""
    write(folder, **{"a.py": "old", "b.py": "old"})
    on_open("b.py", only_first(lambda: write(folder, **{"a.py": "new", "b.py": "new"})))
    assert contents(pack(folder)) == {"a.py": b"new", "b.py": b"new"}


@pytest.mark.parametrize("content", [b"longer than it was", b"", b"OLD"])
def test_a_file_that_changes_is_packed_whole(folder, on_open, content):
    write(folder, **{"a.py": "old", "b.py": "b"})
    on_open("a.py", only_first(lambda: write(folder, **{"a.py": content})))
    assert contents(pack(folder)) == {"a.py": content, "b.py": b"b"}


def test_a_file_that_vanishes_is_not_packed(folder, on_open):
    write(folder, "a.py", "b.py")
    on_open("b.py", only_first((folder / "b.py").unlink))
    assert pack(folder).names == ("a.py",)


def test_a_file_that_comes_is_packed(folder, on_open):
    write(folder, "a.py")
    on_open("a.py", only_first(lambda: write(folder, "b.py")))
    assert pack(folder).names == ("a.py", "b.py")


def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder, on_open):
    def replace() -> None:
        (folder / "b.py").unlink()
        os.mkfifo(folder / "b.py")

    write(folder, "a.py", "b.py")
    on_open("b.py", only_first(replace))
    assert pack(folder).names == ("a.py",)


def test_a_file_that_does_not_stop_changing_is_refused(folder, on_open):
    write(folder, "a.py", "b.log", "c.log")
    on_open("b.log", lambda count: write(folder, **{"b.log": str(count), "c.log": "x" * count}))
    assert refusal(folder) == (
        f"{folder}: b.log, c.log changed while the code was read; "
        "wait until nothing writes there, or add what is not code to .gitignore"
    )


# --- Unpacking ---


def bundle_of(files: Mapping[str, bytes]) -> Bundle:
    return make_bundle({name: CodeFile(data, name.endswith(".sh")) for name, data in files.items()})


THREE = bundle_of({"a.py": b"a", "deep/er/b.py": b"b", "run.sh": b"#!/bin/sh\n"})
THREE_UNPACKED = {"a.py": (b"a", 0o444), "deep/er/b.py": (b"b", 0o444), "run.sh": (b"#!/bin/sh\n", 0o555)}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0])
def test_what_was_packed_is_unpacked(folder, nodes, umask, mask):
    write(folder, "a.py", "deep/er/b.py", "run.sh", "private.py")
    (folder / "run.sh").chmod(0o700)
    (folder / "private.py").chmod(0o400)
    packed = pack(folder)
    umask(mask)
    path = unpack(packed.data, packed.sha256, nodes)
    assert path == nodes / packed.sha256
    modes = {name: mode for name, (_, mode) in tree(path).items()}
    assert modes == {"a.py": 0o444, "deep/er/b.py": 0o444, "private.py": 0o444, "run.sh": 0o555}
    assert {stat.S_IMODE(each.stat().st_mode) for each in (path, path / "deep", path / "deep/er")} == {0o555}
    assert pack(path) == packed
    assert os.listdir(nodes) == [packed.sha256]


def test_a_folder_that_is_intact_is_used_as_it_is(nodes, monkeypatch):
    path = unpack(THREE.data, THREE.sha256, nodes)
    (path / "__pycache__").mkdir()  # as root, Python writes there
    write(path, "deep/er/__pycache__/b.cpython-311.pyc")
    inode = path.stat().st_ino
    monkeypatch.delattr(os, "fsync")  # nothing is written any more
    assert unpack(THREE.data, THREE.sha256, nodes) == path
    assert path.stat().st_ino == inode


def open_up(folder: Path) -> None:
    """Makes a folder writable, for those who are not root."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o200)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "another content of the same size": lambda folder: (folder / "a.py").write_bytes(b"b"),
    "a shorter file": lambda folder: shorten(folder / "run.sh"),
    "a file that is missing": lambda folder: (folder / "a.py").unlink(),
    "a folder that is missing": lambda folder: shutil.rmtree(folder / "deep"),
    "one file more": lambda folder: (folder / "deep/numpy.py").write_bytes(b""),
    "a file that is not executable": lambda folder: (folder / "run.sh").chmod(0o644),
    "a file that is executable": lambda folder: (folder / "a.py").chmod(0o755),
    "a link to the same content": lambda folder: (
        (folder / "a.py").rename(folder.parent / "a"),
        (folder / "a.py").symlink_to("../a"),
    ),
    "a folder that is a link": lambda folder: (
        (folder / "deep").rename(folder.parent / "deep"),
        (folder / "deep").symlink_to("../deep"),
    ),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "a name that is not UTF-8": lambda folder: (folder / os.fsdecode(b"\xff")).write_bytes(b""),
    "too much": lambda folder: os.truncate(folder / "a.py", bundle.MAX_BYTES + 1),
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"")),
    "a link in its place": lambda folder: (folder.rename(folder.parent / "x"), folder.symlink_to("x")),
}


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("what", DAMAGES)
def test_a_folder_that_is_damaged_is_replaced_and_kept_beside(nodes, monkeypatch, what, can_exchange):
    path = unpack(THREE.data, THREE.sha256, nodes)
    open_up(path)
    assert is_intact(path, THREE.sha256)
    DAMAGES[what](path)
    if not can_exchange:
        monkeypatch.setattr(bundle, "_exchange", lambda *_: False)
    assert unpack(THREE.data, THREE.sha256, nodes) == path
    assert not path.is_symlink()
    assert tree(path) == THREE_UNPACKED
    assert len(list(nodes.glob(f"{THREE.sha256}-damaged-*"))) == 1
    assert list(nodes.glob("*-unfinished-*")) == []


def test_an_empty_folder_in_the_way_is_filled(nodes):
    (nodes / THREE.sha256).mkdir(parents=True)
    assert tree(unpack(THREE.data, THREE.sha256, nodes)) == THREE_UNPACKED
    assert os.listdir(nodes) == [THREE.sha256]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_many_that_replace_a_damaged_folder_at_once_end_with_one(nodes, monkeypatch, can_exchange):
    """Each has written all of its files before the first of them renames."""
    path = unpack(THREE.data, THREE.sha256, nodes)
    open_up(path)
    write(path, **{"a.py": "A"})
    barrier, real_put = threading.Barrier(6), bundle._put_in_place

    def put_in_place(*arguments):
        barrier.wait(30)
        real_put(*arguments)

    monkeypatch.setattr(bundle, "_put_in_place", put_in_place)
    if not can_exchange:
        monkeypatch.setattr(bundle, "_exchange", lambda *_: False)
    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(lambda _: unpack(THREE.data, THREE.sha256, nodes), range(6))) == {path}
    assert tree(path) == THREE_UNPACKED
    assert list(nodes.glob("*-unfinished-*")) == []
    assert any((left / "a.py").read_bytes() == b"A" for left in nodes.glob("*-damaged-*"))


def test_a_damaged_folder_is_at_no_moment_missing(nodes):
    path = unpack(THREE.data, THREE.sha256, nodes)
    spare = nodes / "spare"
    spare.mkdir()
    inodes = path.stat().st_ino, spare.stat().st_ino
    if not bundle._exchange(spare, path):
        pytest.skip("this file system cannot exchange two names")
    assert (spare.stat().st_ino, path.stat().st_ino) == inodes


def test_a_bundle_that_was_packed_in_another_way_is_refused(nodes):
    data = zip_of("b", "a")
    with pytest.raises(StorageError, match="was packed in another way; submit the run again"):
        unpack(data, hashlib.sha256(data).hexdigest(), nodes)


def test_another_digest_is_refused_first(nodes):
    (nodes / THREE.sha256).mkdir(parents=True)
    with pytest.raises(StorageError) as caught:
        unpack(THREE.data + b"\0", THREE.sha256, nodes)
    assert str(caught.value) == (f"code {THREE.sha256}: the bytes are not those that were packed; submit the run again")


def test_many_at_once_end_with_one_folder(nodes, monkeypatch):
    """Each has written all of its files before the first of them renames."""
    barrier, real_rename = threading.Barrier(6), os.rename

    def rename(source, target):
        barrier.wait(30)
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda _: unpack(THREE.data, THREE.sha256, nodes), range(6)))
    assert set(paths) == {nodes / THREE.sha256}
    assert tree(paths[0]) == THREE_UNPACKED
    assert os.listdir(nodes) == [THREE.sha256]


def kill_while_unpacking(number: int, nodes: Path) -> None:
    """Unpacks three files, and dies with the last bytes of one of them, which leaves no time to clean up."""
    count = iter(range(3))

    def fsync(_):
        if next(count) == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            unpack(THREE.data, THREE.sha256, nodes)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_a_killed_process_leaves_is_not_used(nodes, number):
    kill_while_unpacking(number, nodes)
    (left,) = nodes.iterdir()
    assert (left.name != THREE.sha256, len(tree(left))) == (True, number + 1)
    assert tree(unpack(THREE.data, THREE.sha256, nodes)) == THREE_UNPACKED
    assert len(tree(left)) == number + 1  # it may be of a process that lives


def test_a_failure_leaves_nothing(nodes, monkeypatch):
    def fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError) as caught:
        unpack(THREE.data, THREE.sha256, nodes)
    assert str(caught.value) == (
        f"code {THREE.sha256}: cannot be unpacked into {nodes}, No space left on device; make room or give access there"
    )
    assert os.listdir(nodes) == []


def zip_of(*names: str, mode: int = stat.S_IFREG | 0o644, data: bytes = b"x", deflate: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo("x" * len(name))
            info.filename = name  # as it is: the constructor would cut it off at a NUL
            info.create_system, info.external_attr = 3, mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
            archive.writestr(info, data)
    return buffer.getvalue()


NOT_PLAIN = "holds the name {!r}, which is not a plain relative path"
NOT_REGULAR = "holds 'a', which is not a regular file"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        *((zip_of(name), NOT_PLAIN.format(name)) for name in (
            "/etc/passwd", "//etc/passwd", "../a", "a/../../b", "a/..", "..", ".", "./a", "a//b", "a/", "a\0b",
        )),
        (zip_of("a", mode=stat.S_IFLNK | 0o777, data=b"/etc/passwd"), NOT_REGULAR),
        (zip_of("a", mode=stat.S_IFDIR | 0o755), NOT_REGULAR),
        (zip_of("a", mode=stat.S_IFIFO | 0o644), NOT_REGULAR),
        (zip_of("a", deflate=True), "holds 'a' compressed or encrypted"),
        (zip_of("bomb", data=bytes(32 * MIB + 1), deflate=True),
         "declares 33,554,433 bytes in 1 files, the limits are 33,554,432 and 10,000"),
        (zip_of("a", "b", "c", data=bytes(11 * MIB), deflate=True),
         "declares 34,603,008 bytes in 3 files, the limits are 33,554,432 and 10,000"),
        (b"no zip", "is no zip file, File is not a zip file"),
        (zip_of("a", data=b"content").replace(b"content", b"CONTENT"), "is no zip file, Bad CRC-32 for file 'a'"),
    ],
)  # fmt: skip
def test_a_zip_that_was_not_packed_here_is_refused(nodes, data, problem):
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(StorageError) as caught:
        unpack(data, digest, nodes)
    assert str(caught.value) == f"code {digest}: {problem}; submit the run again"
    assert not nodes.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(nodes):
    data = zip_of("a", "a")
    with pytest.raises(StorageError, match="holds 'a' twice"):
        unpack(data, hashlib.sha256(data).hexdigest(), nodes)


def test_declared_sizes_are_not_believed(nodes):
    """An entry that says 1 byte and holds more."""
    data = zip_of("a", data=b"y" * 50).replace((50).to_bytes(4, "little"), (1).to_bytes(4, "little"))
    with pytest.raises(StorageError, match="is no zip file"):
        unpack(data, hashlib.sha256(data).hexdigest(), nodes)


def test_too_many_files_are_not_unpacked(nodes, monkeypatch):
    monkeypatch.setattr(bundle, "MAX_FILES", 2)
    with pytest.raises(StorageError, match="in 3 files, the limits are 33,554,432 and 2; submit"):
        unpack(THREE.data, THREE.sha256, nodes)


class TestTheCodeOfAJob:
    @pytest.fixture(autouse=True)
    def _in_project(self, tmp_path, monkeypatch):
        (tmp_path / "project").mkdir()
        monkeypatch.chdir(tmp_path / "project")

    def test_is_the_folder_of_the_job_file_and_the_modules_of_the_working_directory(self, folder):
        write(folder, "own.yaml", "near.py")
        write(
            Path.cwd(), "far.py", "models/__init__.py", "models/net.py", "models/labels.csv", "space/a.py", "other.py"
        )
        bundle = pack_job(folder, ["near", "far", "models", "models.net", "space.a"])
        assert bundle.names == (
            "far.py", "models/__init__.py", "models/labels.csv", "models/net.py", "near.py", "own.yaml", "space/a.py",
        )  # fmt: skip

    def test_is_once_what_is_in_both(self, folder, monkeypatch):
        write(folder, "own.yaml", "near.py")
        monkeypatch.chdir(folder)
        assert pack_job(folder, ["near"]) == pack(folder)

    def test_of_a_package_is_the_outermost(self, folder):
        write(folder, "outer/__init__.py", "outer/inner/__init__.py", "outer/inner/own.yaml", "outer/a.py", "beside.py")
        bundle = pack_job(folder / "outer/inner", ["outer", "outer.a", "outer.inner", "beside"])
        assert bundle.names == (
            "beside.py", "outer/__init__.py", "outer/a.py", "outer/inner/__init__.py", "outer/inner/own.yaml",
        )  # fmt: skip

    def test_of_a_description_that_is_shipped_is_none(self):
        assert pack_job(Path(__file__).parents[2] / "jobs", []).names == ()

    @pytest.mark.parametrize(
        ("here", "job", "expected"),
        [
            ("a", "a", "."), ("a/b", "a", "b"), ("a", "a/b", None), (".", "a", None), ("a/p", "a/p", "p"),
            ("a/p/q", "a/p", "p/q"), ("a", "a/p", None),
        ],
    )  # fmt: skip
    def test_has_the_working_directory_or_not(self, folder, monkeypatch, here, job, expected):
        write(folder, "a/b/own.yaml", "a/p/__init__.py", "a/p/q/labels.csv")
        monkeypatch.chdir(folder / here)
        assert directory_in_code(folder / job) == expected

    def test_what_git_ignores_is_missed(self, folder):
        write(folder, "own.yaml", "near.py", "models/net.py", **{".gitignore": "near.py\nnet.py\n"})
        with pytest.raises(DescriptionError, match="job: models.net, near would be missing on the cluster"):
            pack_job(folder, ["near", "models.net", "from.elsewhere"])

    def test_is_limited_as_a_whole(self, folder):
        half = b"x" * (bundle.MAX_BYTES // 2 + 1)
        write(folder, **{"a.bin": half})
        write(Path.cwd(), "far/__init__.py", **{"far/b.bin": half})
        with pytest.raises(DescriptionError, match="has 32.01 MiB in 3 files, the limits are 32 MiB"):
            pack_job(folder, ["far"])
        assert pack_job(folder, []).names == ("a.bin",)


DAY_S = 24 * 3600.0


@contextmanager
def holding(lock: Path) -> Iterator[None]:
    """As a process that uses a bundle does."""
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


class TestOnAHost:
    @pytest.fixture
    def run(self, tmp_path) -> RunDirectory:
        return RunDirectory(str(tmp_path / "run"))

    @pytest.fixture
    def code(self, run) -> Bundle:
        made = make_bundle({"mine.py": CodeFile(b"x = 1\n", False)})
        run.write_code(made.sha256, made.data)
        return made

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache/launcher/code"

    def test_is_unpacked_once_where_others_cannot_write(self, run, code, cache):
        folder = fetch_code(run, code.sha256)
        assert (folder, (folder / "mine.py").read_text()) == (cache / code.sha256, "x = 1\n")
        assert cache.stat().st_mode & 0o777 == 0o700
        run.store.delete([f"code/{code.sha256}.zip"])
        assert fetch_code(run, code.sha256) == folder
        with pytest.raises(StorageError, match="the code of the run, is missing"):
            fetch_code(run, code.sha256, check_store=True)

    def test_is_unpacked_anew_where_it_is_damaged(self, run, code, cache):
        folder = fetch_code(run, code.sha256)
        open_up(folder)
        (folder / "mine.py").write_text("x = 2\n")
        assert fetch_code(run, code.sha256) == folder
        assert (folder / "mine.py").read_text() == "x = 1\n"
        (kept,) = cache.glob("*-damaged-*")
        assert (kept / "mine.py").read_text() == "x = 2\n"

    def test_is_copied_to_where_a_process_may_write(self, tmp_path, nodes):
        folder = unpack(THREE.data, THREE.sha256, nodes)
        (folder.parent / "own").mkdir()
        copy_code(folder, ".", nodes / "own")
        assert {name: data for name, (data, _) in tree(nodes / "own").items()} == {
            name: data for name, (data, _) in THREE_UNPACKED.items()
        }
        assert {stat.S_IMODE(path.stat().st_mode) & 0o300 for path in (nodes / "own").rglob("*")} <= {0o200, 0o300}
        copy_code(folder, "deep", tmp_path / "new/place")
        assert tree(tmp_path / "new/place").keys() == {"er/b.py"}
        write(nodes / "own", **{"a.py": "changed"})
        assert is_intact(folder, THREE.sha256)
        with pytest.raises(StorageError, match="code cannot be copied to .*/own/a.py: .*; make room"):
            copy_code(folder, ".", nodes / "own/a.py")

    @pytest.fixture
    def temporary(self, tmp_path, monkeypatch) -> Path:
        """The temporary folder, in which the folders of processes are."""
        folder = tmp_path / "tmp"
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        return folder / f"launcher-{os.geteuid()}"

    @pytest.mark.parametrize(
        ("directory", "names"), [(".", THREE_UNPACKED.keys()), ("deep", {"er/b.py"}), (None, set())]
    )
    def test_is_worked_with_in_a_copy(self, temporary, nodes, cache, tmp_path, monkeypatch, directory, names):
        monkeypatch.chdir(tmp_path)
        enter_copy(unpack(THREE.data, THREE.sha256, nodes), directory)
        assert Path.cwd().parent == temporary
        assert temporary.stat().st_mode & 0o777 == Path.cwd().stat().st_mode & 0o777 == 0o700
        assert tree(Path.cwd()).keys() == names
        assert is_own(os.getcwd())
        assert lasting_directory("1f") == str(cache.parent / "records/1f"), "what is written here goes with the process"

    def test_what_is_written_elsewhere_lasts(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert not is_own(os.getcwd())
        assert lasting_directory("1f") == os.getcwd()

    def test_what_a_killed_process_has_left_is_removed(self, run, code, temporary, cache):
        ready = "from cluster.host.scratch import *; print(make_own_folder(), owner(), flush=True); input()"
        command = [sys.executable, "-c", f"import tempfile; tempfile.tempdir = {str(temporary.parent)!r}; {ready}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            folder, owner = process.stdout.readline().split()
            (Path(folder) / "a.py").touch()
            fetch_code(run, code.sha256)
            unfinished = cache / f"{code.sha256}-unfinished-{owner}x"
            unfinished.mkdir(mode=0o555)
            fetch_code(run, code.sha256)
            assert (os.listdir(folder), unfinished.exists()) == (["a.py"], True), "its owner lives"
            process.kill()
            process.wait()
        fetch_code(run, code.sha256)
        assert (os.listdir(temporary), os.listdir(cache)) == ([], [code.sha256])

    def test_what_a_process_makes_goes_with_it(self, temporary):
        script = f"import tempfile; tempfile.tempdir = {str(temporary.parent)!r}; import cluster.host.scratch as own"
        subprocess.run([sys.executable, "-c", f"{script}; own.make_own_folder()"], check=True)
        assert os.listdir(temporary) == []

    @pytest.mark.parametrize("name", ["1-1-0123456789ab-x", "mine", "4194305-1-x"])
    def test_a_folder_of_nobody_that_is_seen_from_here_stays(self, run, code, temporary, name):
        """Its owner may live on another host, or in another container."""
        (temporary / name).mkdir(parents=True)
        fetch_code(run, code.sha256)
        assert os.listdir(temporary) == [name]

    def test_another_process_of_the_same_number_is_another(self, temporary):
        folder = make_own_folder()
        pid, started, place, _ = folder.name.split("-")
        (temporary / f"{pid}-{int(started) - 1}-{place}-x").mkdir()
        sweep_own_folders()
        assert os.listdir(temporary) == [folder.name]

    def test_a_temporary_folder_that_others_have_spoilt_is_not_swept_and_not_used(self, temporary, tmp_path):
        (tmp_path / "theirs").mkdir()
        temporary.symlink_to(tmp_path / "theirs")
        folder = make_own_folder()
        assert (folder.parent, is_own(str(folder))) == (temporary.parent, True)
        sweep_own_folders()
        assert os.listdir(tmp_path / "theirs") == []

    def test_a_bundle_that_nobody_uses_goes_after_thirty_days(self, run, code, cache):
        other = unpack(THREE.data, THREE.sha256, cache)
        damaged = cache / f"{THREE.sha256}-damaged-1f"
        damaged.mkdir()
        fetch_code(run, code.sha256)
        assert other.exists(), "it comes from another version, and counts from now on"
        days_ago = time.time() - 29.9 * DAY_S
        lock = cache.parent / "code-in-use" / THREE.sha256
        for path in (lock, damaged):
            os.utime(path, (days_ago, days_ago))
        fetch_code(run, code.sha256)
        assert (other.exists(), damaged.exists()) == (True, True)
        days_ago -= DAY_S
        for path in (lock, damaged, other):
            os.utime(path, (days_ago, days_ago))
        with holding(lock):
            fetch_code(run, code.sha256)
            assert (other.exists(), damaged.exists()) == (True, True), "a process uses it"
        fetch_code(run, code.sha256)
        assert (os.listdir(cache), os.listdir(lock.parent)) == ([code.sha256], [code.sha256])

    def test_a_lock_whose_bundle_never_came_or_was_removed_by_hand_goes(self, run, code, cache):
        fetch_code(run, code.sha256)
        locks = [cache.parent / "code-in-use" / (digit * 64) for digit in "123"]
        for lock in locks:
            lock.touch()
        for lock in locks[1:]:
            os.utime(lock, (0, 0))
        with holding(locks[1]):
            fetch_code(run, code.sha256)
        assert [lock.exists() for lock in locks] == [True, True, False], "one is young, and one is in use"

    def test_use_renews_a_bundle_and_keeps_it_as_long_as_the_process_lives(self, run, code, cache):
        folder, lock = fetch_code(run, code.sha256), cache.parent / "code-in-use" / code.sha256
        os.utime(lock, (0, 0))
        fetch_code(run, code.sha256)
        assert time.time() - lock.stat().st_mtime < DAY_S
        os.utime(lock, (0, 0))
        host_cache.HostCache("code").sweep()
        assert folder.exists()
        script = "from cluster.process.host_cache import HostCache; HostCache('code').sweep()"
        subprocess.run([sys.executable, "-c", script], check=True)
        assert folder.exists()
        os.close(host_cache._held.pop(lock))
        subprocess.run([sys.executable, "-c", script], check=True)
        assert not folder.exists()

    def test_what_cannot_be_swept_hurts_nobody(self, run, code, cache, monkeypatch):
        fetch_code(run, code.sha256)
        (cache / f"{THREE.sha256}-unfinished-x").touch()
        os.utime(cache / f"{THREE.sha256}-unfinished-x", (0, 0))
        (cache / "else").touch()

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        for name in ("unlink", "rename", "listdir"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, refuse)
                fetch_code(run, code.sha256)

    def test_without_locks_it_is_fetched_and_nothing_goes(self, run, code, cache, monkeypatch):
        def refuse(*_):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        fetch_code(run, code.sha256)
        os.utime(unpack(THREE.data, THREE.sha256, cache), (0, 0))
        (cache.parent / "code-in-use" / THREE.sha256).touch()
        os.utime(cache.parent / "code-in-use" / THREE.sha256, (0, 0))
        fetch_code(run, code.sha256)
        assert {*os.listdir(cache)} == {code.sha256, THREE.sha256}

    def test_by_default_below_the_home(self, run, code, tmp_path, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert fetch_code(run, code.sha256) == tmp_path / "home/.cache/launcher/code" / code.sha256

    def test_a_folder_that_others_could_write_to_is_closed(self, run, code, cache, umask):
        umask(0)
        cache.mkdir(parents=True, mode=0o777)
        fetch_code(run, code.sha256)
        assert [folder.stat().st_mode & 0o777 for folder in (cache, cache.parent)] == [0o700] * 2

    @pytest.mark.parametrize("is_around", [False, True], ids=["itself", "the one around it"])
    def test_a_folder_of_another_user_is_refused(self, run, code, cache, is_around):
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        cache.mkdir(parents=True)
        os.chown(cache.parent if is_around else cache, 12345, 12345)
        with pytest.raises(StorageError, match="belongs to another user; set XDG_CACHE_HOME"):
            fetch_code(run, code.sha256)

    def test_without_a_place_it_says_what_to_do(self, run, code, tmp_path):
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(StorageError, match="the cache of this host cannot be used: .*; set XDG_CACHE_HOME"):
            fetch_code(run, code.sha256)

    @pytest.mark.parametrize("digest", ["../../x", "", "A" * 64])
    def test_what_is_no_digest_is_no_path(self, run, digest, cache):
        with pytest.raises(StorageError, match="is no SHA-256 digest"):
            fetch_code(run, digest)
        assert not cache.exists() or not any(cache.iterdir())
