"""Hand a run over to a cluster."""
