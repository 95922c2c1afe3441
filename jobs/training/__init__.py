"""The training process: the worker, its loop, one step, validation, restore, and causes of failures."""
