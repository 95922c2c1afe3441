"""A run that is branched, goes back and is exported: the same bits as the run that never was."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cluster.run.run_directory import RunDirectory
from tests.e2e.command import JOBS, Ended, events, launcher, rows

SHORT = ("train.epochs=1", "checkpoint.every_steps=10", "checkpoint.keep=9", "tracking.mode=disabled", "--json")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("branches")


@pytest.fixture(scope="module")
def ended(home: Path) -> Ended:
    return launcher("run", JOBS / "digits.yaml", *SHORT, "workers.num=1", cwd=home)


def everything(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_branched_gone_back_and_exported(ended: Ended, home: Path) -> None:
    run, new = home / "runs/digits", home / "runs/branch"
    assert (ended.exit_code, ended.document["step"]) == (0, 22), ended.stderr
    undisturbed, digest = everything(run), ended.document["state_sha256"]

    branched = launcher("resume", run, "--as", "branch", "--at", 10, "workers.num=2", "--json", cwd=home)
    assert branched.exit_code == 0, branched.stderr
    assert (branched.document["status"], branched.document["state_sha256"]) == ("completed", digest)
    assert rows(new) == rows(run), "its curves are whole"
    (event,) = events(new, "branched")
    assert (event["source"], event["step"]) == (str(run), 10)
    assert events(new, "training")[0]["step"] == 10
    assert everything(run) == undisturbed, "the run that is branched is only read"
    assert launcher("resume", run, "--as", "branch", cwd=home).exit_code == 2, "a branch is never overwritten"

    # What the plan refuses costs nothing; only then is anything deleted.
    refused = launcher("resume", run, "--at", 10, "--force", "loss._target_=NoSuchLoss", cwd=home)
    assert (refused.exit_code, everything(run)) == (2, undisturbed), refused.stderr

    back = launcher("resume", run, "--at", 10, "workers.num=2", "--json", cwd=home)
    assert back.exit_code == 0, back.stderr
    assert (back.document["status"], back.document["state_sha256"]) == ("completed", digest)
    assert rows(run) == undisturbed["metrics.jsonl"]
    assert [event["discarded"] for event in events(run, "went_back")] == [[20, 22]]
    assert [event["step"] for event in events(run, "training")] == [0, 10]
    verified = launcher("checkpoints", run, "--verify", "--json", cwd=home).document
    assert [checkpoint["good"] for checkpoint in verified] == [True] * len(verified)
    assert verified[-1]["state_sha256"] == digest

    exported = launcher("export", run, "--to", "out/digits.safetensors", "--json", cwd=home)
    assert exported.exit_code == 0, exported.stderr
    expected = safetensors.torch.load(RunDirectory(str(new)).checkpoints.read(22)[1]["model.safetensors"])
    tensors = safetensors.torch.load_file(home / "out/digits.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].numpy().tobytes() == expected[name].numpy().tobytes() for name in expected)


@pytest.mark.slow
@pytest.mark.usefixtures("ended")
def test_exported_with_its_model(home: Path) -> None:
    exported = launcher("export", "runs/digits", "--to", "digits.onnx", "--json", cwd=home)
    assert exported.exit_code == 0, exported.stderr
    assert 0 <= exported.document["largest_difference"] <= 1e-4
    import onnx  # takes a second

    model = onnx.load(home / "digits.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props}["step"] == "22"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param, "any size of a batch"
    assert json.loads(exported.stdout)["tensors"] > 0


WARMING = """
import torch
from torch import nn


class Model(nn.Module):
    \"\"\"Grows with the steps that it has seen, which no state dict holds.\"\"\"

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen = self.seen + 1
        return self.net(x) * torch.clamp(self.seen / 20, max=1.0)
"""


@pytest.mark.slow
def test_a_buffer_that_no_state_dict_holds_goes_wherever_the_run_goes(tmp_path: Path) -> None:
    (tmp_path / "warming.py").write_text(WARMING)
    model = ("model={_target_: warming.Model}", "train.max_steps=8", "checkpoint.every_steps=4")
    run = launcher("run", JOBS / "digits.yaml", *SHORT[2:], *model, "workers.num=1", cwd=tmp_path)
    assert run.exit_code == 0, run.stderr
    branched = launcher("resume", "runs/digits", "--at", 4, "--as", "branch", "workers.num=2", "--json", cwd=tmp_path)
    assert branched.document["state_sha256"] == run.document["state_sha256"], branched.stderr
    for file in ("a.safetensors", "a.onnx"):
        exported = launcher("export", "runs/branch", "--to", file, "--json", cwd=tmp_path)
        assert exported.exit_code == 0, exported.stderr
    import onnxruntime

    weights = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert weights.keys() == {"net.1.weight", "net.1.bias"}
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: torch.zeros(2, 1, 32, 32).numpy()})
    torch.testing.assert_close(torch.from_numpy(output), (weights["net.1.bias"] * 8 / 20).expand(2, 10))
