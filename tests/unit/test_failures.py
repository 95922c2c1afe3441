"""Which cause, of what kind, follows from what workers, agents and Ray say; and when a run is given up."""

import signal
from collections.abc import Callable
from typing import get_args

import pytest

from cluster.errors import Cause, ClusterError, LauncherError, StorageError, TrainingError
from cluster.process.messages import Doing, Exited, Failed, Hung, Unkillable
from cluster.ray.policies import why_lost
from jobs.spec import MaxFailuresSpec
from launcher.driver.failures import Failures
from launcher.driver.verdicts import ADVICE, LACKS_ADVICE, Failure, GiveUp, TryAgain

News = Callable[[Failures], None]
"""Tells what a worker, an agent or Ray says."""
STACK = """\
some words
Fatal Python error: Segmentation fault

Current thread 0x00007f (most recent call first):
  File "mine.py", line 7 in read
  File "loop.py", line 3 in run"""
WARNING = "[rank1]:[W] [ProcessGroupNCCL.cpp:5072] [Rank 1] using GPU 0 as device used by this process"
NCCL = "[rank1]:[E] [ProcessGroupNCCL.cpp:632] [Rank 1] Watchdog caught collective operation timeout"
WATCHDOG = """\
[rank1]:[E] [ProcessGroupNCCL.cpp:2201] [PG ID 0 PG GUID 0(default_pg) Rank 1] Process group watchdog thread \
terminated with exception: {}
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
terminate called after throwing an instance of 'c10::DistBackendError'
  what():  [PG ID 0 PG GUID 0(default_pg) Rank 1] Process group watchdog thread terminated with exception: {}
Fatal Python error: Aborted"""
ASSERT, ECC = "CUDA error: device-side assert triggered", "CUDA error: uncorrectable ECC error encountered"
LAUNCH = "CUDA error: unspecified launch failure"
KERNEL = (
    "/pytorch/aten/src/ATen/native/cuda/Loss.cu:245: nll_loss_forward_reduce_cuda_kernel_2d: block: [0,0,0], thread: "
    "[5,0,0] Assertion `t >= 0 && t < n_classes` failed.\n"
)
AT = "(Assertion `t >= 0 && t < n_classes` failed, Loss.cu:245)"


def watchdog(text: str, before: str = "") -> str:
    """What NCCL's watchdog prints as it ends its process for an error of CUDA."""
    return before + WATCHDOG.format(text, text)


def failed(cause: Cause, rank: int = 1, *, place: str = "", step: int | None = 3, text: str = "words") -> News:
    errors: dict[Cause, type[LauncherError]] = {
        "storage": StorageError, "code": TrainingError, "out_of_memory": TrainingError
    }  # fmt: skip
    error = errors.get(cause, ClusterError)
    words = Failed(error=error, cause=cause, message=text, step=step, place=place, traceback="")
    return lambda failures: failures.failed(rank, words)


def exited(code: int | None, rank: int = 1, *, oom_kill: bool = False, log_tail: str = "") -> News:
    end = Exited(exit_code=code, oom_kill=oom_kill, step=3, log_tail=log_tail)
    return lambda failures: failures.exited(rank, end)


def hung(rank: int, doing: Doing, *, is_first_step: bool = False, on_gpu: bool = False, data_delay: str = "") -> News:
    found = Hung(
        step=3, doing=doing, is_first_step=is_first_step, for_s=300.0, is_silent=False, stack="", on_gpu=on_gpu,
        data_delay=data_delay,
    )  # fmt: skip
    return lambda failures: failures.hung(rank, found)


def unkillable(rank: int = 1, *, on_gpu: bool = True) -> News:
    report = Unkillable(
        rank=rank, id="a", generation=1, attempt=0, pid=4711, for_s=30.4, state="State:  D (disk sleep)", on_gpu=on_gpu
    )
    return lambda failures: failures.unkillable(report)


def lost(reasons: dict[int, str], reason: str = "") -> News:
    return lambda failures: failures.lost(reasons, reason)


