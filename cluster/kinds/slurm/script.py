"""The batch script of a job, and how many nodes it asks for.

Nothing here asks Slurm or touches a file: the same cluster file and request give the same text. The script says itself
why it does what it does; ``cluster/kinds/slurm/node.py`` is the program that it starts on each node.
"""

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from textwrap import indent
from urllib.parse import urlencode

from cluster.capacity import Capacity, NodeGroup, Places, amounts_text
from cluster.errors import ClusterError
from cluster.kinds.slurm import bash
from cluster.kinds.slurm.partition import GONE, NO_ANSWER
from cluster.scheduler import JobRequest
from cluster.spec.slurm import SIGNAL_MARGIN_S, SlurmClusterSpec

_OF_STEPS = "--container-"
"""How the options of Pyxis begin, which are for the steps and not for the job."""
_START_LIMIT_S = 1800
"""How long the script waits for Ray, twice: for its head, and for the nodes that join it. A container may be large."""
_END_LIMIT_S = 20
"""How long it waits for the end of Ray, which takes a second."""
_PATIENCE_S = 300
"""How long it asks a controller that does not answer."""
_SOCKETS = "/tmp"  # noqa: S108
"""Where Ray has its sockets in containers, each of which has a folder of its own there unless it gets the node's."""
_NOT_IN_LOG = '%"\\'
"""Characters that sbatch replaces in the path of a log."""


def node_range(spec: SlurmClusterSpec, places: Places) -> tuple[int, int]:
    """Return the smallest and the largest number of nodes that the workers need.

    Raises:
        ClusterError: Not even one worker fits on a node.
    """
    node = NodeGroup(most=1, resources=spec.nodes.resources)
    per_node = Capacity(nodes=(), limits=None, groups=(node,)).most_on_node(places.resources)
    if per_node == 0:
        raise ClusterError(
            f"a worker needs {places.resources}, and the job takes {amounts_text(spec.nodes.resources)} of each node; "
            "change workers of the job, or nodes of the cluster file"
        )
    return math.ceil(places.least / per_node), math.ceil(places.most / per_node)


def log_path(folder: str, job_id: str) -> str:
    """Return the path of the file to which the script and the driver of a job write."""
    return f"{folder}/{job_id}.log"


def render(spec: SlurmClusterSpec, folder: str, request: JobRequest) -> str:
    """Return the batch script of a job.

    Args:
        spec: The cluster.
        folder: An absolute path that all nodes see; Slurm does not make it.
        request: The job, which says what its workers reserve.

    Raises:
        ClusterError: Not even one worker fits on a node, or Slurm takes no such folder.
    """
    return _text(spec, folder, request, {})


def render_array(spec: SlurmClusterSpec, folder: str, requests: Mapping[int, JobRequest]) -> str:
    """Return the batch script of an array, whose tasks differ in nothing but the run.

    Args:
        spec, folder: See ``render``.
        requests: The jobs by the numbers of their tasks.

    Raises:
        ClusterError: See ``render``.
    """
    return _text(spec, folder, next(iter(requests.values())), requests)


def array_name(requests: Mapping[int, JobRequest]) -> str:
    """Return the name of an array, which each of its tasks has until it gets its own."""
    return f"array-{next(iter(requests.values())).id}"


def comment_of(request: JobRequest) -> str:
    """Return the metadata of a job as its comment in Slurm."""
    return urlencode(request.metadata)


def _text(spec: SlurmClusterSpec, folder: str, request: JobRequest, tasks: Mapping[int, JobRequest]) -> str:
    assert request.places is not None, "the number of nodes depends on the workers"
    if found := [character for character in _NOT_IN_LOG if character in folder]:
        raise ClusterError(
            f"folder: must not have {found[0]}, which Slurm replaces in the path of a log, got {folder!r}"
        )
    least, most = node_range(spec, request.places)
    return "".join(_Script(spec, folder, request, tasks, least, most).parts())


