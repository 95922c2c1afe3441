"""Begin, resume, rewind, branch and export a run."""
