"""Reads YAML and ``key=value`` overrides into the frozen spec of a job or a cluster."""
