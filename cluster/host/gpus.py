"""Which GPUs a process sees."""

WITHOUT_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
"""The environment variables of a process that sees no GPU. CUDA reads them once, when the process first uses it."""
