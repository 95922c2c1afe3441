"""Everything that uses Ray: the cluster, the worker group, its policies, calls on a node."""