@dataclass(frozen=True, slots=True)
class _Script:
    """A script and its parts. For the attributes see ``render`` and ``node_range``."""

    spec: SlurmClusterSpec
    folder: str
    request: JobRequest
    """The job, or one of the array."""
    tasks: Mapping[int, JobRequest]
    """The jobs of an array by the numbers of its tasks; empty: it is no array."""
    least: int
    most: int

    def parts(self) -> Iterator[str]:
        """The text, without the parts that this cluster and this job do not need."""
        spec = self.spec
        yield "#!/bin/bash -l\n"
        yield from (f"#SBATCH {option}\n" for option in self._options())
        environment = "".join(f"{line}\n" for line in self._environment())
        yield bash.BEGIN.substitute(folder=self.folder, environment=environment)
        if self._variables:
            yield bash.VARIABLES.substitute(names=" ".join(self._variables))
        yield bash.SLURM.substitute(job_id=self._job_id, patience_s=_PATIENCE_S)
        if self.tasks:
            yield bash.TASK.substitute(tasks=self._cases(self._name), folder=shlex.quote(self.folder))
        own = self._files
        yield bash.ABOUT_JOB.substitute(notice_s=self._notice_s)
        if spec.max_requeues:
            yield bash.MAY_REQUEUE.substitute(max_requeues=spec.max_requeues)
        yield bash.OWN.substitute(own=own, limit_s=_END_LIMIT_S)
        if spec.max_requeues:
            yield bash.REQUEUE.substitute(
                exclude=shlex.quote(spec.exclude or ""),
                partition=shlex.quote(spec.partition),
                gone="|".join(sorted(GONE)),
                no_answer=re.escape(NO_ANSWER),
                least=self.least,
                like="%c/%m/%G" + "/%f" * (spec.constraint is not None),
            )
        else:
            yield bash.NOT_STARTED
        yield bash.RAY.substitute(
            python=bash.PYTHON if self._is_of_launcher else "",
            srun=self._srun(),
            program=self._program(),
            limit_s=_START_LIMIT_S,
            log=own,
            least=self.least,
        )
        yield bash.DRIVER.substitute(driver=self._driver(), tell=self._tell(), cancel=self._cancel())
        if spec.max_requeues:
            yield bash.GO_ON
        yield 'exit "$code"\n'

    @property
    def _is_range(self) -> bool:
        return self.least < self.most

    @property
    def _outlives_nodes(self) -> bool:
        """Whether the job goes on without a node that is lost, and does not start again.

        Its nodes must then ask Slurm whether the script still lives, and containers have no ``scontrol``.
        """
        return self._is_range and self.spec.container_image is None

    @property
    def _notice_s(self) -> int:
        """How long before its time limit the job is told of it."""
        return self.request.stop_grace_s + SIGNAL_MARGIN_S

    @property
    def _job_id(self) -> str:
        """The job as Slurm's commands take it: one task has the number of the array, which to them means all tasks."""
        return '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if self.tasks else "$SLURM_JOB_ID"

    @property
    def _variables(self) -> list[str]:
        return list(dict.fromkeys([*self.request.variables, *self.spec.env]))

    @property
    def _files(self) -> str:
        """How the paths of the job's files begin, as bash reads it."""
        if self.tasks:
            return f'{shlex.quote(self.folder)}/"$name"'
        return shlex.quote(f"{self.folder}/{self.request.id}")

    @staticmethod
    def _name(task: JobRequest) -> str:
        return f"name={task.id} comment={shlex.quote(comment_of(task))}"

    def _cases(self, line: Callable[[JobRequest], str]) -> str:
        """Return the lines of a ``case`` with one line of bash for each task."""
        return "\n".join(f"    {number}) {line(task)} ;;" for number, task in self.tasks.items())

    @property
    def _gpus(self) -> str:
        """The GPUs of a node as a generic resource, which all of Slurm's schedulers know."""
        nodes = self.spec.nodes
        return ":".join(["gpu", *([nodes.gpu_type] if nodes.gpu_type else []), str(nodes.gpus)])

    def _options(self) -> Iterator[str]:
        """The options of sbatch."""
        spec, request = self.spec, self.request
        if self.tasks:
            limit = "" if spec.array_limit is None else f"%{spec.array_limit}"
            yield f"--job-name={array_name(self.tasks)}"
            yield f"--array={','.join(map(str, self.tasks))}{limit}"
        else:
            yield f"--job-name={request.id}"
            yield f"--comment={comment_of(request)}"
        yield f"--partition={spec.partition}"
        for name in ("account", "qos", "constraint", "reservation", "exclude"):
            if value := getattr(spec, name):
                yield f"--{name}={value}"
        # The tasks of an array have one name until they start, and need not wait for each other.
        if dependencies := [*([] if self.tasks else ["singleton"]), *([spec.dependency] if spec.dependency else [])]:
            yield f"--dependency={','.join(dependencies)}"
        # Each node has one task, without --ntasks-per-node=1, with which Slurm takes as few nodes of a range as it can.
        yield f"--nodes={self.least}-{self.most}" if self._is_range else f"--nodes={self.least}"
        yield f"--cpus-per-task={spec.nodes.cpus}"
        if spec.nodes.gpus:
            yield f"--gres={self._gpus}"
        if spec.nodes.memory_gb:
            yield f"--mem={spec.nodes.memory_gb}G"
        if spec.time:
            yield f"--time={spec.time}"
        yield f"--signal=B:USR1@{self._notice_s}"
        yield "--requeue" if spec.max_requeues else "--no-requeue"
        if self._outlives_nodes:
            yield "--no-kill"
        yield f"--export={','.join(self._variables) or 'NIL'}"
        yield "--open-mode=append"
        yield f"--output={shlex.quote(log_path(self.folder, '%x' if self.tasks else request.id))}"
        yield from (option for option in spec.options if not option.startswith(_OF_STEPS))

    def _environment(self) -> Iterator[str]:
        """The lines that set variables, the user's first."""
        yield from self.spec.prologue
        if self.spec.venv is not None and self.spec.container_image is None:
            yield f"export PATH={shlex.quote(self.spec.venv)}/bin:$PATH"
        for name, value in self.request.environment.items():
            yield f"export {name}={shlex.quote(value)}"

    def _srun(self) -> str:
        """The options of the step that runs Ray."""
        gpus = [f"--gres={self._gpus}"] if self.spec.nodes.gpus else []
        cores = f"--cpus-per-task={self.spec.nodes.cpus}"
        lines = [
            ['--overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1', cores, *gpus],
            ["--input=all --wait=0 --kill-on-bad-exit=0", *(["--no-kill"] if self._outlives_nodes else [])],
            ["--open-mode=append", f"--error={self._files}.%N.log"],
        ]
        if self.spec.container_image is not None:
            lines.append([*self._container()])
        return " \\\n    ".join(" ".join(line) for line in lines)

    def _container(self) -> Iterator[str]:
        """The options of each step in a container.

        It is given the folder of the job, and the node's /tmp, where the driver finds the sockets of Ray.
        """
        yield f"--container-image={shlex.quote(self.spec.container_image or '')}"
        mounts = "--container-mounts="
        options = [option for option in self.spec.options if option.startswith(_OF_STEPS)]
        of_user = [shlex.quote(option.removeprefix(mounts)) for option in options if option.startswith(mounts)]
        yield mounts + ",".join(['"$own"', _SOCKETS, *of_user])
        yield from (shlex.quote(option) for option in options if not option.startswith(mounts))

    def _program(self) -> str:
        """The command line of each node."""
        nodes = self.spec.nodes
        venv = self._venv_in_container
        python = "python" if venv is None else shlex.quote(f"{venv}/bin/python")
        if self._is_of_launcher:
            python = '"${python:-python}"'
        words = [python, f"-P -m cluster.kinds.slurm.node --cpus={nodes.cpus} --gpus={nodes.gpus}"]
        if self.spec.container_image is not None:
            words.insert(0, f"env TMPDIR={_SOCKETS}")
        else:
            words.append("--script=$$")  # in a container, the driver hears of a SIGTERM itself
        if self._outlives_nodes:
            words.append('--job="$job_id" --first="$SLURMD_NODENAME"')
        return " ".join(words)

    @property
    def _venv_in_container(self) -> str | None:
        return self.spec.venv if self.spec.container_image is not None else None

    @property
    def _is_of_launcher(self) -> bool:
        """Whether the Python of the nodes is that of the ``launcher`` on the PATH."""
        return self.spec.venv is None and self.spec.container_image is None

    def _driver(self) -> str:
        """The command of the driver."""
        command = self.request.command
        if self.tasks:
            command = f"case $SLURM_ARRAY_TASK_ID in\n{self._cases(lambda task: task.command)}\nesac"
        if self.spec.container_image is None:
            return f"(\n{indent(command, ' ' * 4)}\n)"
        venv = self._venv_in_container
        process = 'echo $$ > "$0"; '
        path = "" if venv is None else f"export PATH={shlex.quote(f'{venv}/bin')}:$PATH; "
        return (
            'srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" '
            f"--cpus-per-task={self.spec.nodes.cpus} \\\n    {' '.join(self._container())} \\\n"
            f'    bash -c {shlex.quote(process + path + command)} "$own/driver"'
        )

    def _tell(self) -> str:
        """What sends the driver a signal; in a container it is no child of the shell, but writes its number."""
        process = "$driver" if self.spec.container_image is None else '$(cat "$own/driver" 2>/dev/null)'
        return bash.TELL.substitute(process=process).strip()

    def _cancel(self) -> str:
        """What to do on SIGTERM."""
        tell = bash.TELL_WHY if self.spec.max_requeues else "    tell USR1"
        return bash.CANCEL.substitute(grace_s=self.request.stop_grace_s, tell=tell).strip()
