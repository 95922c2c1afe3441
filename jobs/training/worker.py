"""The training process of one worker: join the process group, build, compare environments, restore, train.

``main`` is its entry. Every exception leaves it as a ``LauncherError`` that names its cause.
"""

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torchvision  # noqa: F401  # the fork server imports it ahead, because most jobs use it

from cluster.collectives.groups import open_default_group
from cluster.errors import ClusterError, DescriptionError, LauncherError
from cluster.host.interfaces import choose_interface
from cluster.process.agent_link import AgentLink
from cluster.process.data_messages import DataDelayed
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
from jobs.checkpoint.loop_state import LoopState
from jobs.checkpoint.saver import Saver
from jobs.components.build import Components, build_parts, worker_device
from jobs.data.store_reports import report_to
from jobs.environment import differences, grouped, make_environment
from jobs.images.data_stores import patience_below, use_patience
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from jobs.parallel.worker_team import Team
from jobs.spec import JobSpec
from jobs.training.failure_causes import (
    cause_of,
    cause_of_broken_exchange,
    gpu_error_of,
    message_of,
    sticky_error,
    to_launcher_error,
)
from jobs.training.loop import Loop
from jobs.training.restore import restore_newest

_ANSWER_WAIT_S = 2.0
"""How long rank 0 keeps the store open for the other ranks to read why they are refused."""

launcher_digest()  # digests the code that runs now, because its files may be replaced later


def main(link: AgentLink, task: Task) -> None:
    """Runs the job ``task.content`` as one of ``task.world_size`` workers.

    Raises:
        TrainingError: The model, the data or other code of the user failed.
        ClusterError: The other workers could not be reached or were lost, or this host is not fit for the job.
        CheckpointError: The run could not be restored or saved.
        StorageError: The store of the run or that of the data does not answer.

    Collective: every rank.
    """
    spec: JobSpec = task.content
    use_patience(patience_below(spec.workers.hang_timeout_s))
    report_to(lambda reason: link.send(DataDelayed(reason=reason)))
    device = worker_device(on_gpu=task.on_gpu)
    team, state = join_team(link, task, device), LoopState()
    try:
        run = RunDirectory(Store(task.run_url, spec.checkpoint.patience_s))
        use_index_files(IndexFiles(run, task.indexes))
        components = build_parts(spec, device)
        compare_environments(link, task, components, team)
        train(link, run, spec, components, state, team)
    except DescriptionError as error:  # the plan built the same on its host, so this host differs
        if gpu_error_of(error) is not None:
            raise to_launcher_error(error, 0) from error
        raise ClusterError(str(error), cause="environment", step=0) from error
    except LauncherError:
        raise
    except (Exception, SystemExit) as error:  # the border of the process: the user's code failed or a peer was lost
        raise to_launcher_error(error, state.step) from error


def join_team(link: AgentLink, task: Task, device: torch.device) -> Team:
    """Meets the other workers and opens all process groups, before any code of the user runs.

    Raises:
        ClusterError: The other workers have different versions, or could not be reached.
        TrainingError: This host or its GPU lacks memory.

    Collective: every rank.
    """
    spec: JobSpec = task.content
    link.activity.begin_exchange()  # to tell a worker that waits from one that never comes
    try:
        meet(link, task, spec.workers.timeout_s)
        team = Team(
            rank=task.rank,
            world_size=task.world_size,
            shards=spec.train.shards,
            exact=spec.train.exact,
            device=device,
            address=task.address,
            bucket_mb=spec.train.bucket_mb,
            timeout_s=spec.workers.timeout_s,
            activity=link.activity,
        )
    except (OSError, RuntimeError, MemoryError) as error:
        if cause_of(error) not in ("code", "exchange_timeout", "connection_lost"):  # the GPU has no memory, for example
            raise to_launcher_error(error, step=0) from error
        raise ClusterError(
            f"did not meet the others: {message_of(error)}", cause=cause_of_broken_exchange(error), step=0
        ) from error
    link.activity.end_exchange()
    return team


