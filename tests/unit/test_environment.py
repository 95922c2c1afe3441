"""What the bits depend on beside the description: as a process tells it, and what is said of differences."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import ClusterError
from jobs import environment
from jobs.components.build import Components
from jobs.environment import Environment, changes, code_digests, make_environment, unlike

HERE = Environment(
    python="3.11",
    torch="2.14.1",
    torchvision="0.29",
    numpy="2.3",
    launcher="a" * 64,
    cuda="13.0, cuDNN 91200",
    gpu="NVIDIA H200",
    cpu="x86_64 GenuineIntel AVX512",
    compiler="none",
    variables="none",
    code=(("mine", "b" * 64), ("parts.blocks", "b" * 64)),
    data="c" * 64,
)
ON_A100 = replace(HERE, gpu="NVIDIA A100")
EDITED = replace(HERE, code=(("mine", "d" * 64), ("parts.blocks", "b" * 64)))
NODES = ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2"]


def differences(nodes: list[str], environments: list[Environment], *planned_data: str) -> str:
    return environment.differences(nodes, [each.as_dict() for each in environments], *planned_data)


def grouped(environments: list[Environment]) -> list[dict[str, Any]]:
    return environment.grouped([each.as_dict() for each in environments])


class TestDifferences:
    def test_there_are_none_between_equals(self) -> None:
        assert differences(NODES, [HERE] * 4, HERE.data) == ""
        assert differences(["127.0.0.1"], [HERE]) == ""

    def test_they_name_their_nodes(self) -> None:
        assert differences(NODES, [HERE, HERE, ON_A100, ON_A100]) == (
            "GPU NVIDIA H200 on node 10.0.0.1 (workers 0, 1), NVIDIA A100 on node 10.0.0.2 (workers 2, 3)"
        )

    def test_on_one_node(self) -> None:
        assert differences(NODES, [HERE, ON_A100, HERE, HERE]) == (
            "GPU NVIDIA H200 on node 10.0.0.1 (worker 0), node 10.0.0.2 (workers 2, 3), "
            "NVIDIA A100 on node 10.0.0.1 (worker 1)"
        )

    def test_of_many_kinds(self) -> None:
        other = replace(EDITED, cpu="aarch64 DEFAULT")
        assert differences(NODES[:3], [HERE, HERE, other]) == (
            "CPU x86_64 GenuineIntel AVX512 on node 10.0.0.1 (workers 0, 1), "
            "aarch64 DEFAULT on node 10.0.0.2 (worker 2); "
            "code of mine bbbbbbbbbbbb on node 10.0.0.1 (workers 0, 1), dddddddddddd on node 10.0.0.2 (worker 2)"
        )

    def test_of_many_modules_are_counted(self) -> None:
        other = replace(HERE, gpu="NVIDIA A100", code=(("mine", "d" * 64), ("parts.blocks", "e" * 64)))
        assert differences(NODES[1:3], [HERE, other]) == (
            "GPU NVIDIA H200 on node 10.0.0.1 (worker 0), NVIDIA A100 on node 10.0.0.2 (worker 1); "
            "code of mine bbbbbbbbbbbb on node 10.0.0.1 (worker 0), dddddddddddd on node 10.0.0.2 (worker 1); "
            "code of 1 more modules"
        )

    def test_a_module_that_not_all_have_imported_is_compared_between_the_others(self) -> None:
        more = (*HERE.code, ("prepare", "e" * 64))
        assert differences(NODES, [HERE, replace(HERE, code=more), HERE, replace(HERE, code=())]) == ""
        assert differences(NODES[:3], [HERE, replace(HERE, code=more), EDITED]).startswith("code of mine bbbbbbbbbbbb")

    def test_from_what_the_plan_found(self) -> None:
        assert differences(NODES[:2], [HERE, HERE], "e" * 64) == (
            "data cccccccccccc on node 10.0.0.1 (workers 0, 1), eeeeeeeeeeee on the driver's host"
        )

    def test_of_many_workers_fit_in_a_line(self) -> None:
        nodes = [f"10.0.0.{rank}" for rank in range(64)]
        line = differences(nodes, [replace(HERE, code=(("mine", f"{rank:064}"),)) for rank in range(64)])
        assert len(line) < 1000
        assert line.endswith("and 56 more")

    @pytest.mark.parametrize("name", Environment.__dataclass_fields__)
    def test_everything_counts(self, name: str) -> None:
        others: dict[str, Any] = {name: (("mine", "other"),) if name == "code" else "other"}
        assert "other on node 10.0.0.2 (worker 2)" in differences(NODES[:3], [HERE, HERE, replace(HERE, **others)])


class TestAttempts:
    def test_equal_workers_are_recorded_once(self) -> None:
        first, second = grouped([HERE, HERE, ON_A100, HERE])
        assert (first["ranks"], second["ranks"]) == ([0, 1, 3], [2])
        assert (first["gpu"], second["gpu"], second["code"]) == ("NVIDIA H200", "NVIDIA A100", dict(HERE.code))

    def test_how_many_there_are_does_not_matter(self) -> None:
        assert changes(grouped([HERE]), grouped([HERE] * 4)) == ""
        assert changes(grouped([HERE, ON_A100]), grouped([ON_A100, ON_A100, HERE])) == ""

    def test_what_has_changed(self) -> None:
        now = replace(EDITED, gpu="NVIDIA A100")
        assert changes(grouped([HERE, HERE]), grouped([now])) == (
            "GPU NVIDIA H200 -> NVIDIA A100; code of mine bbbbbbbbbbbb -> dddddddddddd"
        )
        assert changes(grouped([HERE, ON_A100]), grouped([HERE])) == "GPU NVIDIA A100, NVIDIA H200 -> NVIDIA H200"

    def test_what_was_not_recorded_yet_is_not_compared(self) -> None:
        before = [{"ranks": [0], "torch": "2.14.1"}]
        assert changes(before, grouped([HERE])) == ""
        assert changes(before, grouped([replace(HERE, torch="2.15.0")])) == "torch 2.14.1 -> 2.15.0"

    def test_who_is_unlike_those_before_in_what_workers_differ_in(self) -> None:
        here, edited = grouped([HERE]), replace(ON_A100, code=EDITED.code)
        (other,) = unlike(here, grouped([EDITED, edited]))
        assert other["ranks"] == [1], "the code is the same for all"
        assert unlike(here, grouped([HERE, ON_A100, HERE]))[0]["ranks"] == [1]
        assert unlike(grouped([HERE, ON_A100]), grouped([HERE, ON_A100])) == []
        assert len(unlike(here, grouped([ON_A100, replace(HERE, gpu="NVIDIA H100")]))) == 2
        assert unlike([{"ranks": [0]}], grouped([HERE, ON_A100])) == [], "nothing was recorded"


Imported = Callable[..., dict[str, str]]


class TestCode:
    """The digests of the user's modules."""

    @pytest.fixture
    def imported(self, monkeypatch: pytest.MonkeyPatch) -> Imported:
        def write(folder: Path, modules: dict[str, str], below: str = "", suffix: str = ".py") -> dict[str, str]:
            """The digests, with this folder as the only import path, once the modules in it count as imported."""
            for name, text in modules.items():
                module, file = ModuleType(name), folder / below / f"{name.replace('.', '/')}{suffix}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
                module.__file__ = str(file)
                monkeypatch.setitem(sys.modules, name, module)
            return code_digests([str(folder)])

        return write

    def test_where_it_lies_does_not_matter(self, imported: Imported, tmp_path: Path) -> None:
        modules = {"mine": "x = 1\n", "parts.blocks": "y = 2\n"}
        digests = imported(tmp_path / "here", modules)

        assert [*digests] == [*modules]
        assert imported(tmp_path / "there", modules) == digests

    def test_every_byte_counts(self, imported: Imported, tmp_path: Path) -> None:
        before, after = (imported(tmp_path, {"mine": text}) for text in ("x = 1\n", "x = 2\n"))
        assert before["mine"] != after["mine"]

    def test_what_is_elsewhere_or_installed_or_our_own_does_not_count(self, imported: Imported, tmp_path: Path) -> None:
        home = tmp_path / "home"
        digests = imported(home, {"mine": "x = 1\n"})
        imported(tmp_path / "elsewhere", {"other": ""})

        assert imported(home, {"theirs": ""}, below="venv/lib/python3/site-packages") == digests
        assert imported(home, {"compiled": ""}, suffix=".so") == digests
        assert imported(home, {"jobs.more": "", "launcher.more": ""}) == digests
        assert imported(home, {"theirs": ""}, below="venv") != digests

    def test_a_file_that_has_gone_does_not_count(self, imported: Imported, tmp_path: Path) -> None:
        digests = imported(tmp_path, {"mine": "x = 1\n"})
        imported(tmp_path, {"gone": ""})
        (tmp_path / "gone.py").unlink()

        assert code_digests([str(tmp_path)]) == digests

    def test_without_any_there_is_none(self, tmp_path: Path) -> None:
        assert code_digests([]) == code_digests([str(tmp_path)]) == {}
        assert code_digests([str(Path(os.__file__).parents[1])]) == {}, "the standard library is installed"


