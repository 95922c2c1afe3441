"""The kinds of cluster."""

from collections.abc import Mapping

from cluster.spec.local import LocalClusterSpec
from cluster.spec.ray import RayClusterSpec
from cluster.spec.slurm import SlurmClusterSpec

JobsClusterSpec = RayClusterSpec | SlurmClusterSpec
"""The kinds that ``launcher submit`` can submit jobs to; their fields of the same name mean the same."""
ClusterSpec = LocalClusterSpec | JobsClusterSpec
KINDS: Mapping[str, type[ClusterSpec]] = {"local": LocalClusterSpec, "ray": RayClusterSpec, "slurm": SlurmClusterSpec}