def finished(rank: int) -> News:
    return lambda failures: failures.finished(rank)


def draining(rank: int) -> News:
    return lambda failures: failures.draining([rank])


def tell(failures: Failures, *news: News) -> None:
    for each in news:
        each(failures)


def of(*news: News, machine: int = 10) -> TryAgain | GiveUp | None:
    """The verdict on two workers that say this, once no more is to be waited for."""
    failures = Failures(MaxFailuresSpec(machine=machine))
    failures.attempt_started(2)
    tell(failures, *news)
    return failures.verdict(0.0) or failures.verdict(6.0)


def failure_of(*news: News) -> Failure:
    verdict = of(*news)
    assert verdict is not None
    return verdict.failure


LATE = "lost the others: timed out"
NODE_DIED = "the actor's node was terminated unexpectedly: health check failed"
NODE_LEFT = "the actor's node was terminated expectedly: received SIGTERM"
UNREACHABLE = "The actor 01 is unavailable: RpcError"
WORKER_DIED = "Worker unexpectedly exits with a connection error code 2. End of file"
LOW_MEMORY = "1 worker(s) were killed due to the node running low on memory. Memory on the node was 23GB used / 24GB"


@pytest.mark.parametrize(
    ("news", "cause", "kind", "rank"),
    [
        ([exited(-signal.SIGKILL)], "killed", "machine", 1),
        ([exited(-signal.SIGTERM, oom_kill=True)], "killed", "machine", 1),
        ([exited(-signal.SIGKILL, oom_kill=True)], "out_of_memory", "machine", 1),
        ([exited(-signal.SIGSEGV, log_tail=STACK)], "crash", "code", 1),
        ([exited(3)], "crash", None, 1),
        ([exited(0)], "crash", None, 1),
        ([failed("connection_lost", 0), exited(1, 0), exited(-signal.SIGKILL)], "killed", "machine", 1),
        ([exited(-signal.SIGABRT, 0, log_tail=NCCL), exited(-signal.SIGKILL)], "killed", "machine", 1),
        ([exited(-signal.SIGABRT, 1, log_tail=NCCL), failed("exchange_timeout", 0)], "exchange_timeout", "machine", 1),
        ([failed("code", place="p"), exited(1)], "code", "code", 1),
        ([failed("code", step=None), exited(1)], "code", None, None),
        ([failed("connection_lost", 0), failed("code", place="p"), exited(1)], "code", "code", 1),
        ([failed("out_of_memory", place="p"), exited(1)], "out_of_memory", "code", 1),
        ([failed("crash", place="p"), exited(1, oom_kill=True)], "out_of_memory", "machine", 1),
        ([failed("crash", place="p"), exited(1)], "crash", "code", 1),
        ([exited(None)], "fork_server_lost", "machine", 1),
        ([exited(None, 0), failed("connection_lost"), exited(1)], "fork_server_lost", "machine", 0),
        ([failed("connection_lost"), exited(None)], "fork_server_lost", "machine", 1),
        ([failed("crash", place="p"), exited(None)], "fork_server_lost", "machine", 1),
        ([failed("code", 0, place="p"), exited(1, 0), exited(None)], "code", "code", 0),
        ([draining(1), exited(None)], "preempted", "preemption", 1),
        ([failed("environment"), exited(1)], "environment", None, 1),
        ([failed("storage", 0, step=None), exited(1, 0)], "storage", None, None),
        ([failed("connection_lost", 0), exited(1, 0)], "connection_lost", "machine", 0),
        ([failed("exchange_timeout", 0), failed("exchange_timeout", 1)], "exchange_timeout", "machine", 0),
        ([failed("exchange_timeout", 0, text=LATE), exited(1, 0)], "hung", "machine", 1),
        ([hung(0, "backward"), hung(1, "data")], "hung", "machine", 1),
        ([hung(0, "backward"), hung(1, "backward")], "exchange_timeout", "machine", 0),
        ([hung(0, "data"), hung(1, "data")], "hung", "machine", 0),
        ([hung(0, "backward", is_first_step=True), hung(1, "backward", is_first_step=True)], "hung", "machine", 0),
        ([lost({1: WORKER_DIED})], "killed", "machine", 1),
        ([lost({0: WORKER_DIED, 1: NODE_DIED})], "node_lost", "machine", 1),
        ([lost({0: UNREACHABLE, 1: UNREACHABLE})], "node_lost", "machine", 0),
        ([lost({1: NODE_LEFT})], "preempted", "preemption", 1),
        ([lost({1: "its agent has said nothing for 301 s"})], "hung", "machine", 1),
        ([lost({0: NODE_DIED, 1: LOW_MEMORY})], "out_of_memory", "machine", 1),
        ([lost({1: "ModuleNotFoundError: No module named 'cluster'"})], "environment", None, 1),
        ([lost({}, "Training was interrupted by node preemption (preempted_ranks=[1])")], "preempted", "preemption",
         None),
        ([failed("code", place="p"), lost({0: NODE_DIED}), exited(1)], "code", "code", 1),
        ([draining(1), exited(-signal.SIGKILL)], "preempted", "preemption", 1),
        ([draining(1), lost({1: NODE_DIED})], "preempted", "preemption", 1),
        ([draining(1), failed("connection_lost", 1)], "preempted", "preemption", 1),
        ([draining(0), exited(-signal.SIGKILL)], "killed", "machine", 1),
        ([draining(1), failed("code", place="p"), exited(1)], "code", "code", 1),
        ([exited(-signal.SIGABRT, log_tail=watchdog(ASSERT))], "code", "code", 1),
        ([exited(-signal.SIGABRT, log_tail=f"what(): {ASSERT}")], "code", "code", 1),
        ([exited(-signal.SIGABRT, log_tail=watchdog(ECC))], "gpu_lost", "machine", 1),
        ([exited(-signal.SIGABRT, log_tail=watchdog("CUDA error: out of memory"))], "gpu_out_of_memory", "code", 1),
        ([exited(-signal.SIGABRT, 0, log_tail=NCCL), exited(-signal.SIGABRT, log_tail=watchdog(ECC))], "gpu_lost",
         "machine", 1),
        ([failed("connection_lost", 0), exited(1, 0), exited(-signal.SIGABRT, log_tail=watchdog(ASSERT))], "code",
         "code", 1),
        ([failed("connection_lost"), exited(-signal.SIGABRT, log_tail=watchdog(ECC))], "gpu_lost", "machine", 1),
        ([exited(-signal.SIGABRT, log_tail=f"{WARNING}\ncaught: CUDA out of memory\n{NCCL}")], "hung", "machine", 0),
        ([exited(-signal.SIGABRT, log_tail=watchdog(ASSERT).partition("what():")[2])], "code", "code", 1),
        ([exited(-signal.SIGABRT, 0, log_tail=NCCL), failed("gpu_lost"), exited(1)], "gpu_lost", "machine", 1),
        ([failed("gpu_lost", step=0), exited(1)], "gpu_lost", "machine", 1),
        ([failed("gpu_lost", place="p"), exited(1)], "gpu_lost", "machine", 1),
        ([draining(1), failed("gpu_lost"), exited(1)], "preempted", "preemption", 1),
        ([unkillable()], "gpu_lost", "machine", 1),
        ([unkillable(on_gpu=False)], "hung", "machine", 1),
        ([hung(0, "backward", on_gpu=True), hung(1, "backward", on_gpu=True)], "hung", "machine", 0),
        ([hung(0, "forward", on_gpu=True), hung(1, "backward", on_gpu=True)], "hung", "machine", 0),
        ([hung(0, "data", on_gpu=True), hung(1, "data", on_gpu=True)], "hung", "machine", 0),
    ],
)  # fmt: skip
def test_causes(news: list[News], cause: str, kind: str | None, rank: int | None) -> None:
    failure = failure_of(*news)

    assert (failure.cause, failure.kind, failure.rank) == (cause, kind, rank)


