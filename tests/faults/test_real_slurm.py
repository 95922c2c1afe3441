"""What Slurm does with jobs, as the kind of cluster relies on it: in order, and when nodes, limits or people end them.

Each test has a Slurm of its own, which starts in a second. What is tested here is Slurm and ``tests.faults.slurm``.
"""

from pathlib import Path

import pytest

from tests.faults.slurm import CPUS, TICK_S, Slurm, slurm

pytestmark = pytest.mark.slow

TRAP = """
trap 'echo batch TERM' TERM
echo "try ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"
"""
STEP = """
srun bash -c 'exec >> steps-$SLURM_JOB_ID; trap "echo step TERM" TERM; echo "try ${SLURM_RESTART_COUNT:-0}: step on" \
    $SLURMD_NODENAME; for i in {1..600}; do sleep 0.1 & wait; done' &
for i in {1..600}; do sleep 0.1 & wait $!; done
"""
"""A step on all nodes and a batch script, neither of which ends on SIGTERM."""
REQUEUED = ("--requeue", "--open-mode=append")


def lines(slurm: Slurm, job: str) -> list[str]:
    """What a job and its steps have printed; the steps to a file, for ``srun`` may end before it has passed that on."""
    steps = slurm.folder / f"steps-{job}"
    return [*slurm.output(job).splitlines(), *(steps.read_text().splitlines() if steps.exists() else [])]


def wait_for_lines(slurm: Slurm, job: str, *wanted: str) -> None:
    slurm.wait_until(lambda: set(wanted) <= set(lines(slurm, job)), about=lambda: "\n".join(lines(slurm, job)))


def test_a_step_runs_on_each_node(make_slurm) -> None:
    slurm = make_slurm("node1", "node2", "node3")
    script = 'hostname; srun --label bash -c "hostname; hostname -I; echo $CUDA_VISIBLE_DEVICES"; getent hosts node2'
    job = slurm.submit(script, "--nodes=2", "--gpus-per-node=2")
    slurm.wait_for(job, "COMPLETED")
    first, *of_steps, found = lines(slurm, job)
    assert first == "node1"
    assert sorted(line.strip() for line in of_steps) == [
        "0: 0,1", "0: 10.77.0.2", "0: node1", "1: 0,1", "1: 10.77.0.3", "1: node2",
    ]  # fmt: skip
    assert found.split() == ["10.77.0.3", "node2"]


def test_two_jobs_share_a_node_and_a_third_waits(make_slurm) -> None:
    slurm = make_slurm("node1")
    half = (f"--cpus-per-task={CPUS // 2}", "--gpus-per-node=2")
    jobs = [slurm.submit("echo $SLURM_JOB_GPUS; sleep 1000", *half) for _ in range(3)]
    for job in jobs[:2]:
        slurm.wait_for(job, "RUNNING")
    slurm.wait_until(lambda: slurm.job(jobs[2])["Reason"] == "Resources")
    for job, gpus in zip(jobs[:2], ["0,1", "2,3"]):
        wait_for_lines(slurm, job, gpus)
    slurm.ask("scancel", jobs[0])
    slurm.wait_for(jobs[2], "RUNNING")


def test_an_array_is_one_job_for_each_number(make_slurm) -> None:
    slurm = make_slurm("node1")
    job = slurm.submit("echo $SLURM_ARRAY_JOB_ID $SLURM_ARRAY_TASK_ID", "--array=0-2", "--output=array-%a")
    for number in range(3):
        slurm.wait_for(f"{job}_{number}", "COMPLETED")
        assert (slurm.folder / f"array-{number}").read_text() == f"{job} {number}\n"


def test_a_job_requeues_itself_and_excludes_its_node(make_slurm) -> None:
    """The only moment at which a job can exclude nodes from its next try: while it ends, for which it ignores TERM."""
    slurm = make_slurm("node1", "node2")
    job = slurm.submit(
        TRAP + '[ -z "$SLURM_RESTART_COUNT" ] || exit 0; trap "" TERM; scontrol requeue $SLURM_JOB_ID;'
        "scontrol update JobId=$SLURM_JOB_ID ExcNodeList=$SLURMD_NODENAME && echo excluded; exit 7",
        *REQUEUED,
    )
    ended = slurm.wait_for(job, "COMPLETED")
    said = [line for line in lines(slurm, job) if "DUE TO JOB REQUEUE" not in line]
    assert said == ["try 0 on node1", "excluded", "try 1 on node2"]
    assert (ended["Restarts"], ended["ExcNodeList"], ended["ExitCode"]) == ("1", "node1", "0:0")


def test_a_batch_script_is_told_before_its_limit_and_ended_at_it(make_slurm) -> None:
    slurm = make_slurm("node1")
    told = slurm.submit(TRAP + "sleep 1000 & wait; exit 9", "--time=1", "--signal=B:TERM@50")
    late = slurm.submit(TRAP + STEP)
    slurm.wait_for(late, "RUNNING")
    slurm.ask("scontrol", "update", f"JobId={late}", "EndTime=now+1")
    ended = slurm.wait_for(told, "FAILED", limit_s=10 * TICK_S)
    assert (ended["Reason"], ended["ExitCode"]) == ("NonZeroExitCode", "9:0")
    assert "batch TERM" in lines(slurm, told)
    assert slurm.wait_for(late, "TIMEOUT", limit_s=10 * TICK_S)["Reason"] == "TimeLimit"
    assert {"step TERM", "batch TERM"} <= set(lines(slurm, late))


