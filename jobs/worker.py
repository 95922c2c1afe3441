"""A training process, from the first line to the exit: meet the others, build, restore, train, leave."""

import contextlib
import os
import socket
import time
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torchvision  # noqa: F401  # imported ahead in the fork server, for most jobs use it

from cluster.agent import Task
from cluster.errors import ClusterError, LauncherError, StorageError, TrainingError
from cluster.link import Link
from cluster.network import interface_of
from cluster.run_directory import RunDirectory
from jobs.beginning import begin
from jobs.loop import Loop, Progress
from jobs.parts import Parts, build_parts
from jobs.saver import Saver
from jobs.spec import JobSpec
from jobs.team import Team


def main(link: Link, task: Task) -> None:
    """Runs the job ``task.content`` as one of ``task.world_size`` workers.

    Raises:
        TrainingError: The model, the data or another part of the user's code raised.
        ClusterError: The other workers could not be reached, or were lost.
        CheckpointError, StorageError: The run could not be restored or saved.
    """
    spec: JobSpec = task.content
    device = torch.device("cuda", 0) if task.on_gpu else torch.device("cpu")
    progress = Progress()
    if task.on_gpu:
        torch.cuda.set_device(device)
    try:
        meet(link, task, spec.workers.timeout_s)
        team = Team(
            rank=task.rank,
            world_size=task.world_size,
            shards=spec.train.shards,
            exact=spec.train.exact,
            device=device,
            activity=link.activity,
        )
        train(link, RunDirectory(task.run_url), spec, build_parts(spec, device), progress, team)
    except LauncherError:
        raise
    except Exception as error:  # everything else is the user's code, or a peer that was lost
        if _is_lost_peer(error):
            raise ClusterError(
                f"worker {task.rank}: lost the others at step {progress.step}: {_first_line(error)}"
            ) from error
        raise TrainingError(
            f"worker {task.rank}, step {progress.step + 1}: {type(error).__name__}: {_first_line(error)}",
            _user_traceback(error),
            _place(error, progress.step),
        ) from error


def train(link: Link, run: RunDirectory, spec: JobSpec, parts: Parts, progress: Progress, team: Team) -> None:
    """Restores the newest good checkpoint, if there is one, and trains on from it.

    Collective: every rank.
    """
    if team.rank == 0:
        link.send("environment", torch=str(torch.__version__), device=_device_name(team.device))
    metrics = begin(link, run, parts, progress, team)
    if spec.train.compile:
        parts.model.compile()
    saver = Saver(parts, progress, run.checkpoints, link)

    def tell(kind: str, **content: Any) -> None:
        if team.rank == 0:
            link.send(kind, time=time.time(), spent=link.activity.spent(), **content)

    loop = Loop(
        spec,
        parts,
        progress,
        team,
        metrics=metrics,
        tell=tell,
        save=saver.save if team.rank == 0 else lambda _: None,
        stop_wanted=link.stop_wanted.is_set,
        mark=link.activity.mark,
    )
    link.activity.mark("data", progress.step)
    link.send("started", step=progress.step, spent=link.activity.spent())
    try:
        loop.run()
    except Exception:
        with contextlib.suppress(StorageError):  # the failure at hand is the one to tell
            saver.wait()
        raise
    link.activity.mark("storage", progress.step)
    saver.wait()
    team.barrier()
    link.send("finished", step=progress.step, completed=loop.is_complete, spent=link.activity.spent())
    team.close()


def meet(link: Link, task: Task, timeout_s: float) -> None:
    """Joins the default process group: rank 0 opens the store, and its agent tells the others where.

    Collective: every rank.
    """
    timeout = timedelta(seconds=timeout_s)
    # gloo would otherwise take the interface that the host's name resolves to, which may be none that others reach.
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface_of(task.address)
    if task.rank == 0:
        # The store would listen on every interface; a socket of our own listens on this one.
        listener = socket.create_server((task.host, 0))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            task.host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
        )
        link.send("meeting_place", port=port)
    else:
        host, port = link.wait_for_meeting_place(timeout_s)
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    dist.init_process_group(
        "nccl" if task.on_gpu else "gloo", store=store, rank=task.rank, world_size=task.world_size, timeout=timeout
    )


def _is_lost_peer(error: Exception) -> bool:
    """Whether an exception says that a collective broke because another worker is gone."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "Broken pipe", "Socket Timeout")
    return isinstance(error, (dist.DistError, ConnectionError)) or any(sign in text for sign in signs)


def _user_traceback(error: Exception) -> str:
    """The traceback without the product's own frames at its top."""
    own = os.path.dirname(os.path.abspath(__file__))
    frames = traceback.extract_tb(error.__traceback__)
    while frames and os.path.dirname(frames[0].filename) == own:
        frames.pop(0)
    lines = traceback.format_list(frames) + traceback.format_exception_only(error)
    return "Traceback (most recent call last):\n" + "".join(lines)


def _place(error: Exception, step: int) -> str:
    """Where an exception was raised: once may be bad luck, such as a file that could not be read."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return f"step {step + 1}, {innermost.filename}:{innermost.lineno}, {type(error).__name__}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _first_line(error: Exception) -> str:
    """What a collective or the user's code says first; a stack may follow."""
    return str(error).strip().partition("\n")[0]