def test_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    train = SimpleNamespace(compile=False, exact=True)
    parts: Any = SimpleNamespace(
        spec=SimpleNamespace(train=train), device=torch.device("cpu"), data_fingerprint=lambda: "ab"
    )
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    made = make_environment([], parts)

    assert make_environment([], parts) == made
    assert (made.torch, made.gpu, made.cuda, made.code, made.data) == (torch.__version__, "none", "none", (), "ab")
    assert made.cpu.endswith(torch.backends.cpu.get_cpu_capability())
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert "NVIDIA_TF32_OVERRIDE=1" in make_environment([], parts).variables


class TestVariables:
    def test_the_value_in_effect_counts(self) -> None:
        """Some are read when torch is imported, which the fork server did with an environment of its own."""
        now = {"NVIDIA_TF32_OVERRIDE": "0", "TORCH_BLAS_PREFER_CUBLASLT": "1"}
        at_import = {"NVIDIA_TF32_OVERRIDE": "1", "TORCH_LINALG_PREFER_CUSOLVER": "1", "PATH": "/bin"}

        found = environment._variables(now, at_import, compiles=False)
        assert found == "NVIDIA_TF32_OVERRIDE=0 TORCH_LINALG_PREFER_CUSOLVER=1"
        assert environment._variables({}, {}, compiles=True) == "none"

    def test_those_of_the_compiler_count_if_it_compiles(self) -> None:
        at_import = {
            "TORCHINDUCTOR_MAX_AUTOTUNE": "1", "TORCHINDUCTOR_CACHE_DIR": "/scratch/7",
            "TORCHINDUCTOR_COMPILE_THREADS": "8", "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
        }  # fmt: skip

        assert environment._variables({}, at_import, compiles=True) == "TORCHINDUCTOR_MAX_AUTOTUNE=1"
        assert environment._variables(at_import, {}, compiles=True) == "none"
        assert environment._variables({}, at_import, compiles=False) == "none"


