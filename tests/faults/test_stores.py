"""A whole run on remote stores that are slow, busy, rude and away; looked at, and gone on with, from elsewhere."""

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import safetensors.torch

from cluster.run.run_directory import RunDirectory
from cluster.storage.file_systems import file_system_class
from cluster.storage.store import Store
from tests.e2e.command import JOBS, Running, launcher
from tests.faults.injection import Fault, fired, release
from tests.faults.planned import Bits, undisturbed
from tests.processes import descendants, memory
from tests.stores import S3_SECRET, Proxy, S3Server, SSHServer

pytestmark = pytest.mark.slow

SHORT = ("train.epochs=2", "checkpoint.every_steps=4", "tracking.mode=offline")
HOLDS = [Fault(kind="hold", doing="forward", step=step) for step in (2, 6, 22)]
"""Where a run waits for what is done to its store: before its first checkpoint, after that, and many steps later."""
LATENCY_S = 0.01
OWN = """\
from torchvision.transforms.v2 import RandomCrop


class Crop(RandomCrop):
    \"\"\"The crop of jobs/digits.yaml, for the same bits; it is told a secret.\"\"\"

    def __init__(self, size, padding, password):
        super().__init__(size, padding)
        assert password
"""


@pytest.fixture(scope="module")
def reference() -> Bits:
    return undisturbed(SHORT)


@pytest.fixture(autouse=True)
def _own_file_systems() -> Iterator[None]:
    """They are kept by their URL, whatever the environment was in which they were made."""
    for protocol in ("s3", "sftp"):
        file_system_class(protocol, "").clear_instance_cache()
    yield
    for protocol in ("s3", "sftp"):
        file_system_class(protocol, "").clear_instance_cache()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder from which nobody has ever seen the run."""
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def bits(run: RunDirectory) -> Bits:
    status = run.read_status()
    assert status is not None
    assert status["status"] == "completed", status
    return status["state_sha256"], run.metrics().read()


def happened(run: RunDirectory, kind: str) -> list[dict]:
    return [event for event in run.events().read() if event["kind"] == kind] if run.exists() else []


def holds_secret(memory: bytes, variables: Mapping[str, str]) -> bool:
    """Whether there is the store's key, or the value of a variable anywhere but in an environment."""
    values = ((value.encode(), f"{name}={value}".encode()) for name, value in variables.items())
    return S3_SECRET.encode() in memory or any(memory.count(value) > memory.count(named) for value, named in values)


def test_what_holds_a_secret() -> None:
    variables = {"OWN": "value"}
    for text in ("", "OWN=value", "OWN=other\0OWN=value\0"):
        assert not holds_secret(f"\0{text}\xff".encode(), variables), text
    for text in ("value", "OWN=value\0value", "OWNER=value", S3_SECRET):
        assert holds_secret(f"\0{text}\xff".encode(), variables), text


