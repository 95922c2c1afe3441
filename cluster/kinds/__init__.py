"""Kinds of cluster: the interface that runs workers, and one implementation for each kind of cluster description."""
