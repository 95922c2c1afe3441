"""Inspection: whether each node of a cluster has what a run needs."""
