"""Whether the nodes of a cluster are fit for a run."""
