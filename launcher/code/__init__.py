"""The user's code: which files are packed for a run, and from where modules are imported."""