def train(
    link: AgentLink, run: RunDirectory, spec: JobSpec, components: Components, state: LoopState, team: Team
) -> None:
    """Restores the newest good checkpoint, if there is one, and trains from there.

    Raises:
        TrainingError: A loss is not finite, or targets are ignored that the description does not mention.
        CheckpointError, StorageError: The run could not be restored or saved.

    Collective: every rank.
    """
    restored = restore_newest(link, run, components, state, team)
    if spec.train.compile:
        components.model.compile()
    saver = Saver(components, state, run.checkpoints, link, team, restored)

    def log(row: Mapping[str, float]) -> None:
        if team.rank == 0:
            link.send(RowLogged(row=row, time=time.time(), spent=link.activity.spent()))

    def tell(message: StepEvent | MatrixMeasured) -> None:
        if team.rank == 0:
            link.send(message)

    loop = Loop(
        spec,
        components,
        state,
        team,
        metrics={} if restored is None else restored.metrics,
        log=log,
        tell=tell,
        save=saver.save,
        stop_wanted=link.stop_wanted.is_set,
        mark=link.activity.mark,
        after_step=saver.start_waiting,
        tell_own=link.send,
    )
    link.activity.mark("data", state.step)
    link.send(TrainingStarted(step=state.step, spent=link.activity.spent()))
    try:
        loop.run()
    except Exception:
        # After a kernel has failed, NCCL's watchdog aborts this process within moments: the report must come first.
        if not sticky_error():
            with contextlib.suppress(Exception):  # the first failure is the one to report
                saver.wait()
        raise
    team.barrier()
    team.close()  # a slow store delays no other worker from here on
    link.activity.mark("storage", state.step)
    saver.wait()
    link.send(Finished(step=state.step, completed=loop.is_complete, spent=link.activity.spent()))


def meet(link: AgentLink, task: Task, timeout_s: float) -> None:
    """Joins the default process group; rank 0 opens its store, and the agents pass the store's address on.

    Raises:
        ClusterError: The workers have different versions.
        OSError, RuntimeError: Another worker did not join within ``timeout_s`` seconds.

    Collective: every rank.
    """
    timeout = timedelta(seconds=timeout_s)
    choose_interface(task.address)
    if task.rank == 0:
        # A TCPStore listens on every interface; our own socket listens on that of task.host alone.
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
    open_default_group(store, rank=task.rank, world_size=task.world_size, on_gpu=task.on_gpu, timeout_s=timeout_s)


def compare_versions(link: AgentLink, task: Task, store: dist.Store) -> None:
    """Refuses workers with different versions, because they may not understand each other's messages.

    Raises:
        ClusterError: The versions differ; every rank raises the same error.

    Collective: every rank.
    """
    store.set(f"versions of {task.rank}", json.dumps((task.address, versions())))
    if task.rank == 0:
        by_rank = [json.loads(store.get(f"versions of {rank}")) for rank in range(task.world_size)]
        nodes, versions_by_rank = [node for node, _ in by_rank], [each for _, each in by_rank]
        found = differences(nodes, versions_by_rank)
        if found:
            link.send(EnvironmentsCompared(workers=grouped(versions_by_rank), differences=found, is_refused=True))
        store.set("differences", json.dumps(found))
    found = json.loads(store.get("differences"))
    if found:
        store.set(f"read by {task.rank}", "yes")
        if task.rank == 0:  # the store ends with this process
            with contextlib.suppress(RuntimeError):  # a rank that has ended needs no answer
                store.wait([f"read by {rank}" for rank in range(task.world_size)], timedelta(seconds=_ANSWER_WAIT_S))
        raise ClusterError(f"workers differ: {found}; give every node the same versions", cause="environment")


def compare_environments(link: AgentLink, task: Task, components: Components, team: Team) -> None:
    """Reports the workers' environments to the driver, and refuses workers whose results may differ.

    ``task.may_differ`` admits other versions and hardware, never other data.

    Raises:
        ClusterError: The environments differ, or the data is not what the plan found; every rank raises the same error.

    Collective: every rank, once it has built its components.
    """
    by_rank = team.gather((task.address, make_environment(task.import_paths, components).as_dict()))
    nodes, environments = [node for node, _ in by_rank], [environment for _, environment in by_rank]
    found = differences(nodes, environments, task.data_fingerprint)
    data = {environment["data"] for environment in environments}
    has_other_data = len(data | {task.data_fingerprint or environments[0]["data"]}) > 1
    is_refused = has_other_data or (found != "" and not task.may_differ)
    if team.rank == 0:
        compared: list[dict[str, Any]] = environments
        if is_refused and task.may_differ:  # the data alone is refused, so name the workers that differ in it
            compared = [{"data": environment["data"]} for environment in environments]
        text = differences(nodes, compared, task.data_fingerprint)
        link.send(EnvironmentsCompared(workers=grouped(compared), differences=text, is_refused=is_refused))
    if has_other_data:  # --force accepts other bits, but not other samples
        raise ClusterError(f"workers differ: {found}; give every node the same data", cause="environment")
    if is_refused:
        has_other_gpus = len({environment["gpu"] for environment in environments}) > 1
        raise ClusterError(
            f"workers differ: {found}; {'choose one kind of GPU with workers.accelerator, or ' * has_other_gpus}"
            f"accept other bits with launcher resume {task.run_url} --force",
            cause="environment",
        )
