"""Likened: prices of a member's share of divided ops, which nobody measured, from those of the whole ops.

The counts (``cost.ops``) say how the share compares with the whole op; the measured timing how far the counts are off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from partita.cluster import Cluster
from partita.cost.table import Array, CostTable, cost_table
from partita.graph import Graph

RANGE = (0.05, 20.0)  # of measured over counted seconds that is believed


def factors(table: CostTable, cluster: Cluster) -> dict[str, Array]:
    """Device kind -> of each op, its seconds in ``table`` over the counted ones; nothing where none was measured."""
    if not table.blocks:
        return {}
    counted = cost_table(table.graph, cluster)
    at = np.array([1.0, max(table.graph.batch, 1)])
    found = {}
    for kind in counted.kinds:
        mine, theirs = ((t.forward[kind] + t.backward[kind] + t.weight[kind]) @ at for t in (table, counted))
        found[kind] = np.clip(mine / np.maximum(theirs, 1e-30), *RANGE)
    return found


def likened(
    table: CostTable,
    local: Graph,
    origin: Mapping[str, str],
    cluster: Cluster,
    known: Mapping[str, Array] | None = None,
) -> CostTable:
    """Prices of the ops of ``local``: as much slower or faster than counted as the ops they come of are in ``table``.

    ``origin``: name of an op of ``local`` -> that of the whole op, where it is another. ``known``: their ``factors``.
    """
    made = cost_table(local, cluster)
    position = {op.name: i for i, op in enumerate(table.graph.ops)}
    came = [position[origin.get(op.name, op.name)] for op in local.ops]
    found = known if known is not None else factors(table, cluster)
    for kind in (k for k in made.kinds if k in found):
        for rows in (made.forward, made.backward, made.weight):
            rows[kind][...] *= found[kind][came][:, None]
    return replace(made, alone={kind: rows[came] for kind, rows in table.alone.items()})
