"""What decoding an image comes to where memory is short."""

import io
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.images.decoding import BadSample, decode_image

_MIB = 2**20


def encoded(kind: str, size: int, **options: Any) -> bytes:
    rows, columns = np.mgrid[0:size, 0:size]
    pixels = np.stack([columns % 251, rows % 241, (rows + columns) % 239], -1).astype("uint8")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def outcomes(path: str) -> set[str]:
    """Decodes an image in this process with more and more memory, until there is enough."""
    content, found = Path(path).read_bytes(), set[str]()
    decode_image(encoded("JPEG", 8), "")  # what is loaded for the first image
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for more in range(8, 1000, 8):
        resource.setrlimit(resource.RLIMIT_AS, (used + more * _MIB, resource.RLIM_INFINITY))
        try:
            decode_image(content, "large")
            return found
        except Exception as error:
            found.add(f"{type(error).__name__}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    raise AssertionError("it is never decoded")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"progressive": True}),
        ("WEBP", {"quality": 50, "method": 0}),
        ("WEBP", {"lossless": True, "quality": 0, "method": 0}),
    ],
    ids=["progressive JPEG", "WebP", "lossless WebP"],
)
def test_a_good_image_is_not_bad_for_lack_of_memory(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    path = tmp_path / "large"
    path.write_bytes(encoded(kind, 2500, **options))
    code = f"import test_decoding; print(*test_decoding.outcomes({str(path)!r}), sep=chr(10))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "MemoryError: large: too little memory to decode it; give the process more, or remove the file"
    ]


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exact": True, "icc_profile": b"0" * 128}])
def test_a_damaged_webp_is_bad(options: dict[str, Any]) -> None:
    """Its header, of each of the three kinds, says how large it is."""
    content = encoded("WEBP", 64, **options)
    with pytest.raises(BadSample, match=r"^half: cannot be decoded, .*; repair or remove the file$"):
        decode_image(content[: len(content) // 2], "half")


def test_an_image_whose_header_asks_for_more_than_any_host_has_is_bad() -> None:
    content = bytearray(encoded("WEBP", 64, icc_profile=b"0" * 128))
    assert content[12:16] == b"VP8X"
    content[24:30] = b"\xff" * 6
    with pytest.raises(BadSample, match="^huge: cannot be decoded"):
        decode_image(bytes(content), "huge")
