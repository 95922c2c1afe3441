"""The batch script of a job, and how many nodes it asks for.

Nothing here asks Slurm or touches a file: the same cluster file and request give the same text. The script says itself
why it does what it does; ``cluster/kinds/slurm/node.py`` is the program that it starts on each node.
"""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from string import Template
from urllib.parse import urlencode

from cluster.capacity import Capacity, NodeGroup, Places, amounts_text
from cluster.errors import ClusterError
from cluster.scheduler import JobRequest
from cluster.spec.slurm import SIGNAL_MARGIN_S, SlurmClusterSpec

_OF_STEPS = "--container-"
"""How the options of Pyxis begin, which are for the steps and not for the job."""
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
    assert request.places is not None, "the number of nodes depends on the workers"
    if found := [character for character in _NOT_IN_LOG if character in folder]:
        raise ClusterError(
            f"folder: must not have {found[0]}, which Slurm replaces in the path of a log, got {folder!r}"
        )
    least, most = node_range(spec, request.places)
    return "".join(_Script(spec, folder, request, least, most).parts())


class _Text(Template):
    """A part of the script, in which ``@name`` is replaced."""

    delimiter = "@"


_BEGIN = _Text(r"""
# Starts Ray on each node of the job and drives a run from the first. The folder of the log must be there before.

unset SLURM_EXPORT_ENV    # with it, srun would pass on no more than --export names, and no PATH
@environment
set -u
""")

_VARIABLES = _Text(r"""
for name in @names; do
    [ -n "$(printenv "$name")" ] && continue
    echo "$name: must be set and exported, where sbatch is called or by the login shell" >&2
    exit 5
done
""")

_OWN = _Text(r"""
# What only this job needs, where all of its nodes see it: the token of its Ray, and what its nodes report.
own=@own.$SLURM_JOB_ID
rm -rf "$own"
mkdir -m 700 "$own" || exit 5
(umask 077; head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$own/token")
""")

_CLEAN_UP = r"""
nodes=
clean_up() {
    trap '' TERM USR1
    exec 9>&-    # Ray ends
    for ((i = 0; i < 200; i++)); do kill -0 "$nodes" 2>/dev/null || break; sleep 0.1; done
    kill -KILL "$nodes" 2>/dev/null
    rm -rf "$own"
}
trap clean_up EXIT
trap : USR1
trap 'exit 143' TERM
"""

_RAY = _Text(r"""
# Ray on each node. It ends, with all that it has started, when the pipe is closed, however this script ends.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$own/token
touch "$own/reports"
exec 9> >(exec srun @srun \
    @program >> "$own/reports")
nodes=$!

await_reports() {
    for ((i = 0; i < @limit_s * 10; i++)); do
        [ "$(wc -l < "$own/reports")" -lt "$1" ] && kill -0 "$nodes" 2>/dev/null || break
        sleep 0.1
    done
}
await_reports 1    # of its head, whose port is a free one
RAY_ADDRESS=$(sed -n 's/^head \(.*:\)/\1/p' "$own/reports")
[ -n "$RAY_ADDRESS" ] || { echo "Ray did not start: see @log" >&2; exit 5; }
export RAY_ADDRESS
echo "$RAY_ADDRESS" >&9
await_reports $((1 + SLURM_JOB_NUM_NODES))
""")

_LIMIT = r"""
# The driver saves before the time limit.
job=$(scontrol show job --oneliner "$SLURM_JOB_ID")
field() { [[ $job =~ \ $1=([^ ]*) ]] && echo "${BASH_REMATCH[1]}"; }
LAUNCHER_JOB_ENDS_AT=${SLURM_JOB_END_TIME:-$(date -d "$(field EndTime || echo unknown)" +%s 2>/dev/null)}
export LAUNCHER_JOB_ENDS_AT LAUNCHER_JOB_LOST_NODES=$own/lost
"""

