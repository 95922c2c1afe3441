"""How fast a checkpoint goes up to S3: ``python -m tests.benchmarks.upload``.

A real S3 server on this machine, and before it a proxy that hands on each request 20 ms late, for all arms alike. What
goes up is one state of 100 MB, a ResNet-18 with 3,300 classes under SGD with momentum, and the small files beside it.
On few cores the server is the bottleneck: it wants a second of processor time for 100 MB, whoever sends them. So all is
done a second time through connections that carry 20 MB/s each, as those to a store far away carry less than the host.

*launcher*: two worker processes, each with a ``jobs.checkpoint.saver.Saver``, save at the same moment, as in a run. The
clock runs from the first one's call of ``save`` to the manifest, which this process commits as the driver does, once it
has heard of both shares: copying, hashing, uploading, and the messages in between. All tensors and small files change
between two saves, so that each writes all of its bytes, which is checked. *frozen*: the same save after only the last
layer has changed, which leaves the rest where it is.

*stock*: Ray Train's copy path, in one process, for Ray uploads what rank 0 reports. ``ray.train.report`` calls
``StorageContext.persist_current_checkpoint`` with the checkpoint's local folder, and so does this benchmark, without a
cluster: on the file system that a user would give as ``RunConfig(storage_filesystem=...)``, s3fs in pyarrow's wrapper.
The folder holds ``state.pt``, written with ``torch.save``, and our small files. The clock runs in that call alone:
neither the serialising before it counts, nor the wait for the controller and its snapshot file after it, without which
the checkpoint does not exist.

The arms take turns in another order in every round. In the end all that lies in the store is read back and compared.
Reported: medians with quartiles, and n; ratios are of the saves of the same round. The last line is JSON.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.benchmarks.arms import Quartiles, join_team
from tests.stores import Proxy, s3_server

_JOB = """
name: upload
model: {_target_: torchvision.models.resnet18, num_classes: 3300}
data:
  train: {_target_: jobs.data.synthetic_images, length: 16, num_classes: 3300, image_size: 32}
loss: {_target_: CrossEntropyLoss}
optimizer: {_target_: SGD, lr: 0.01, momentum: 0.9}
train: {global_batch: 16, shards: 2}
"""
_WORKERS = 2
_LATENCY_S = 0.02
_RATES_MB_PER_S = {"": None, "_far": 20.0}
"""Of one connection."""
_WARM_UP = 1


def _parts() -> Any:
    """What a worker trains with, after one step: the optimizer has its state too."""
    import torch

    from jobs.components.build import build_parts
    from launcher.config.description import parse

    torch.set_num_threads(1)
    parts = build_parts(parse(_JOB, "upload.yaml").spec, torch.device("cpu"))
    for parameter in parts.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    parts.optimizer.step()
    return parts


def _work(rank: int, folder: str, url: str, orders: Connection, messages: Connection) -> None:
    """One worker: for each order, a step number and which tensors change before it, a save of the real kind."""
    import torch

    from cluster.process.activity import Activity
    from cluster.process.agent_link import AgentLink
    from cluster.run.run_directory import RunDirectory
    from jobs.checkpoint.loop_state import LoopState
    from jobs.checkpoint.saver import Saver
    from jobs.parallel.worker_team import Team

    join_team(rank, _WORKERS, folder)
    team = Team(rank=rank, world_size=_WORKERS, shards=_WORKERS, exact=True, device=torch.device("cpu"))
    parts, progress, link = _parts(), LoopState(), AgentLink(messages, Activity())
    saver = Saver(parts, progress, RunDirectory(url).checkpoints, link, team, None)
    for progress.step, prefix in iter(orders.recv, None):
        parts.optimizer.param_groups[0]["lr"] = 1 / progress.step
        with torch.no_grad():
            for name, tensor in parts.model.state_dict().items():
                if name.startswith(prefix):
                    tensor.add_(1)
            for name, parameter in parts.model.named_parameters():
                if name.startswith(prefix):
                    parts.optimizer.state[parameter]["momentum_buffer"].add_(1)
        team.barrier()
        orders.send(time.monotonic())
        saver.save({}, is_needed=True)
        saver.wait()
    team.close()


@contextmanager
def _saver(folder: str, url: str) -> Iterator[Callable[[str], float]]:
    """Workers, and a function that has them save and commits the checkpoint; it returns the seconds that it took.

    Its argument is what the names of the tensors begin with that change before.
    """
    from cluster.process.messages import ShareWritten
    from cluster.run.manifest import join
    from cluster.run.run_directory import RunDirectory

    context, checkpoints, step = multiprocessing.get_context("spawn"), RunDirectory(url).checkpoints, 0
    workers, orders, messages = [], [], []
    for rank in range(_WORKERS):
        order, theirs = context.Pipe()
        message, their_messages = context.Pipe()
        workers.append(context.Process(target=_work, args=(rank, folder, url, theirs, their_messages), daemon=True))
        workers[-1].start()
        theirs.close()
        their_messages.close()
        orders.append(order)
        messages.append(message)

    def save(prefix: str) -> float:
        nonlocal step
        step += 1
        for order in orders:
            order.send((step, prefix))
        began, shares = min(order.recv() for order in orders), []
        while len(shares) < _WORKERS:
            for message in wait(messages):
                shares += [told.share for told in message.recv() if isinstance(told, ShareWritten)]
        manifest = join(shares)
        checkpoints.commit(manifest)
        seconds = time.monotonic() - began
        num_new = sum(name.startswith(f"step-{step:08d}/") for name in manifest.objects())
        assert prefix or num_new == len(manifest.objects()), "something was not written again"
        list(checkpoints.retain(step, 1))
        return seconds

    yield save
    for order in orders:
        order.send(None)
    for worker in workers:
        worker.join()
    checkpoints.verify(checkpoints.manifest(step))


def _copy(folder: Path, orders: Connection) -> None:
    """Ray's copy of a local folder, for each order; the answer is the seconds that it took."""
    import logging

    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import Checkpoint
    from ray.train.v2._internal.execution.storage import StorageContext
    from s3fs import S3FileSystem

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    s3 = S3FileSystem(use_listings_cache=False)
    storage = StorageContext("runs/stock", "run", storage_filesystem=PyFileSystem(FSSpecHandler(s3)))
    checkpoint, path = Checkpoint.from_directory(folder), ""
    for number in iter(orders.recv, None):
        old = path
        began = time.monotonic()
        path = storage.persist_current_checkpoint(checkpoint, f"checkpoint_{number}").path
        orders.send(time.monotonic() - began)
        if old:
            s3.rm(old, recursive=True)
    for file in folder.iterdir():
        there = hashlib.sha256(s3.cat_file(f"{path}/{file.name}")).digest()
        assert there == hashlib.sha256(file.read_bytes()).digest(), f"{path}/{file.name} has other bytes"