def test_a_run_on_s3(
    tmp_path: Path, elsewhere: Path, reference: Bits, make_plan, monkeypatch: pytest.MonkeyPatch, s3: S3Server
) -> None:
    """Through refusals, broken connections, an outage and a kill to the same bits; and no secret is left anywhere."""
    secrets = {"OWN_PASSWORD": "planted0password", "WANDB_API_KEY": "0123456789" * 4}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "own.py").write_text(OWN)
    transform = "{_target_: own.Crop, size: 32, padding: 2, password: '${oc.env:OWN_PASSWORD}'}"
    plan = make_plan(*HOLDS)
    with Proxy(s3.port, LATENCY_S) as proxy:
        (tmp_path / "credentials").write_text(
            f"[default]\naws_access_key_id = {s3.environment['AWS_ACCESS_KEY_ID']}\n"
            f"aws_secret_access_key = {S3_SECRET}\n"
        )
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        run = RunDirectory(f"s3://{s3.bucket}/team/digits")
        (tmp_path / "digits.yaml").write_text((JOBS / "digits.yaml").read_text())
        command = ["run", "digits.yaml", *SHORT, f"store=s3://{s3.bucket}/team"]
        running = Running([*command, f"data.train.transform={transform}", "--json"], tmp_path, on_ray=True)

        running.wait_until(lambda: 0 in fired(plan))
        proxy.slow_downs, proxy.resets = 3, 2
        release(plan, 0)
        running.wait_until(lambda: 1 in fired(plan) and bool(happened(run, "checkpoint")))
        with proxy.away():
            release(plan, 1)
            running.wait_until(lambda: 2 in fired(plan) and "training goes on without the store" in running.stderr)
        running.wait_until(lambda: bool(happened(run, "store_away")))
        seen = descendants(running.pid)
        (metadata,) = (process.pid for process in seen if "gcs_server" in process.command)
        found = [holds_secret(stretch, secrets) for stretch in memory(metadata)]
        assert len(found) > 10
        assert not any(found), "Ray's metadata holds a secret"
        os.kill(fired(plan)[2]["pid"], signal.SIGKILL)
        ended = running.wait()
        seen += descendants(os.getpid())

        assert ended.exit_code == 0, ended.stderr
        assert bits(run) == reference
        assert proxy.turned_away == 5
        (gone,) = happened(run, "store_away")
        assert gone["seconds"] > 0
        assert ended.stderr.count("training goes on without the store, for 1800 s at most") == 1
        assert gone["step"] > happened(run, "checkpoint")[0]["step"], "training went on"
        assert [event["cause"] for event in happened(run, "worker_lost")] == ["killed"]
        assert ended.document["attempts"] == 2

        store = Store(run.url)
        left = {name: store.read(name).decode(errors="replace") for name in store.names()}
        left |= {"stdout": ended.stdout, "stderr": ended.stderr, "commands": str(seen)}
        own = (path for path in (tmp_path / "wandb").rglob("*") if path.is_file())
        left |= {str(path): path.read_text(errors="replace") for path in own}
        assert [name for name in left if any(text in left[name] for text in (S3_SECRET, *secrets.values()))] == []

        monkeypatch.delenv("OWN_PASSWORD")
        listed = launcher("list", f"s3://{s3.bucket}/team", "--json", cwd=elsewhere)
        assert [found["run"] for found in listed.document] == [run.url]
        assert launcher("status", run.url, "--json", cwd=elsewhere).document["status"] == "completed"
        verified = launcher("checkpoints", run.url, "--verify", "--json", cwd=elsewhere).document
        assert [checkpoint["good"] for checkpoint in verified] == [True] * len(verified)
        assert verified[-1]["step"] == 44
        exported = launcher("export", run.url, "--to", "digits.safetensors", "--json", cwd=elsewhere)
        assert exported.exit_code == 0, exported.stderr
        expected = safetensors.torch.load(run.checkpoints.read(44)[1]["model.safetensors"])
        assert safetensors.torch.load_file(elsewhere / "digits.safetensors").keys() == expected.keys()


def test_a_run_on_sftp(
    tmp_path: Path, elsewhere: Path, reference: Bits, make_plan, monkeypatch: pytest.MonkeyPatch, ssh: SSHServer
) -> None:
    """Its sessions are cut off while it saves; it is stopped, and gone on with by more workers, from elsewhere."""
    plan = make_plan(*HOLDS[:2])
    with Proxy(ssh.port, LATENCY_S, http=False) as proxy:
        ssh.know_at(proxy.port)
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        for name, value in ssh.environment.items():
            monkeypatch.setenv(name, value)
        run = RunDirectory(f"sftp://127.0.0.1:{proxy.port}{ssh.folder}/team/digits")
        command = ["run", JOBS / "digits.yaml", *SHORT, f"store={run.url.removesuffix('/digits')}"]
        running = Running([*command, "--json"], tmp_path)
        running.wait_until(lambda: 0 in fired(plan))
        proxy.cut()
        release(plan, 0)
        running.wait_until(lambda: 1 in fired(plan) and bool(happened(run, "checkpoint")))
        proxy.cut()
        stopping = Running(["stop", run.url, "--json"], elsewhere)
        running.wait_until(lambda: bool(happened(run, "stop_requested")))
        release(plan, 1)
        assert stopping.wait().exit_code == 0
        ended = running.wait()
        assert ended.document["status"] == "stopped"
        assert ended.document["attempts"] == 1

        resumed = launcher("resume", run.url, "workers.num=3", "--json", cwd=elsewhere)
        assert resumed.exit_code == 0, resumed.stderr
        assert [event["step"] for event in happened(run, "training")] == [0, ended.document["step"]]
        assert bits(run) == reference