def test_who_has_finished_may_end_as_it_likes() -> None:
    assert of(finished(0), finished(1), exited(0, 0), exited(-signal.SIGSEGV)) is None


@pytest.mark.parametrize(
    ("news", "text"),
    [
        (exited(-signal.SIGKILL, oom_kill=True), "killed by the kernel for want of memory (SIGKILL)"),
        (exited(-signal.SIGSEGV, log_tail='  File "old.py", line 1 in f\n' + STACK),
         'crashed with SIGSEGV, File "mine.py", line 7 in read'),
        (exited(-signal.SIGABRT), "crashed with SIGABRT"),
        (exited(0), "ended before its work was done, with exit code 0"),
        (exited(-signal.SIGABRT, log_tail=watchdog(ASSERT, KERNEL)), f"aborted by the error of its GPU: {ASSERT} {AT}"),
        (unkillable(), "its former process 4711 has not ended 30 s after SIGKILL, State: D (disk sleep): it holds its "
         "GPU, whose driver may hang"),
        (failed("exchange_timeout", 0, text=LATE), f"says nothing, and worker 0 waited for it in vain: {LATE}"),
        (lambda failures: tell(failures, hung(0, "exchange"), hung(1, "data", data_delay="s3://bucket: is away")),
         "no progress for 300 s in data; it waits for data: s3://bucket: is away"),
    ],
)  # fmt: skip
def test_words(news: News, text: str) -> None:
    assert failure_of(news).message == text