_MAY_REQUEUE = _Text(r"""
if [ "${SLURM_RESTART_COUNT:-0}" -ge @max_requeues ]; then
    echo "This job has been requeued $SLURM_RESTART_COUNT times; it is the last."
elif [ "$(field Requeue)" != 1 ]; then
    echo "Slurm does not let this job requeue itself."
else
    export LAUNCHER_JOB_REQUEUES=1
fi
""")

_DRIVER = _Text(r"""
# The driver. It must not hold the pipe.
@driver 9>&- &
driver=$!@tell
cancelled=
trap tell USR1                   # the time limit is near
trap 'cancelled=1; tell' TERM    # scancel; or preemption, after which Slurm requeues the job itself
while kill -0 "$driver" 2>/dev/null; do wait "$driver"; done
wait "$driver"
code=$?
""")

_TELL = r"""
tell() {    # to save and end; a Python that does not handle SIGUSR1 yet would die of it
    until grep -q '^SigCgt:.*[2367abef]..$' "/proc/$driver/status" 2>/dev/null; do
        kill -0 "$driver" 2>/dev/null || return
        sleep 0.1
    done
    kill -USR1 "$driver"
}"""

_TELL_STEP = r"""
tell() { scancel --signal=USR1 "$SLURM_JOB_ID.1"; }    # to save and end"""

_REQUEUE = r"""
if [ "$code" = 75 ] && [ -z "$cancelled" ] && [ -n "${LAUNCHER_JOB_REQUEUES:-}" ]; then    # saved, and to go on
    excluded=$(field ExcNodeList)
    excluded=${excluded#(null)}
    for address in $(sort -u "$own/lost" 2>/dev/null); do
        node=$(sed -n "s/ $address\$//p" "$own/reports")
        excluded+=${node:+${excluded:+,}$node}
    done
    clean_up    # before it: with it, Slurm sends SIGTERM to all
    for ((i = 0; i < 5; i++)); do scontrol requeue "$SLURM_JOB_ID" && break; sleep 5; done
    # Only now, between its requeue and the end of this script, may a job exclude nodes from its next try.
    [ -z "$excluded" ] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded"
fi
"""