class TestGpus:
    def test_parts_of_one_model_differ(self) -> None:
        whole, part = (
            environment._name_of_gpu(SimpleNamespace(name="NVIDIA H200", multi_processor_count=count))
            for count in (132, 60)
        )
        assert (whole, part) == ("NVIDIA H200, 132 multiprocessors", "NVIDIA H200, 60 multiprocessors")

    def test_nccl_counts_if_it_adds_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 7))
        monkeypatch.setattr(environment, "_cublas_version", lambda: "130101")

        exact, inexact = (environment._libraries_of_gpus(has_nccl_sums=adds_up) for adds_up in (False, True))
        assert re.fullmatch(r"[\w.]+, cuDNN \w+, cuBLAS 130101", exact)
        assert inexact == f"{exact}, NCCL 2.30.7"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiler_of_kernels_on_a_cpu() -> None:
    assert re.search(r"\d+\.\d+", environment._compiler(on_gpu=False))


def test_a_host_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder.config.cpp, "cxx", ("no-such-compiler",))

    with pytest.raises(
        ClusterError, match="^train.compile: No working C\\+\\+ compiler .*; install a C\\+\\+ compiler on"
    ):
        environment._compiler(on_gpu=False)


class Data:
    def __init__(self, targets: Any, classes: Any = ("cat", "dog")) -> None:
        self.targets, self.classes = targets, classes

    def __len__(self) -> int:
        return 3

    def name_classes(self) -> list[str]:
        return ["cat", "dog"]


def fingerprint(train_set: Data, val_set: Data | None = None) -> str:
    parts: Any = SimpleNamespace(train_set=train_set, val_set=val_set)
    return Components.data_fingerprint(parts)


def test_the_data_fingerprint_is_of_what_datasets_say_of_themselves() -> None:
    data = Data([0, 1, 1])
    others = [
        fingerprint(Data([0, 1, 0])), fingerprint(Data([0, 1, 1], ("cat", "cow"))), fingerprint(data, Data([0, 1, 1])),
    ]  # fmt: skip

    assert fingerprint(data) == fingerprint(Data([0, 1, 1]))
    assert fingerprint(data) not in others
    assert len(set(others)) == 3


def test_the_data_fingerprint_is_of_targets_that_numpy_has_no_type_for() -> None:
    rounded = [Data(torch.tensor(targets, dtype=torch.bfloat16)) for targets in ([0.5, 1], [0.5, 2])]
    assert fingerprint(rounded[0]) == fingerprint(rounded[0]) != fingerprint(rounded[1])


def test_the_data_fingerprint_holds_no_address() -> None:
    first, second = (Data([0, 1, 1], Data([]).name_classes) for _ in range(2))
    assert fingerprint(first) == fingerprint(second)