def test_the_assertion_that_failed_in_a_kernel_is_told_with_the_exception() -> None:
    text = f"AcceleratorError: {ASSERT}"
    failure = failure_of(failed("code", text=text, place="p"), exited(1, log_tail=f"{KERNEL}Traceback ..."))

    assert failure.message == f"{text} {AT}"


def test_gpus_that_stand_alike_do_not_tell_which_of_them_hangs() -> None:
    alike = [hung(rank, "backward", on_gpu=True) for rank in range(2)]
    verdict = of(*alike, machine=0)

    assert isinstance(verdict, GiveUp)
    assert (
        "and so for all: on GPUs, one whose kernel hangs looks like those that wait for it" in verdict.failure.message
    )
    assert "TORCH_NCCL_DUMP_ON_TIMEOUT" in verdict.advice
    assert "another may be the cause" not in failure_of(hung(0, "data", on_gpu=True), alike[1]).message


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([failed("code", text=ASSERT, place="step 3, device-side assert triggered"), exited(1)],
         [exited(-signal.SIGABRT, log_tail=watchdog(ASSERT))]),
        ([exited(-signal.SIGABRT, log_tail=watchdog(LAUNCH))],
         [failed("gpu_lost", 0, text=LAUNCH, place="step 3, unspecified launch failure"), exited(1, 0)]),
    ],
    ids=["an assertion", "what a lost GPU and a wrong kernel may cause"],
)  # fmt: skip
def test_an_error_of_a_kernel_at_the_same_step_is_the_codes_however_it_is_told(
    first: list[News], second: list[News]
) -> None:
    failures = Failures(MaxFailuresSpec())
    verdicts = []
    for news in (first, second):
        failures.attempt_started(2)
        tell(failures, *news)
        verdicts.append(failures.verdict(0.0) or failures.verdict(6.0))

    assert isinstance(verdicts[0], TryAgain)
    assert isinstance(verdicts[1], GiveUp)
    assert verdicts[1].why == "for the second time"


def test_a_lost_gpu_needs_another_agent_and_the_more_of_them_the_longer_a_pause() -> None:
    failures = Failures(MaxFailuresSpec(machine=None))
    ecc, killed = [failed("gpu_lost", step=0), exited(1)], [exited(-signal.SIGKILL)]
    told = []
    for news in [*[ecc] * 8, killed, ecc, [unkillable(on_gpu=False)]]:
        failures.attempt_started(2)
        tell(failures, *news)
        verdict = failures.verdict(0.0) or failures.verdict(6.0)
        assert isinstance(verdict, TryAgain)
        told.append((verdict.needs_agents, verdict.wait_s))

    waits = (1, 2, 4, 8, 16, 32, 60, 60)
    assert told == [*((True, wait_s) for wait_s in waits), (False, 0), (True, 1), (True, 0)]


