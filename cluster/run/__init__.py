"""The run directory: checkpoints, row logs, the driver's lease and submissions."""
