#!/bin/bash -l
#SBATCH --job-name=digits-0a1b2c3d4e5f-0
#SBATCH --comment=run=s3%3A%2F%2Fbucket%2Fruns%2Fdigits&submission=1-2-3
#SBATCH --partition=main
#SBATCH --dependency=singleton
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:USR1@360
#SBATCH --requeue
#SBATCH --export=AWS_ACCESS_KEY_ID,WANDB_API_KEY,AWS_SECRET_ACCESS_KEY
#SBATCH --open-mode=append
#SBATCH --output=/home/me/.launcher/slurm/digits-0a1b2c3d4e5f-0.log

# Starts Ray on each node of the job, and drives a run from the first. To submit it by hand, make the folder
# /home/me/.launcher/slurm first.

told=''
trap told=1 USR1    # the time limit is near, and there is no driver yet
trap : USR2    # a preemption begins; there is nothing to save yet
# What srun would take for its options: of an allocation in which sbatch was called, or, with --export, no PATH.
unset ${!SLURM_CPU_BIND*} ${!SLURM_MEM_BIND*} ${!SLURM_MEM_PER_*} ${!SLURM_GPU*} ${!SLURM_NTASKS*} SLURM_NPROCS \
    SLURM_DISTRIBUTION SLURM_THREADS_PER_CORE SLURM_HINT SLURM_GRES ${!SLURM_TRES_*} SLURM_EXPORT_ENV
module load cuda/12.4
conda activate launcher
export LAUNCHER_NOTE='two words'
set +eu +o pipefail    # which what comes before may have set

for name in AWS_ACCESS_KEY_ID WANDB_API_KEY AWS_SECRET_ACCESS_KEY; do
    if [ -z "$(printenv "$name")" ]; then
        echo "$name: must be set and exported, where sbatch is called or by the login shell" >&2
        exit 5
    fi
done

job_id=$SLURM_JOB_ID

# Runs a command of Slurm's until it succeeds: its controller may not answer for minutes, while another takes its place.
patiently() {
    local limit=$((SECONDS + 300))
    until "$@"; do
        [ "$SECONDS" -lt "$limit" ] || return
        sleep 5
    done
}

# What Slurm knows of this job, with times as `date` reads them; and a field of it.
show() { SLURM_TIME_FORMAT=standard scontrol show job --oneliner "$job_id"; }
field() { [[ $job =~ \ $1=([^ ]*) ]] && echo "${BASH_REMATCH[1]}"; }

# When the job reaches its time limit, before which the driver saves; empty: never.
job=$(patiently show)
# Of the job in which sbatch was called, it may be more.
[ "${SLURM_RESTART_COUNT:-0}" -le "$(field Restarts || echo 999999)" ] || export SLURM_RESTART_COUNT=0
LAUNCHER_JOB_ENDS_AT=${SLURM_JOB_END_TIME:-$(date -d "$(field EndTime || echo unknown)" +%s 2>/dev/null)}
export LAUNCHER_JOB_ENDS_AT
export LAUNCHER_JOB_NOTICE_S=360    # how long before that the script sends SIGUSR1
export LAUNCHER_JOB_ID=$SLURM_JOB_ID    # the same in each try

# Whether this script can start again, so that the driver may end with 75: saved, and to go on.
if [ "${SLURM_RESTART_COUNT:-0}" -ge 100 ]; then
    echo "This job does not requeue itself any more: it has been requeued $SLURM_RESTART_COUNT times." >&2
    patiently scontrol update JobId="$job_id" Requeue=0    # nor does Slurm
elif [ -z "$job" ]; then
    echo "This job does not requeue itself: Slurm's controller does not answer." >&2
elif [ "$(field Requeue)" != 1 ]; then
    echo "This job does not requeue itself: Slurm does not let it." >&2
else
    export LAUNCHER_JOB_REQUEUES=1
fi