def test_every_cause_has_advice_or_a_reason_to_have_none() -> None:
    assert sorted([*ADVICE, *LACKS_ADVICE]) == sorted(get_args(Cause))


def test_an_agent_lost_is_decided_at_once_unless_an_exception_has_been_told() -> None:
    failures = Failures(MaxFailuresSpec())
    failures.attempt_started(2)
    tell(failures, lost({1: NODE_DIED}))
    verdict = failures.verdict(0.0)
    assert isinstance(verdict, TryAgain)
    assert verdict.needs_agents

    failures.attempt_started(2)
    tell(failures, failed("code", 0, place="p"), lost({1: NODE_DIED}))
    assert failures.verdict(0.0) is None, "its agent has not said yet how it ended, and a save may be under way"
    tell(failures, exited(1, 0))
    verdict = failures.verdict(0.1)
    assert isinstance(verdict, TryAgain)
    assert (verdict.failure.cause, verdict.needs_agents) == ("code", True)


KILL, LOSS = [exited(-signal.SIGKILL)], [lost({1: NODE_LEFT})]


def raised_at(place: str, cause: Cause = "code") -> list[News]:
    return [failed(cause, 0, place=place), exited(1, 0), exited(1, 1)]


@pytest.mark.parametrize(
    ("attempts", "why"),
    [
        ([KILL, KILL, KILL], "and workers.max_failures.machine=2 is used up"),
        ([KILL, LOSS, raised_at("a"), KILL, LOSS, KILL], "and workers.max_failures.machine=2 is used up"),
        ([LOSS, LOSS], "and workers.max_failures.preemption=1 is used up"),
        ([raised_at("a"), KILL, raised_at("b"), raised_at("c")], "and workers.max_failures.code=2 is used up"),
        ([raised_at("a"), KILL, raised_at("a")], "for the second time"),
        ([raised_at("a", "out_of_memory"), raised_at("a", "out_of_memory")], "for the second time"),
        ([[failed("environment", step=0), exited(1)]], ""),
    ],
    ids=["machine", "each kind by itself", "preemption", "code", "the same place", "memory", "no use"],
)
def test_budgets(attempts: list[list[News]], why: str) -> None:
    failures = Failures(MaxFailuresSpec(machine=2, preemption=1 if LOSS in attempts[:1] else None, code=2))
    verdicts = []
    for news in attempts:
        failures.attempt_started(2)
        tell(failures, *news)
        verdicts.append(failures.verdict(0.0) or failures.verdict(6.0))

    assert all(isinstance(verdict, TryAgain) for verdict in verdicts[:-1])
    last = verdicts[-1]
    assert isinstance(last, GiveUp)
    assert last.why == why


@pytest.mark.parametrize(
    ("what", "cause", "kind"),
    [
        ("The worker group startup timed out after 60.0 seconds waiting for 2 workers", "not_started", "machine"),
        ("At least one of the worker actors failed to initialize: No module named 'cluster'", "environment", None),
        ("", "not_started", "machine"),
    ],
)
def test_agents_that_do_not_start(what: str, cause: str, kind: str | None) -> None:
    failure = failures_of_start(Failures(MaxFailuresSpec()), what).failure

    assert (failure.cause, failure.kind, failure.rank) == (cause, kind, None)


def test_starts_that_fail_are_tried_again_later_and_later_until_one_comes_up() -> None:
    failures = Failures(MaxFailuresSpec(machine=None))
    waits = [failures_of_start(failures, "late") for _ in range(2000)]
    assert [verdict.wait_s for verdict in waits if isinstance(verdict, TryAgain)] == [1, 2, 4, 8, 16, 32, *[60] * 1994]
    failures.attempt_started(2)
    tell(failures, lost({1: NODE_DIED}))
    verdict = failures.verdict(0.0)
    assert isinstance(verdict, TryAgain)
    assert verdict.wait_s == 0, "they had come up"
    verdict = failures_of_start(failures, "late")
    assert isinstance(verdict, TryAgain)
    assert (verdict.wait_s, verdict.needs_agents) == (1, True)


