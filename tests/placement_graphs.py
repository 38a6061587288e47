"""Instances in the format of Tarnawski et al., drawn: layered or series-parallel, with or without training."""

from __future__ import annotations

from random import Random
from typing import Any, Literal

Json = dict[str, Any]
Family = Literal["layered", "series-parallel"]


def instance(
    seed: int, family: Family, size: int, *, training: bool = False, devices: int = 3, transfer: float = 1.0,
    memory: float = 2.0,
) -> Json:  # fmt: skip
    """About ``size`` forward nodes on accelerators (the last one also on a CPU beside them).

    ``transfer``: what a transfer takes, in nodes. ``memory``: of all accelerators together, in what the nodes need.
    """
    draw = Random(seed)
    pairs = _layered(draw, size) if family == "layered" else _series_parallel(draw, size)
    count = 1 + max((max(pair) for pair in pairs), default=0)
    nodes = [_node(draw, i) for i in range(count)]
    if training:
        nodes, pairs = _with_backward(draw, nodes, pairs)
    cost = {node["id"]: transfer * draw.choice([0.0, 0.1, 1.0, 3.0]) * draw.random() for node in nodes}
    edges = [{"sourceId": a, "destId": b, "cost": cost[a]} for a, b in sorted(set(pairs))]
    total = sum(node["size"] for node in nodes)
    return {
        "maxFPGAs": devices - 1, "maxCPUs": 1, "maxSizePerFPGA": memory * total / max(devices - 1, 1), "nodes": nodes,
        "edges": edges,
    }  # fmt: skip


def _node(draw: Random, name: int, **more: Any) -> Json:
    fast = draw.choice([0.0, 0.2, 1.0, 1.0, 5.0]) * (0.5 + draw.random())
    slow = fast * draw.choice([2.0, 10.0, 20.0]) + 0.01
    return {
        "id": name, "fpgaLatency": fast, "cpuLatency": slow, "supportedOnFpga": int(draw.random() > 0.05),
        "isBackwardNode": 0, "size": draw.random(), **more,
    }  # fmt: skip


def _layered(draw: Random, size: int) -> list[tuple[int, int]]:
    """Layers of one to four nodes; each node takes one to three of the layer before, and sometimes an earlier one."""
    pairs, before, earlier, count = [], [0], [0], 1
    while count < size:
        layer = list(range(count, min(count + draw.randint(1, 4), size)))
        for node in layer:
            pairs += [(source, node) for source in draw.sample(before, min(len(before), draw.randint(1, 3)))]
            if draw.random() < 0.15:
                pairs.append((draw.choice(earlier), node))
        before, earlier, count = layer, earlier + layer, count + len(layer)
    return pairs


def _series_parallel(draw: Random, size: int) -> list[tuple[int, int]]:
    """From one edge, edges are divided in two or doubled until there are enough nodes."""
    pairs, count = [(0, 1)], 2
    while count < size:
        at = draw.randrange(len(pairs))
        a, b = pairs[at]
        if draw.random() < 0.6:
            pairs[at] = (a, count)
            pairs.append((count, b))
            count += 1
        elif count + 1 < size:
            pairs += [(a, count), (count, b)]
            count += 1
        else:
            break
    return pairs


def _with_backward(
    draw: Random, nodes: list[Json], pairs: list[tuple[int, int]]
) -> tuple[list[Json], list[tuple[int, int]]]:
    """A backward node for most nodes, some in colours of their own; edges turned round, and from nodes to their own."""
    count = len(nodes)
    mine: dict[int, int] = {}
    more, edges = [], list(pairs)
    for node in nodes:
        if draw.random() < 0.85:
            mine[node["id"]] = name = count + node["id"]
            orphan = draw.random() < 0.1
            colour = {"colorClass": name if orphan else node["id"]}
            more.append(_node(draw, name, isBackwardNode=1, supportedOnFpga=node["supportedOnFpga"], **colour))
            node["colorClass"] = node["id"]
            edges.append((node["id"], name))
    edges += [(mine[b], mine[a]) for a, b in pairs if a in mine and b in mine]
    return nodes + more, edges
