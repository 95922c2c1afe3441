"""The description of a cluster, as frozen dataclasses, a module for each kind of cluster.

Like the job language, this room imports only the standard library, ``cluster.capacity`` and ``cluster.errors``. The
docstring under a field is its reference text, which ``launcher schema --cluster KIND`` prints. A description holds no
secrets: a token comes from the environment.
"""
