"""A worker's place on a host: the environment it runs in, its working directory, and the user's code.

A training process takes it, and so does the process of a call, which runs a function once where a worker would run.
"""

import os
import tempfile
from collections.abc import Mapping
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
        task: Its entry is the function, which is called with the task alone; code and directories are a worker's.
        modules: What the fork server imports ahead: what the function needs, and what the training processes need that
            are forked from the same server later.
        resources: What one worker reserves; the call reserves the same where others could take it.
        wait_s: The longest wait for a node with room, however often what was found is lost.
        start_timeout_s: The longest wait for processes to start on the node.
        timeout_s: The longest that the function may take; none: no limit.
    """

    task: "Task"
    modules: tuple[str, ...]
    resources: WorkerResources
    wait_s: float
    start_timeout_s: float
    timeout_s: float | None


def fork_from(server: str | None, modules: tuple[str, ...] | list[str]) -> None:
    """From now on this process forks from the server at an address, or from its own, if there is none.

    Args:
        server: The address.
        modules: What a server of its own imports.
    """
    if server is None:
        fork_server.start(modules)
    else:
        fork_server.use(server, modules)


def take_environment(environment: Mapping[str, str]) -> None:
    """Gives this process, which was forked, the environment of the process that asked for it.

    In that one Ray says which GPU is whose; the fork server may have another.
    """
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # the fork server may have looked for another
    address = fork_server.own_address()
    if address is not None:
        fork_server.use(address)  # so that loader processes come from it too


def take_place(task: "Task") -> "Task":
    """Enters the working directory of a task, and finds the user's code.

    In the process that needs them, and not in its agent: a store that is slow must not silence that one.

    Returns:
        The task with what is known now: the import paths and the working directory on this host.

    Raises:
        OSError: This host lacks the working directory, and the task has no bundle to make a copy from.
        StorageError: The bundle cannot be fetched, or unpacked here.
    """
    if task.code is None:
        os.chdir(task.working_directory)
    else:
        folder = fetch_code(RunDirectory(task.run_url), task.code)
        enter_copy(folder, task.code_directory)
        task = replace(task, import_paths=(str(folder), *task.import_paths), working_directory=os.getcwd())
    search_last(task.import_paths)
    return task


def call_here(call: Call) -> Any:
    """Makes a call on this host, in a process forked from the server that this process forks from.

    Returns:
        What the function returns.

    Raises:
        ChildProcessError: The process died; the message says how.
        TimeoutError: The function took longer than it may.
        ClusterError: This host lacks the working directory.
        StorageError: The user's code cannot be had.
        Exception: What the function raises.
    """
    try:
        return fork_server.call(f"{__name__}:_call", call.task, dict(os.environ), timeout_s=call.timeout_s)
    finally:
        sweep_own_folders()  # its working directory may have been a copy


def _call(task: "Task", environment: Mapping[str, str]) -> Any:
    take_environment(environment)
    be_taken_first()
    try:
        task = take_place(task)
    except OSError as error:
        raise ClusterError(f"the job cannot run on this host: {one_line(error)}", cause="environment") from error
    return fork_server.resolve(task.entry)(task)
