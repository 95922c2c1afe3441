"""A transform for runs that shall not end before something has happened to them from outside."""

import time
from pathlib import Path
from typing import Any

from torchvision.transforms.v2 import RandomCrop

_SECONDS = 0.06


class Brake(RandomCrop):
    """The crop of ``jobs/digits.yaml``, for the same bits; takes its time as long as there is a file."""

    def __init__(self, size: int, padding: int, path: str) -> None:
        super().__init__(size, padding)
        self._path = Path(path)

    def forward(self, *inputs: Any) -> Any:
        if self._path.exists():
            time.sleep(_SECONDS)
        return super().forward(*inputs)