# What only this try needs, where all of its nodes see it: the token of its Ray, and reports. A try whose node was lost
# has left its own; that node may come back.
own=/home/me/.launcher/slurm/digits-0a1b2c3d4e5f-0.$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
rm -rf /home/me/.launcher/slurm/digits-0a1b2c3d4e5f-0."$SLURM_JOB_ID"-*
mkdir -m 700 "$own" || exit 5
(umask 077; head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$own/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$own/token LAUNCHER_JOB_LOST_NODES=$own/lost
# A line for each try, of those in a row up to this one, in which Ray did not start.
failed_starts=/home/me/.launcher/slurm/digits-0a1b2c3d4e5f-0.$SLURM_JOB_ID.failed-starts

nodes=''
clean_up() {
    trap '' TERM USR1 USR2
    exec 9>&-    # Ray ends on all nodes
    local limit=$((SECONDS + 20))
    while kill -0 "$nodes" 2>/dev/null && [ "$SECONDS" -lt "$limit" ]; do sleep 0.1; done
    kill -KILL "$nodes" 2>/dev/null
    nodes=''    # another process may get the number
    rm -rf "$own"
}
trap clean_up EXIT
trap 'exit 143' TERM

# Whether this job is over for good: Slurm has ended it, and not to start it again itself nor because of the time limit;
# or somebody wants it not to start again, as `launcher stop` does.
is_over() {
    [ "$(field Requeue)" = 0 ] && return 0    # in a trap, return alone means something else
    [[ $(field JobState) =~ ^(COMPLETING|CANCELLED|PREEMPTED)$ ]] && [ "$(field Reason)" != TimeLimit ] &&
        [ "$(field Restarts)" = "${SLURM_RESTART_COUNT:-0}" ]
}

# Has Slurm start this script again without the nodes that are named, and ends; does nothing if that may not be.
requeue_without() {
    [ -n "${LAUNCHER_JOB_REQUEUES:-}" ] || return
    clean_up    # first, because Slurm sends SIGTERM to all when it requeues
    patiently requeue || { echo "This job does not start again: scontrol requeue fails." >&2; return; }
    exclude "$(IFS=,; echo "$*")"
    exit 75
}
requeue() {
    job=$(show) || return
    ! is_over || exit 75    # somebody has cancelled it
    [ "$(field Restarts)" != "${SLURM_RESTART_COUNT:-0}" ] || scontrol requeue "$job_id"
}

# Slurm lets a job exclude nodes from its next try only between the requeue and the end of this one.
exclude() {
    local before excluded
    before=$(field ExcNodeList)
    before=${before#(null)}
    # If all make too few nodes left: only the new ones, or none, and always those of the cluster file.
    for excluded in "$(join "$before" "$1")" "$(join '' "$1")" ''; do
        leaves_enough "$excluded" && break
    done
    [ "$excluded" = "$before" ] || patiently scontrol update JobId="$job_id" ExcNodeList="$excluded"
}
join() { echo "$1${2:+${1:+,}$2}"; }
leaves_enough() {
    local nodes
    nodes=$(sinfo --noheader --Node --partition=main --format='%N %T %c/%m/%G') && [ "$nodes" ] || return 0
    # Those that get jobs and are like the nodes of this job; others may lack what it asks for.
    nodes=$(awk -v own="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')" '
        BEGIN { split(own, names); for (i in names) is_own[names[i]] = 1 }
        { hardware[$1] = $3 }
        is_own[$1] { is_like[$3] = 1 }
        tolower($2) !~ /^(down|drained|draining|error|fail|failing|future|inval|unknown)|\*/ { gets_jobs[$1] = 1 }
        END { for (name in gets_jobs) if (is_like[hardware[name]]) print name }' <<< "$nodes")
    [ "$(grep -vxFf <([ -z "$1" ] || scontrol show hostnames "$1") <<< "$nodes" | grep -c .)" -ge 1 ]
}

# Ends a try because Ray has not started on the nodes that are named, or not in time. The next try does without them;
# after three such tries in a row there is none.
not_started() {
    echo >> "$failed_starts"
    [ "$(wc -l < "$failed_starts")" -ge 3 ] || requeue_without "$@"
    rm -f "$failed_starts"
    exit 5
}

# Ray on each node. It ends, with all that it has started, when the pipe is closed, however this script ends.
touch "$own/reports" "$own/srun"
# The first line of `launcher` names its Python; the one on the PATH may be another.
python=$(sed -n '1s/^#!\(.*\/python[^ ]*\)$/\1/p' "$(command -v launcher)" 2>/dev/null)
exec 9> >(exec srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=8 \
    --input=all --wait=0 --kill-on-bad-exit=0 \
    --open-mode=append --error=/home/me/.launcher/slurm/digits-0a1b2c3d4e5f-0.%N.log \
    "${python:-python}" -P -m cluster.kinds.slurm.node --cpus=8 --gpus=0 --script=$$ \
    >> "$own/reports" 2> >(trap '' TERM; exec tee "$own/srun" >&2))
nodes=$!

# What the nodes have reported; a prologue or a container may print too.
reports() { sed -n "s/^ray-$1 //p" "$own/reports"; }
await() {
    local limit=$((SECONDS + 1800))
    while [ "$(reports "$1" | wc -l)" -lt "$2" ] && [ "$SECONDS" -lt "$limit" ] && kill -0 "$nodes" 2>/dev/null; do
        [ -z "$told" ] || { echo 'The time limit is near, and Ray has not started on all nodes.' >&2; return; }
        sleep 0.1
    done
}
await head 1    # by the first node: where its head listens, or that it has failed
RAY_ADDRESS=$(reports head | grep :)
if [ -z "$RAY_ADDRESS" ]; then
    echo "Ray did not start on $SLURMD_NODENAME; see" /home/me/.launcher/slurm/digits-0a1b2c3d4e5f-0."$SLURMD_NODENAME".log >&2
    [ -z "$(reports head)" ] || not_started "$SLURMD_NODENAME"
    [ -z "$told" ] || not_started
    ! kill -0 "$nodes" 2>/dev/null || not_started "$SLURMD_NODENAME"    # others wait for it
    sleep 1    # tee writes what srun has said: a node on which Slurm could not start the program ends it on all
    failed=$(sed -n 's/^srun: error: .* failed on node \([^ :]*\).*/\1/p' "$own/srun" | sort -u)
    [ -n "$failed" ] || ! grep -q 'Exited with exit code' "$own/srun" || exit 5    # its environment is wrong, on all
    not_started $failed
fi
export RAY_ADDRESS
echo "$RAY_ADDRESS" >&9
await node "$SLURM_JOB_NUM_NODES"    # by each node: that it has joined, or has failed
joined=$(reports node | sed '/ failed$/d; s/ .*//')
if [ "$(wc -w <<< "$joined")" -lt 1 ]; then
    missing=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "$joined")
    echo "Ray did not start on" $missing"; see" /home/me/.launcher/slurm/digits-0a1b2c3d4e5f-0.NODE.log >&2
    not_started $missing
fi
rm -f "$failed_starts"

# The driver, which must not hold the pipe.
(
    exec launcher resume s3://bucket/runs/digits --submission 1-2-3 --json --cluster "$RAY_ADDRESS"
) 9>&- &
driver=$!

# Sends the driver a signal, on which it saves and ends. A Python that does not handle it yet would die of it; and what
# this shell has forked seems to, until it runs another program.
tell() {
    local process
    until process=$driver && [ ! "/proc/$process/exe" -ef "/proc/$$/exe" ] &&
        grep -q '^SigCgt:.*[abef]..$' "/proc/$process/status" 2>/dev/null; do
        kill -0 "$driver" 2>/dev/null || return
        sleep 0.1
    done
    kill -"$1" "$process"
}
# On SIGTERM: by scancel, a preemption, or the time limit. On SIGUSR2: Slurm has sent SIGTERM to what runs Ray, as it
# does long before if the partition has a GraceTime.
cancel() {
    (timeout 300 tail --pid="$driver" -f /dev/null; [ $? = 124 ] && kill -KILL "$driver") 9>&- &    # too late
    # SIGUSR1: to go on in another try. SIGUSR2: for good.
    if job=$(show) && is_over; then tell USR2; else tell USR1; fi
}
trap cancel TERM USR2
trap 'tell USR1' USR1    # the time limit is near
[ -z "$told" ] || tell USR1

while kill -0 "$driver" 2>/dev/null; do wait "$driver"; done
wait "$driver"
code=$?

# 75: to go on in another try. 130: after a signal, which Slurm may have sent to a driver that is one of its steps.
if [ "$code" = 75 ] || { [ "$code" = 130 ] && job=$(show) && ! is_over; }; then
    lost=$(reports node | while read -r node address; do grep -qsxF "$address" "$own/lost" && echo "$node"; done)
    requeue_without $lost
fi
exit "$code"
