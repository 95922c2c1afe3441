"""The index of a run's data: made once, kept in the run directory, compared when the run goes on."""
