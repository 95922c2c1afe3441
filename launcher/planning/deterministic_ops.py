"""The operators of torch that raise on a GPU while ``train.deterministic`` is true. Data, and a pure function over it.

A dry run on a CPU passes them, because nearly all of them are deterministic there. The table has the operators that a
CPU dispatches, with the conditions under which the same call raises on a GPU. It has no operator that torch replaces on
a GPU, in Python, by deterministic ones: bilinear and trilinear ``interpolate``, and padding by replication.

Source: the calls of ``alertNotDeterministic`` in libtorch_cuda.so and libtorch_cpu.so of torch 2.14, which are more
exact than the list in ``torch.use_deterministic_algorithms``: that one still has ``ReflectionPad2d``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_EMBEDDING_BAG_MAX = 2
"""``mode`` of the embedding bag's operators."""


def _needs_native_ctc(arguments: Mapping[str, Any]) -> bool:
    """cuDNN's CTC loss is deterministic. It takes int32 targets, and a CPU has made them int64 before it is seen."""
    may_be_cudnn = arguments["blank"] == 0 and arguments["targets"].dim() == 1
    return not (may_be_cudnn and arguments["log_probs"].dtype == torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """An operator without a deterministic implementation on GPUs."""

    on_gpu: tuple[str, ...]
    """The names that torch's error has for it."""
    instead: str = ""
    """What a model can use in its place, if torch has something similar."""
    forward: str = ""
    """The operator whose backward pass it is; empty: it belongs to the forward pass itself."""
    raises: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a call with these arguments, by name, raises. None: each does."""
    is_compiled_away: bool = False
    """Whether ``torch.compile`` has a deterministic implementation."""


OPERATORS: Mapping[str, Operator] = {
    "_adaptive_avg_pool2d_backward": Operator(
        on_gpu=("adaptive_avg_pool2d_backward_cuda",),
        forward="_adaptive_avg_pool2d",
        instead="adaptive pooling to size 1, or average pooling with a fixed kernel",
    ),
    "_adaptive_avg_pool3d_backward": Operator(
        on_gpu=("adaptive_avg_pool3d_backward_cuda",),
        forward="_adaptive_avg_pool3d",
        instead="adaptive pooling to size 1",
    ),
    "adaptive_max_pool2d_backward": Operator(
        on_gpu=("adaptive_max_pool2d_backward_cuda",),
        forward="adaptive_max_pool2d",
        instead="max pooling with a fixed kernel",
    ),
    "avg_pool3d_backward": Operator(
        on_gpu=("avg_pool3d_backward_cuda",), forward="avg_pool3d", instead="a strided Conv3d", is_compiled_away=True
    ),
    "max_pool3d_with_indices_backward": Operator(
        on_gpu=("max_pool3d_with_indices_backward_cuda",),
        forward="max_pool3d_with_indices",
        instead="a strided Conv3d",
    ),
    "fractional_max_pool2d_backward": Operator(
        on_gpu=("fractional_max_pool2d_backward_cuda",), forward="fractional_max_pool2d", instead="MaxPool2d"
    ),
    "fractional_max_pool3d_backward": Operator(
        on_gpu=("fractional_max_pool3d_backward_cuda",), forward="fractional_max_pool3d", instead="a strided Conv3d"
    ),
    "max_unpool2d": Operator(on_gpu=("max_unpooling2d_forward_out",), instead="a transposed convolution"),
    "max_unpool3d": Operator(on_gpu=("max_unpooling3d_forward_out",), instead="a transposed convolution"),
    "upsample_linear1d_backward": Operator(
        on_gpu=("upsample_linear1d_backward_out_cuda",),
        forward="upsample_linear1d",
        instead="mode nearest",
        is_compiled_away=True,
    ),
    "upsample_bicubic2d_backward": Operator(
        on_gpu=("upsample_bicubic2d_backward_out_cuda",),
        forward="upsample_bicubic2d",
        instead="mode bilinear or nearest",
        is_compiled_away=True,
    ),
    "_upsample_bilinear2d_aa_backward": Operator(
        on_gpu=("upsample_bilinear2d_aa_backward_out_cuda",),
        forward="_upsample_bilinear2d_aa",
        instead="antialias=False",
    ),
    "_upsample_bicubic2d_aa_backward": Operator(
        on_gpu=("upsample_bicubic2d_aa_backward_out_cuda",),
        forward="_upsample_bicubic2d_aa",
        instead="mode bilinear without antialias",
    ),
    "reflection_pad1d_backward": Operator(
        on_gpu=("reflection_pad1d_backward_out_cuda",),
        forward="reflection_pad1d",
        instead="replication padding",
        is_compiled_away=True,
    ),
    "reflection_pad3d_backward": Operator(
        on_gpu=("reflection_pad3d_backward_out_cuda",),
        forward="reflection_pad3d",
        instead="replication padding",
        is_compiled_away=True,
    ),
    "grid_sampler_2d_backward": Operator(
        on_gpu=("grid_sampler_2d_backward_cuda", "cudnn_grid_sampler_backward"), forward="grid_sampler_2d"
    ),
    "grid_sampler_3d_backward": Operator(on_gpu=("grid_sampler_3d_backward_cuda",), forward="grid_sampler_3d"),
    "_ctc_loss_backward": Operator(on_gpu=("ctc_loss_backward_gpu",), forward="_ctc_loss", raises=_needs_native_ctc),
    "_embedding_bag_backward": Operator(
        on_gpu=("embedding_bag_backward_cuda_max",),
        forward="_embedding_bag",
        instead="mode sum or mean",
        raises=lambda arguments: arguments["mode"] == _EMBEDDING_BAG_MAX,
    ),
    "nll_loss2d_forward": Operator(
        on_gpu=("nll_loss2d_forward_out_cuda_template",),
        instead="reduction none, and then the mean",
        raises=lambda arguments: arguments["reduction"] != 0,
        is_compiled_away=True,
    ),
    "put": Operator(on_gpu=("put_",), instead="indexing", is_compiled_away=True),  # also the backward pass of take
    "scatter": Operator(
        on_gpu=("scatter_reduce_cuda_kernel",),
        raises=lambda arguments: arguments.get("reduce") == "multiply" and isinstance(arguments["src"], torch.Tensor),
    ),
    "scatter_reduce": Operator(
        on_gpu=("scatter_reduce_cuda_prod_",), raises=lambda arguments: arguments["reduce"] == "prod"
    ),
    "index_reduce": Operator(on_gpu=("index_reduce_cuda",), instead="scatter_reduce with sum, mean, amax or amin"),
    "median": Operator(
        on_gpu=("median CUDA with indices output",), instead="sort", raises=lambda arguments: "dim" in arguments
    ),
    "nanmedian": Operator(
        on_gpu=("median CUDA with indices output",), instead="nanquantile", raises=lambda arguments: "dim" in arguments
    ),
    "histc": Operator(
        on_gpu=("_histc_cuda with floating point input",),
        instead="bucketize and bincount",
        raises=lambda arguments: arguments["self"].is_floating_point(),
    ),
    "bincount": Operator(
        on_gpu=("_bincount_cuda",), instead="index_add", raises=lambda arguments: arguments["weights"] is not None
    ),
}
"""By the name in the namespace ``aten``, without the overload and the underscore of an operator in place."""


def operator_of(name: str, arguments: Callable[[], Mapping[str, Any]]) -> Operator | None:
    """Return the operator of the table that a call is, if it raises on a GPU.

    Args:
        name: The name of the operator, as in the table.
        arguments: Returns the arguments of the call by name; called if the table has the operator.
    """
    operator = OPERATORS.get(name)
    if operator is None or operator.raises is None or operator.raises(arguments()):
        return operator
    return None
