"""What a failure of the dry run on a GPU means for the description, or for the GPU."""

from cluster.errors import ClusterError, DescriptionError, LauncherError, in_short
from jobs.spec import JobSpec
from jobs.training.deterministic import refusal, refused_operator
from jobs.training.failure_causes import gpu_error_of
from launcher.planning.operator_watch import OperatorWatch

LOOK_AT_GPU = "look at the GPU there (nvidia-smi, and Xid in dmesg), or give the run other nodes"
"""What to do about a GPU that fails."""


def failure_on_gpu(error: BaseException, spec: JobSpec, watch: OperatorWatch) -> LauncherError | None:
    """Return the error to report for an exception of the dry run; None: neither the GPU nor its kernels are the cause.

    Args:
        error: What the dry run raised.
        spec: The description.
        watch: Knows which module called an operator.
    """
    original = error
    while original.__cause__ is not None:
        original = original.__cause__
    if operator := refused_operator(original):
        return DescriptionError(refusal(watch.describe(operator)))
    broken = gpu_error_of(original)
    if broken is None or broken.cause == "out_of_memory":
        return None
    if broken.cause == "code":
        return DescriptionError(
            f"model: a micro-batch fails on the GPU with CUDA error: {broken.text}; {broken.advice}"
        )
    if broken.cause == "gpu_out_of_memory":
        return DescriptionError(
            f"train.global_batch: a micro-batch of {spec.train.micro_batch} samples, 1 of {spec.train.shards} shards, "
            f"does not fit into the GPU: {in_short(original)}; lower train.global_batch, raise train.shards, or take "
            "GPUs with more memory"
        )
    advice = LOOK_AT_GPU if broken.cause == "gpu_lost" else "give its host a driver and a torch that fit it"
    return ClusterError(f"the GPU failed: CUDA error: {broken.text}; {advice}", cause=broken.cause, step=0)
