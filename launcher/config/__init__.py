"""From YAML and ``key=value`` to a frozen spec, of a job or a cluster."""
