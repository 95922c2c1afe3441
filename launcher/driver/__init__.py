"""The driver: start workers, listen to them, recover from their failures, and record the run."""
