"""Kinds of cluster: where a run finds its workers, and what takes its jobs."""