def test_a_job_that_is_cancelled_is_told_first(make_slurm) -> None:
    slurm = make_slurm("node1", "node2")
    all_told = slurm.submit(TRAP + STEP, "--nodes=2")
    only_batch_told = slurm.submit(TRAP + STEP.replace("wait $!; done", "wait $! || exit 9; done"), "--nodes=2")
    for job in (all_told, only_batch_told):
        wait_for_lines(slurm, job, "try 0: step on node1", "try 0: step on node2")
    slurm.ask("scancel", all_told)
    slurm.ask("scancel", "--batch", "--signal=TERM", only_batch_told)
    assert slurm.wait_for(only_batch_told, "FAILED")["ExitCode"] == "9:0"
    assert "batch TERM" in lines(slurm, only_batch_told)
    slurm.wait_for(all_told, "CANCELLED")
    slurm.wait_until(lambda: set(slurm.node_states().values()) == {"idle"})
    assert {"batch TERM", "step TERM"} <= set(lines(slurm, all_told))


def test_a_preempted_job_is_requeued_and_its_steps_are_told_first(make_slurm) -> None:
    slurm = make_slurm("node1")
    job = slurm.submit(TRAP + STEP, "--partition=scavenge", "--exclusive", *REQUEUED)
    wait_for_lines(slurm, job, "try 0: step on node1")
    other = slurm.submit("sleep 1", "--exclusive")
    wait_for_lines(slurm, job, "step TERM")
    assert "batch TERM" not in lines(slurm, job)
    wait_for_lines(slurm, job, "batch TERM")
    slurm.wait_for(other, "COMPLETED")
    wait_for_lines(slurm, job, "try 1 on node1")


def test_with_a_setting_the_batch_script_of_a_preempted_job_is_told_first(make_slurm) -> None:
    slurm = make_slurm("node1", SlurmctldParameters="preempt_send_user_signal")
    told = ("--partition=scavenge", "--exclusive", "--signal=B:TERM@60")
    job = slurm.submit(TRAP + STEP, *told, *REQUEUED)
    wait_for_lines(slurm, job, "try 0: step on node1")
    slurm.submit("sleep 1", "--exclusive")
    wait_for_lines(slurm, job, "batch TERM")
    assert "step TERM" not in lines(slurm, job)


def test_a_node_that_loses_its_power_ends_a_job_or_leaves_it(make_slurm) -> None:
    slurm = make_slurm("node1", "node2", "node3")
    on_both = ("--nodes=2", "--nodelist=node[1-2]")
    goes_on = slurm.submit(TRAP + STEP.replace("srun", "srun --no-kill"), *on_both, "--no-kill")
    starts_again = slurm.submit(TRAP + STEP, "--nodes=2", *REQUEUED)
    for job in (goes_on, starts_again):
        wait_for_lines(slurm, job, "try 0: step on node1", "try 0: step on node2")
    slurm.power_off("node2")
    wait_for_lines(slurm, starts_again, "try 1 on node[1,3]")
    left = slurm.job(goes_on)
    assert (left["JobState"], left["NodeList"], left["Restarts"]) == ("RUNNING", "node1", "0")
    assert slurm.node_states()["node2"] == "down*"
    slurm.power_on("node2")
    slurm.wait_until(lambda: slurm.node_states()["node2"] == "idle")


def test_a_job_of_a_batch_host_without_power_starts_elsewhere(make_slurm) -> None:
    slurm = make_slurm("node1", "node2")
    job = slurm.submit(TRAP + "sleep 1000", *REQUEUED)
    wait_for_lines(slurm, job, "try 0 on node1")
    slurm.power_off("node1")
    wait_for_lines(slurm, job, "try 1 on node2")


def test_a_job_outlives_a_slurmd_and_the_controller(make_slurm) -> None:
    slurm = make_slurm("node1", "node2")
    step = "touch on-$(hostname); while [ ! -e go ]; do sleep 0.1; done; hostname"
    job = slurm.submit(f"srun bash -c '{step}'", "--nodes=2")
    slurm.wait_until(lambda: all((slurm.folder / f"on-{node}").exists() for node in slurm.nodes))
    slurm.kill_slurmd("node2")
    slurm.start_slurmd("node2")
    slurm.ask("scontrol", "update", f"JobId={job}", "Comment=running")
    state = slurm.folder / "state" / "job_state"
    slurm.wait_until(lambda: state.exists() and b"running" in state.read_bytes())
    slurm.kill_controller()
    slurm.start_controller()
    slurm.wait_until(lambda: slurm.node_states() == {"node1": "mixed", "node2": "mixed"})
    (slurm.folder / "go").touch()
    slurm.wait_for(job, "COMPLETED")
    assert sorted(lines(slurm, job)) == ["node1", "node2"]


def test_what_does_not_fit_is_refused_or_waits_for_ever(make_slurm) -> None:
    slurm = make_slurm("node1")
    refused = {
        "--partition=nope": "invalid partition specified: nope",
        "--gpus-per-node=5": "Requested node configuration is not available",
        "--constraint=h100": "Invalid feature specification",
    }
    for option, error in refused.items():
        assert error in slurm.ask("sbatch", option, "--wrap=true", code=1)
    for options in (["--nodes=2"], ["--partition=short", "--time=5"]):
        job = slurm.submit("true", *options)
        slurm.wait_until(lambda job=job: slurm.job(job)["Reason"] == "PartitionConfig")


def test_nothing_is_left(make_slurm) -> None:
    make_slurm("node1")  # skips the test where there can be none

    def marked() -> list[str]:
        mark = f"SLURM_CONF={folder}/slurm.conf".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text())
            except OSError:  # it has just ended
                continue
        return found

    with slurm("node1", "node2") as made:
        folder = made.folder
        made.submit("setsid sleep 1000 & srun sleep 1000", "--nodes=2")
        made.wait_until(lambda: sum("sleep" in command for command in marked()) >= 3)
    assert not marked()
    assert not folder.exists()
