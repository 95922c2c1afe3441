"""The run directory: its checkpoints, row logs, lease and submissions."""