@contextmanager
def _copier(folder: Path) -> Iterator[Callable[[], float]]:
    """A process, and a function that has it copy the checkpoint as Ray does; it returns the seconds that it took."""
    context = multiprocessing.get_context("spawn")
    orders, theirs = context.Pipe()
    process = context.Process(target=_copy, args=(folder, theirs), daemon=True)
    process.start()
    theirs.close()
    number = 0

    def copy() -> float:
        nonlocal number
        number += 1
        orders.send(number)
        return orders.recv()

    yield copy
    orders.send(None)
    process.join()
    assert process.exitcode == 0, "what Ray has copied is not what was given to it"


def _write_folder(folder: Path) -> int:
    """The local checkpoint that Ray is given; returns its bytes."""
    import torch

    from tests.states import encode

    parts = _parts()
    folder.mkdir()
    for file, data in encode({**parts.state(), "progress": {"step": 1}}).items():
        if file.endswith(".json"):
            (folder / file).write_bytes(data)
    torch.save(parts.state(), folder / "state.pt")
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12, help="saves of each arm, at each rate")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    document: dict[str, Any] = {"n": arguments.rounds, "workers": _WORKERS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="launcher-benchmark-")))
        document["bytes"] = _write_folder(folder / "stock")
        server = stack.enter_context(s3_server(folder / "server"))
        proxy = stack.enter_context(Proxy(server.port, _LATENCY_S))
        os.environ |= server.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        save = stack.enter_context(_saver(str(folder), f"s3://{server.bucket}/launcher"))
        copy = stack.enter_context(_copier(folder / "stock"))
        arms: dict[str, Callable[[], float]] = {
            "launcher": lambda: save(""),
            "frozen": lambda: save("fc."),
            "stock": copy,
        }
        print(f"{document['bytes'] / 1e6:.1f} MB, each request {1000 * _LATENCY_S:.0f} ms late, n = {arguments.rounds}")
        for where, rate in _RATES_MB_PER_S.items():
            proxy.bytes_per_s = rate and rate * 1e6
            print(f"connections carry {rate:g} MB/s" if rate else "connections carry what they can")
            rounds = [_take_turns(arms, number) for number in range(-_WARM_UP, arguments.rounds)][_WARM_UP:]
            for arm in arms:
                seconds = Quartiles.of([own[arm] for own in rounds])
                ratio = Quartiles.of([own[arm] / own["launcher"] for own in rounds])
                print(f"  {arm:9} {seconds:.2f} s, {ratio:.2f} times as long as launcher")
                document[f"{arm}{where}_s"] = round(seconds.median, 3)
                document[f"{arm}{where}_ratio"] = [round(each, 3) for each in (ratio.low, ratio.median, ratio.high)]
    print(json.dumps(document))


def _take_turns(arms: dict[str, Callable[[], float]], number: int) -> dict[str, float]:
    """The seconds of each arm, in an order of this round's own."""
    return {arm: arms[arm]() for arm in random.Random(number).sample(list(arms), len(arms))}


if __name__ == "__main__":
    main()
