"""The one thing that ``train.deterministic`` forbids: an operator of torch without a deterministic implementation.

This module does not import torch, so that the plan can say the same as a worker.
"""

from cluster.errors import text_of

_SIGN = " does not have a deterministic implementation"


def refused_operator(error: BaseException) -> str:
    """Returns the operator that torch refuses to run, by torch's name for it; empty: the error is another one."""
    operator, sign, _ = text_of(error).partition(_SIGN)
    return operator.splitlines()[-1] if sign and isinstance(error, RuntimeError) else ""


def refusal(operators: str, on: str = "") -> str:
    """Returns the text of the error.

    Args:
        operators: What is refused.
        on: The devices on which that is so; empty: the one that the error names anyway.
    """
    where = f" on {on}" if on else ""
    return (
        f"train.deterministic: torch has no deterministic implementation{where} of {operators}; replace it, or give "
        "up equal bits in every run with train.deterministic: false"
    )
