"""The command line and the driver of a run."""
