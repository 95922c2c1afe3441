"""What training costs on a GPU: ``python -m tests.benchmarks.gpu``; ``--device cpu`` runs the same script tiny.

ResNet-50 on images of ImageNet's shape, 256 a step, which no disk has to read. Eight parts:

- step: our step beside a first script (fp32, NCHW, ``.item()`` in every step, else torch's defaults) and beside a loop
  that is tuned by hand (bf16, channels_last, fused SGD, prefetching, deterministic kernels, as ours).
- exactness, determinism, cudnn, compile: what ``train.exact``, ``train.shards``, ``train.deterministic``,
  ``train.cudnn_benchmark`` and ``train.compile`` cost or give.
- loader: what a step takes longer if loader processes decode its images, by their number.
- saver: how long a save blocks the loop, how fast it is written, how long a restore takes.
- memory: the peak beside what ``launcher plan`` says.

Arms of a part take turns in blocks of steps, in another order in every round, and the clock is read when the GPU has
done all of a block. Reported are medians and quartiles over blocks, and ratios of blocks of the same round; an arm
"again" (A/A) shows what of a difference is noise. Each part runs in a process of its own with a share of ``--minutes``;
it measures for as long, and is killed if it hangs. A part that fails is reported, and the next goes on; then the exit
code is 1. ``--json FILE`` receives all figures, also while parts are still to come.

It needs torch, torchvision, numpy, pillow, fsspec, psutil, pydantic, omegaconf and safetensors, 16 GB of memory for
loader processes, and a compiler for ``train.compile``. Ray and W&B are not imported, and nothing needs a network.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_END_S = 5.0
"""How long the process of a part may take to end."""
_GRACE_S = 20.0
"""What a part may take beyond twice its time: it measures a few rounds in any case, and imports torch first."""


def _work(name: str, device: str, deadline: float, results: Connection) -> None:
    """The process of a part; the clock is that of the whole machine."""
    from tests.benchmarks.gpu_parts import run_part

    try:
        results.send((run_part(name, device, deadline), ""))
    except Exception:  # the next part goes on
        results.send((None, traceback.format_exc()))


def _run(name: str, device: str, seconds: float, limit: float) -> tuple[Any, str]:
    """Runs a part for some seconds, within a limit; returns its figures, or why there are none."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, device, time.monotonic() + 0.9 * seconds, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            return None, f"not done after {limit:.0f} s"
        figures, error = ours.recv()
        process.join(_END_S)
        return figures, error
    except EOFError:
        process.join()
        return None, f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _machine(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "shared_memory_gib": round(shutil.disk_usage("/dev/shm").total / 2**30, 1),  # loaders send batches through it
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--parts", help="names with commas between them; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the file for all figures")
    chosen = parser.parse_args(arguments)
    end = time.monotonic() + 60 * chosen.minutes

    import torch

    from tests.benchmarks.gpu_parts import PARTS

    names = list(PARTS) if chosen.parts is None else chosen.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU; --device cpu runs the same script without one")
    document: dict[str, Any] = {"machine": _machine(chosen.device), "parts": {}, "failed": {}}
    print(json.dumps(document["machine"]), flush=True)
    for number, name in enumerate(names):
        began = time.monotonic()
        shares = [PARTS[other][1] for other in names[number:]]
        seconds = max(0.0, end - began) * shares[0] / sum(shares)
        print(f"\n== {name}, {seconds:.0f} s", flush=True)
        figures, error = _run(name, chosen.device, seconds, min(max(0.0, end - began), 2 * seconds + _GRACE_S))
        if figures is None:
            document["failed"][name] = error
            print(f"{name} failed: {error.strip().splitlines()[-1]}", flush=True)
        else:
            document["parts"][name] = figures | {"seconds": round(time.monotonic() - began, 1)}
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(document, indent=1))
    print(f"\nfailed: {', '.join(document['failed']) or 'nothing'}")
    return 1 if document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
