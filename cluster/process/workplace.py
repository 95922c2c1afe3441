"""A worker's place on a host: environment variables, working directory and the user's code.

A training process takes this place, and so does the process of a ``Call``, which runs a function once where a worker
would run.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster.capacity import WorkerResources
from cluster.errors import ClusterError, one_line
from cluster.host.import_paths import search_last
from cluster.host.oom import be_taken_first
from cluster.host.scratch import sweep_own_folders
from cluster.process import fork_server
from cluster.process.code_cache import enter_copy, fetch_code
from cluster.run.run_directory import RunDirectory

if TYPE_CHECKING:
    from cluster.process.orders import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A function to call once in the place of one worker.

    Attributes:
        task: Its entry is the function, called with the task alone; code and directories are those of a worker.
        modules: What the fork server preloads: modules that the function needs, and those of the training processes
            that are forked from the same server later.
        resources: What one worker reserves; on a shared cluster, the call reserves the same.
        wait_s: Time limit for finding a node with room, over all tries together.
        start_timeout_s: Time limit for the start of processes on the node.
        timeout_s: Time limit for the function, from what it told last; None: no limit.
    """

    task: "Task"
    modules: tuple[str, ...]
    resources: WorkerResources
    wait_s: float
    start_timeout_s: float
    timeout_s: float | None


def fork_from(server: str | None, modules: tuple[str, ...] | list[str]) -> None:
    """Fork from the given server from now on.

    Args:
        server: The address of the server; None: this process starts its own.
        modules: What a server of this process preloads.
    """
    if server is None:
        fork_server.start(modules)
    else:
        fork_server.use(server, modules)


def fork_from_own_server() -> None:
    """Fork from the server that this process was forked from, for example loader processes."""
    address = fork_server.own_address()
    if address is not None:
        fork_server.use(address)


def take_place(task: "Task") -> "Task":
    """Change to the working directory of a task and make the user's code importable.

    The process that needs them calls this, and not its agent, because a slow store must not delay the agent's
    heartbeats.

    Returns:
        The task with the import paths and the working directory on this host.

    Raises:
        OSError: This host lacks the working directory, and the task has no bundle to copy it from.
        StorageError: The bundle cannot be fetched or unpacked here.
    """
    if task.code is None:
        os.chdir(task.working_directory)
    else:
        folder = fetch_code(RunDirectory(task.run_url), task.code)
        enter_copy(folder, task.code_directory)
        task = replace(task, import_paths=(str(folder), *task.import_paths), working_directory=os.getcwd())
    search_last(task.import_paths)
    return task


def call_here(call: Call, tell: Callable[[str], None] = lambda _: None) -> Any:
    """Make a call on this host, in a forked process, and return what the function returns.

    Args:
        call: The function, and what it needs.
        tell: Receives what the function tells, see ``fork_server.tell_caller``.

    Raises:
        ChildProcessError: The process died; the message says how.
        TimeoutError: The function exceeded its time limit.
        ClusterError: This host lacks the working directory.
        StorageError: The user's code cannot be fetched or unpacked here.
        LauncherError: What the function raises, see ``fork_server.call``.
    """
    try:
        return fork_server.call(f"{__name__}:_call", call.task, timeout_s=call.timeout_s, tell=tell)
    finally:
        sweep_own_folders()  # such as its working directory, if that was a copy


def _call(task: "Task") -> Any:
    fork_from_own_server()
    be_taken_first()
    try:
        task = take_place(task)
    except OSError as error:
        raise ClusterError(f"the job cannot run on this host: {one_line(error)}", cause="environment") from error
    return fork_server.resolve(task.entry)(task)
