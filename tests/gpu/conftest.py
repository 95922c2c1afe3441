"""What the GPU tier runs on: ``pytest -m gpu``, and ``--gpu-device cpu`` to try the tests themselves without a GPU."""

import pytest
import torch


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device of every worker. Without it, every test of the tier is skipped."""
    device = torch.device(pytestconfig.getoption("--gpu-device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU here; --gpu-device cpu tries the tests without one")
    return device


@pytest.fixture(scope="session")
def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@pytest.fixture(scope="session")
def num_devices(on_gpu: bool) -> int:
    """How many workers can have a device of their own; as many as any test wants, if that is the CPU."""
    return torch.cuda.device_count() if on_gpu else 4
