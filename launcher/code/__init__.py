"""The user's code: which files belong to a run, and where they are found."""
