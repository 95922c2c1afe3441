"""A training process, from the first line to the exit: meet the others, build, restore, train, leave."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import torchvision  # noqa: F401  # imported ahead in the fork server, for most jobs use it

from cluster.errors import ClusterError, DescriptionError, LauncherError, StorageError
from cluster.host.interfaces import interface_of
from cluster.process.agent_link import AgentLink
from cluster.process.messages import (
    EnvironmentsCompared,
    Finished,
    MatrixMeasured,
    MeetingPlace,
    RowLogged,
    StepEvent,
    TrainingStarted,
)
from cluster.process.orders import Task
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from cluster.versions import launcher_digest, versions
from jobs.build.components import Components, build_parts, worker_device
from jobs.checkpoint.loop_state import LoopState
from jobs.checkpoint.saver import Saver
from jobs.environment import differences, grouped, make_environment
from jobs.parallel.worker_team import Team
from jobs.spec import JobSpec
from jobs.training.failure_causes import broken_exchange, named, what
from jobs.training.loop import Loop
from jobs.training.restore import begin

_ANSWER_WAIT_S = 2.0

launcher_digest()  # of the code that runs: its files may be replaced later


def main(link: AgentLink, task: Task) -> None:
    """Runs the job ``task.content`` as one of ``task.world_size`` workers.

    Raises:
        TrainingError: The model, the data or another part of the user's code failed.
        ClusterError: The other workers could not be reached, or were lost; or this host is not fit for the job.
        CheckpointError, StorageError: The run could not be restored or saved.
    """
    spec: JobSpec = task.content
    device = worker_device(on_gpu=task.on_gpu)
    progress = LoopState()
    try:
        meet(link, task, spec.workers.timeout_s)
    except (OSError, RuntimeError) as error:  # none of the user's code has run
        raise ClusterError(f"did not meet the others: {what(error)}", cause=broken_exchange(error), step=0) from error
    try:
        team = Team(
            rank=task.rank,
            world_size=task.world_size,
            shards=spec.train.shards,
            exact=spec.train.exact,
            device=device,
            timeout_s=spec.workers.timeout_s,
            activity=link.activity,
        )
        parts = build_parts(spec, device)
        compare_environments(link, task, parts, team)
        train(link, RunDirectory(Store(task.run_url, spec.checkpoint.patience_s)), spec, parts, progress, team)
    except DescriptionError as error:  # the plan has built the same, on its host
        raise ClusterError(str(error), cause="environment", step=0) from error
    except LauncherError:
        raise
    except (Exception, SystemExit) as error:  # everything else is the user's code, or a peer that was lost
        raise named(error, progress.step) from error


def train(
    link: AgentLink, run: RunDirectory, spec: JobSpec, parts: Components, progress: LoopState, team: Team
) -> None:
    """Restores the newest good checkpoint, if there is one, and trains on from it.

    Collective: every rank.
    """
    restored = begin(link, run, parts, progress, team)
    if spec.train.compile:
        parts.model.compile()
    saver = Saver(parts, progress, run.checkpoints, link, team, restored)

    def log(row: Mapping[str, float]) -> None:
        if team.rank == 0:
            link.send(RowLogged(row=row, time=time.time(), spent=link.activity.spent()))

    def tell(message: StepEvent | MatrixMeasured) -> None:
        if team.rank == 0:
            link.send(message)

    loop = Loop(
        spec,
        parts,
        progress,
        team,
        metrics={} if restored is None else restored.metrics,
        log=log,
        tell=tell,
        save=saver.save,
        stop_wanted=link.stop_wanted.is_set,
        mark=link.activity.mark,
        tend=saver.tend,
    )
    link.activity.mark("data", progress.step)
    link.send(TrainingStarted(step=progress.step, spent=link.activity.spent()))
    try:
        loop.run()
    except Exception:
        with contextlib.suppress(StorageError):  # the failure at hand is the one to tell
            saver.wait()
        raise
    team.barrier()
    team.close()  # from here on a slow store makes nobody wait for another
    link.activity.mark("storage", progress.step)
    saver.wait()
    link.send(Finished(step=progress.step, completed=loop.is_complete, spent=link.activity.spent()))


def meet(link: AgentLink, task: Task, timeout_s: float) -> None:
    """Joins the default process group: rank 0 opens the store, and its agent tells the others where.

    Collective: every rank.

    Raises:
        ClusterError: Their versions differ.
        OSError, RuntimeError: The others did not come in time, or not at all.
    """
    timeout = timedelta(seconds=timeout_s)
    choose_interface(task.address)
    if task.rank == 0:
        # The store would listen on every interface; a socket of our own listens on this one.
        listener = socket.create_server((task.host, 0))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            task.host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
        )
        link.send(MeetingPlace(port=port))
    else:
        place = link.wait_for_meeting_place(timeout_s)
        store = dist.TCPStore(place.host, place.port, is_master=False, timeout=timeout)
    compare_versions(link, task, store)
    dist.init_process_group(
        "nccl" if task.on_gpu else "gloo", store=store, rank=task.rank, world_size=task.world_size, timeout=timeout
    )


def choose_interface(address: str) -> None:
    """Has gloo and NCCL talk over the interface that has this host's address in the cluster, unless the user chose one.

    gloo would otherwise take the one that the host's name resolves to, which may be none that others reach.

    Raises:
        OSError: No interface has the address.
    """
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if not os.environ.get(name):
            os.environ[name] = interface_of(address)


def compare_versions(link: AgentLink, task: Task, store: dist.Store) -> None:
    """Refuses workers of different versions, which may not even understand what the others send.

    Collective: every rank.

    Raises:
        ClusterError: They differ; the same on every rank.
    """
    store.set(f"versions of {task.rank}", json.dumps((task.address, versions())))
    if task.rank == 0:
        told = [json.loads(store.get(f"versions of {rank}")) for rank in range(task.world_size)]
        nodes, of_workers = [node for node, _ in told], [each for _, each in told]
        found = differences(nodes, of_workers)
        if found:
            link.send(EnvironmentsCompared(workers=grouped(of_workers), differences=found, is_refused=True))
        store.set("differences", json.dumps(found))
    found = json.loads(store.get("differences"))
    if found:
        store.set(f"read by {task.rank}", "yes")
        if task.rank == 0:  # with which the store ends
            with contextlib.suppress(RuntimeError):  # one that has ended needs no answer
                store.wait([f"read by {rank}" for rank in range(task.world_size)], timedelta(seconds=_ANSWER_WAIT_S))
        raise ClusterError(f"workers differ: {found}; give every node the same versions", cause="environment")


def compare_environments(link: AgentLink, task: Task, parts: Components, team: Team) -> None:
    """Tells the driver of what the bits depend on beside the description, and refuses workers that differ in that.

    Collective: every rank, once it has built its parts.

    Raises:
        ClusterError: They differ, or their data is not what the plan found; the same on every rank.
    """
    told = team.gather((task.address, make_environment(task.import_paths, parts).as_dict()))
    nodes, environments = [node for node, _ in told], [environment for _, environment in told]
    found = differences(nodes, environments, task.data_fingerprint)
    data = {environment["data"] for environment in environments}
    has_other_data = len(data | {task.data_fingerprint or environments[0]["data"]}) > 1
    is_refused = has_other_data or (found != "" and not task.may_differ)
    if team.rank == 0:
        compared: list[dict[str, Any]] = environments
        if is_refused and task.may_differ:  # then only its data tells who is in the way
            compared = [{"data": environment["data"]} for environment in environments]
        what = differences(nodes, compared, task.data_fingerprint)
        link.send(EnvironmentsCompared(workers=grouped(compared), differences=what, is_refused=is_refused))
    if has_other_data:  # no other bits, but other samples
        raise ClusterError(f"workers differ: {found}; give every node the same data", cause="environment")
    if is_refused:
        has_other_gpus = len({environment["gpu"] for environment in environments}) > 1
        raise ClusterError(
            f"workers differ: {found}; {'choose one kind of GPU with workers.accelerator, or ' * has_other_gpus}"
            f"accept other bits with launcher resume {task.run_url} --force",
            cause="environment",
        )
