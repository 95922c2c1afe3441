#!/bin/bash -l
#SBATCH --job-name=digits-0a1b2c3d4e5f-0
#SBATCH --comment=run=s3%3A%2F%2Fbucket%2Fruns%2Fdigits&submission=1-2-3
#SBATCH --partition=main
#SBATCH --dependency=singleton
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
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
unset SLURM_EXPORT_ENV    # with it, srun would pass on no more than --export names, and no PATH
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
LAUNCHER_JOB_ENDS_AT=${SLURM_JOB_END_TIME:-$(date -d "$(field EndTime || echo unknown)" +%s 2>/dev/null)}
export LAUNCHER_JOB_ENDS_AT

# Whether this script can start again, so that the driver may end with 75: saved, and to go on.
if [ "${SLURM_RESTART_COUNT:-0}" -ge 100 ]; then
    echo "This job does not requeue itself any more: it has been requeued $SLURM_RESTART_COUNT times." >&2
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

nodes=''
clean_up() {
    trap '' TERM USR1
    exec 9>&-    # Ray ends on all nodes
    local limit=$((SECONDS + 20))
    while kill -0 "$nodes" 2>/dev/null && [ "$SECONDS" -lt "$limit" ]; do sleep 0.1; done
    kill -KILL "$nodes" 2>/dev/null
    nodes=''    # another process may get the number
    rm -rf "$own"
}
trap clean_up EXIT
trap 'exit 143' TERM

# Ray on each node. It ends, with all that it has started, when the pipe is closed, however this script ends.
touch "$own/reports"
exec 9> >(exec srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=8 \
    --input=all --wait=0 --kill-on-bad-exit=0 \
    --open-mode=append --error=/home/me/.launcher/slurm/digits-0a1b2c3d4e5f-0.%N.log \
    python -P -m cluster.kinds.slurm.node --cpus=8 --gpus=0 >> "$own/reports")
nodes=$!

await_reports() {
    local limit=$((SECONDS + 120))
    while [ "$(wc -l < "$own/reports")" -lt "$1" ] && [ "$SECONDS" -lt "$limit" ] && kill -0 "$nodes" 2>/dev/null; do
        sleep 0.1
    done
}
await_reports 1    # by the first node: where its head listens
RAY_ADDRESS=$(sed -n 's/^head \(.*:\)/\1/p' "$own/reports")
if [ -z "$RAY_ADDRESS" ]; then
    echo "Ray did not start; see" /home/me/.launcher/slurm/digits-0a1b2c3d4e5f-0."$SLURMD_NODENAME".log >&2
    exit 5
fi
export RAY_ADDRESS
echo "$RAY_ADDRESS" >&9
await_reports $((1 + SLURM_JOB_NUM_NODES))    # and by each node: that it has joined, or has failed

# The driver, which must not hold the pipe.
(
    exec launcher resume s3://bucket/runs/digits --submission 1-2-3 --json --cluster "$RAY_ADDRESS"
) 9>&- &
driver=$!

# Asks the driver to save and to end. A Python that does not handle the signal yet would die of it.
tell() {
    until grep -q '^SigCgt:.*[2367abef]..$' "/proc/$driver/status" 2>/dev/null; do
        kill -0 "$driver" 2>/dev/null || return
        sleep 0.1
    done
    kill -USR1 "$driver"
}
# On scancel; and on preemption, after which Slurm requeues the job itself.
cancelled=''
cancel() {
    cancelled=1
    (sleep 300; kill -KILL "$driver") 9>&- &
    tell
}
trap cancel TERM
trap tell USR1    # the time limit is near
[ -z "$told" ] || tell

while kill -0 "$driver" 2>/dev/null; do wait "$driver"; done
wait "$driver"
code=$?

if [ "$code" = 75 ] && [ -z "$cancelled" ] && [ -n "${LAUNCHER_JOB_REQUEUES:-}" ]; then
    excluded=$(field ExcNodeList)
    excluded=${excluded#(null)}
    for address in $(sort -u "$own/lost" 2>/dev/null); do
        node=$(sed -n "s/ $address\$//p" "$own/reports")
        excluded+=${node:+${excluded:+,}$node}
    done
    clean_up    # first, because Slurm sends SIGTERM to all when it requeues
    for ((i = 0; i < 5; i++)); do scontrol requeue "$job_id" && break; sleep 5; done
    # Slurm lets a job exclude nodes from its next try only between the requeue and the end of this one.
    [ -z "$excluded" ] || scontrol update JobId="$job_id" ExcNodeList="$excluded"
fi
exit "$code"
