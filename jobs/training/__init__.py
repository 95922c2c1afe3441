"""The training process: the worker, its loop, a step, an evaluation, a restore."""
