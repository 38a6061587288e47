"""Mesh: devices of one kind in a grid, and the seconds of collectives along each of its axes.

4 x 8 on nodes of 8     axis 0: four devices, each of another node; axis 1: the eight of one node
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from partita.cluster import Cluster, Device
from partita.cost.communication import Team
from partita.cost.roofline import DEFAULT, Assumptions
from partita.errors import PlanError
from partita.planners.large.pools import pools


@dataclass(frozen=True, slots=True)
class Mesh:
    """``axes``: who takes part in one collective along each axis, outermost axis first. ``device``: any of them."""

    device: Device
    axes: tuple[Team, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(team.size for team in self.axes)

    @staticmethod
    def over(cluster: Cluster, shape: tuple[int, ...], *, assume: Assumptions = DEFAULT) -> Mesh:
        """The cluster's devices, in their order, as a grid of this shape; the last axis is in neighbouring devices.

        Raises PlanError unless the devices are of one kind, as many as the grid has places, and fill their nodes.
        """
        found = pools(cluster, assume)
        size = prod(shape)
        if len(found) != 1 or len(found[0].names) != size or not shape or min(shape) < 2:
            kinds = " and ".join(f"{len(p.names)} {p.device.kind}" for p in found)
            grid = " x ".join(map(str, shape)) or "no axis"
            raise PlanError(
                f"a mesh of {grid} needs {size} devices of one kind and at least two along each axis; the cluster has "
                f"{kinds}"
            )
        pool = found[0]
        axes = []
        stride = size
        for number in shape:
            stride //= number
            near = max(min(pool.per_node // stride, number), 1)
            if number % near:
                raise PlanError(f"nodes of {pool.per_node} devices do not divide a mesh axis of {number} evenly")
            axes.append(Team(near, number // near, pool.inside, pool.across))
        return Mesh(pool.device, tuple(axes))
