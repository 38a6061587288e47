"""Intra-op planning: a sharding along every axis of a device mesh for every op of a graph, at least cost."""

from partita.planners.intra.mesh import Mesh
from partita.planners.intra.plan import IntraPlan, plan_intra_op

__all__ = ["IntraPlan", "Mesh", "plan_intra_op"]