def failures_of_start(failures: Failures, what: str) -> TryAgain | GiveUp:
    """The verdict on agents that were asked for and did not come up."""
    failures.attempt_started(0)
    tell(failures, lost({}, what))
    verdict = failures.verdict(0.0)
    assert verdict is not None
    return verdict


def test_failures_are_counted_by_kind() -> None:
    failures = Failures(MaxFailuresSpec(machine=None))
    for news in [KILL] * 20 + [LOSS, raised_at("a")]:
        failures.attempt_started(2)
        tell(failures, *news)
        assert isinstance(failures.verdict(0.0), TryAgain)

    assert failures.counts == {"machine": 20, "preemption": 1, "code": 1}


@pytest.mark.parametrize(
    ("news", "advice"),
    [
        ([failed("out_of_memory"), exited(1)], "a lower train.global_batch or more train.shards"),
        ([failed("gpu_lost"), exited(1)], "look at the GPU there (nvidia-smi, and Xid in dmesg)"),
        ([failed("gpu_out_of_memory"), exited(1)], "take GPUs with more memory (workers.accelerator)"),
        ([failed("environment"), exited(1)], "give every node the same modules, files and versions"),
        ([hung(0, "data"), hung(1, "data")], "raise workers.hang_timeout_s;"),
        ([hung(0, "start", is_first_step=True), hung(1, "data")], "raise workers.first_step_timeout_s;"),
        ([failed("exchange_timeout", 0, text=LATE), exited(1, 0)], "raise workers.timeout_s;"),
    ],
)
def test_what_to_do(news: list[News], advice: str) -> None:
    verdict = of(*news, machine=0)
    assert isinstance(verdict, GiveUp)
    assert advice in verdict.advice


DIED = "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tip: 192.0.2.2\n"
NODE = f"{DIED}The actor died because its node has died. Node Id: 7d17\n\tthe actor's node was "
EXITED = (
    f"{DIED}The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
    "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called"
)
SHORT_OF_MEMORY = (
    "A worker health check failed.\nWorker info: Worker(...)\n1 worker(s) were killed due to the node running low on "
    "memory. Memory on the node (IP: 192.0.2.2, ID: 335e) was 4.96GB used / 23.54GB limit (0.210896)\nOOM kill reason: "
    "Memory usage 4996268032B exceeded threshold of 3791475456B\nRefer to the documentation on how to address the out "
    "of memory issue: https://docs.ray.io. To disable worker killing, set `RAY_memory_monitor_refresh_ms` to zero."
)


@pytest.mark.parametrize(
    ("text", "cause", "reason"),
    [
        (EXITED, "killed", "Worker unexpectedly exits with a connection error code 2. End of file"),
        (f"{NODE}terminated unexpectedly: health check failed due to missing too many heartbeats", "node_lost",
         "the actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"),
        (f"{NODE}terminated expectedly: received SIGTERM", "preempted",
         "the actor's node was terminated expectedly: received SIGTERM"),
        (f"{NODE}preempted: spot", "preempted", "the actor's node was preempted: spot"),
        (SHORT_OF_MEMORY, "out_of_memory", SHORT_OF_MEMORY.splitlines()[2]),
        ("A worker health check has been hanging for 60.00 seconds. Marking the worker as dead.\nWorker info: W",
         "hung", "A worker health check has been hanging for 60.00 seconds. Marking the worker as dead"),
    ],
)  # fmt: skip
def test_what_ray_2_60_says(text: str, cause: str, reason: str) -> None:
    """Recorded of nodes and actors that were killed, drained, and short of memory; the last is from its source."""
    failure = failure_of(lost({1: why_lost(RuntimeError(text))}))

    assert (failure.cause, failure.message) == (cause, reason)