@dataclass(frozen=True, slots=True)
class _Script:
    """A script and its parts. For the attributes see ``render`` and ``node_range``."""

    spec: SlurmClusterSpec
    folder: str
    request: JobRequest
    least: int
    most: int

    def parts(self) -> Iterator[str]:
        spec = self.spec
        yield "#!/bin/bash -l\n"
        yield from (f"#SBATCH {option}\n" for option in self._options())
        yield _BEGIN.substitute(environment="\n".join(self._environment()))
        if self._variables:
            yield _VARIABLES.substitute(names=" ".join(self._variables))
        yield _OWN.substitute(own=shlex.quote(f"{self.folder}/{self.request.id}"))
        yield _CLEAN_UP
        yield _RAY.substitute(
            srun=" ".join(self._srun()), program=self._program(), limit_s=120, log=shlex.quote(self._node_log)
        )
        yield _LIMIT
        if spec.max_requeues:
            yield _MAY_REQUEUE.substitute(max_requeues=spec.max_requeues)
        yield _DRIVER.substitute(driver=self._driver(), tell=_TELL if spec.container_image is None else _TELL_STEP)
        if spec.max_requeues:
            yield _REQUEUE
        yield 'exit "$code"\n'

    @property
    def _is_elastic(self) -> bool:
        return self.least < self.most

    @property
    def _variables(self) -> list[str]:
        return list(dict.fromkeys([*self.request.variables, *self.spec.env]))

    @property
    def _node_log(self) -> str:
        return f"{self.folder}/{self.request.id}.%N.log"

    @property
    def _gpus(self) -> str:
        nodes = self.spec.nodes
        return f"{nodes.gpu_type}:{nodes.gpus}" if nodes.gpu_type else str(nodes.gpus)

    def _options(self) -> Iterator[str]:
        """The options of sbatch."""
        spec, request = self.spec, self.request
        yield f"--job-name={request.id}"
        yield f"--comment={urlencode(request.metadata)}"
        yield f"--partition={spec.partition}"
        for name in ("account", "qos", "constraint", "reservation", "exclude"):
            if value := getattr(spec, name):
                yield f"--{name}={value}"
        yield f"--dependency={','.join(['singleton', *([spec.dependency] if spec.dependency else [])])}"
        yield f"--nodes={self.least}-{self.most}" if self._is_elastic else f"--nodes={self.least}"
        yield "--ntasks-per-node=1"
        yield f"--cpus-per-task={spec.nodes.cpus}"
        if spec.nodes.gpus:
            yield f"--gpus-per-node={self._gpus}"
        if spec.nodes.memory_gb:
            yield f"--mem={spec.nodes.memory_gb}G"
        if spec.time:
            yield f"--time={spec.time}"
        yield f"--signal=B:USR1@{request.stop_grace_s + SIGNAL_MARGIN_S}"
        yield "--requeue" if spec.max_requeues else "--no-requeue"
        if self._is_elastic:
            yield "--no-kill"
        yield f"--export={','.join(self._variables) or 'NIL'}"
        yield "--open-mode=append"
        yield f"--output={shlex.quote(log_path(self.folder, request.id))}"
        yield from (option for option in spec.options if not option.startswith(_OF_STEPS))

    def _environment(self) -> Iterator[str]:
        """The lines that set variables, the user's first."""
        yield from self.spec.prologue
        if self.spec.venv is not None and self.spec.container_image is None:
            yield f"export PATH={shlex.quote(self.spec.venv)}/bin:$PATH"
        for name, value in self.request.environment.items():
            yield f"export {name}={shlex.quote(value)}"

    def _srun(self) -> Iterator[str]:
        """The options of the step that runs Ray."""
        yield '--overlap --input=all --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
        yield f"--cpus-per-task={self.spec.nodes.cpus}"
        if self.spec.nodes.gpus:
            yield f"--gpus-per-node={self._gpus}"
        if self._is_elastic:
            yield "--no-kill"
        yield "--kill-on-bad-exit=0 --wait=0 \\\n    --open-mode=append"
        yield f"--error={shlex.quote(self._node_log)}"
        yield from self._container()

    def _container(self) -> Iterator[str]:
        """The options of each step in a container."""
        if self.spec.container_image is None:
            return
        yield f"--container-image={shlex.quote(self.spec.container_image)}"
        own = [option for option in self.spec.options if option.startswith(_OF_STEPS)]
        mounts = "--container-mounts="
        of_user = "".join(f",{option.removeprefix(mounts)}" for option in own if option.startswith(mounts))
        yield f'{mounts}"$own"{shlex.quote(of_user) if of_user else ""}'
        yield from (option for option in own if not option.startswith(mounts))

    def _program(self) -> str:
        """The command line of each node."""
        nodes = self.spec.nodes
        venv = self._venv_in_container
        python = "python" if venv is None else shlex.quote(f"{venv}/bin/python")
        return f"{python} -P -m cluster.kinds.slurm.node --cpus={nodes.cpus} --gpus={nodes.gpus}"

    @property
    def _venv_in_container(self) -> str | None:
        return self.spec.venv if self.spec.container_image is not None else None

    def _driver(self) -> str:
        if self.spec.container_image is None:
            return f"(\n    {self.request.command}\n)"
        venv = self._venv_in_container
        path = "" if venv is None else f"export PATH={shlex.quote(f'{venv}/bin')}:$PATH; "
        where = '--nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME"'
        return (
            f"srun --overlap {where} --cpus-per-task={self.spec.nodes.cpus} {' '.join(self._container())} \\\n"
            f"    bash -c {shlex.quote(path + self.request.command)}"
        )
