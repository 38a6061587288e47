"""Result: a layout as a Plan in the model's own names, with what it costs and why in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from partita.cluster import Cluster
from partita.cost.roofline import Assumptions
from partita.errors import InfeasibleError, PlanError, UsageError
from partita.graph import Graph
from partita.manual import stage_names
from partita.plan import Batch, Plan, Predicted, Stage
from partita.planners.large.explain import reasons
from partita.planners.large.layout import Degrees, Layout
from partita.planners.large.pools import pools
from partita.planners.large.prices import Pool
from partita.planners.large.remedies import remedies
from partita.planners.large.search import SECONDS, Found, Limits, Search
from partita.planners.large.units import units

HEADROOM = 0.95
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


@dataclass(frozen=True, slots=True)
class Large:
    """``plan`` and the layout it says. ``flops``: of one step of the model, forward and backward once each."""

    plan: Plan
    layout: Layout
    found: Found
    flops: float


def plan_large(
    graph: Graph,
    cluster: Cluster,
    *,
    batch: int = 0,
    optimizer: str = "adamw",
    objective: str = "train",
    assume: Assumptions | None = None,
    limits: Limits | None = None,
    seconds: float = SECONDS,
) -> Large:
    """The fastest layout of a large model on a described cluster, in closed form; nothing is run.

    ``batch``: samples a step (0: the graph's). ``assume``: shares of published peaks that are reached (None: mixed
    precision where every device has 16-bit products). Raises InfeasibleError with remedies that were planned and fit,
    UsageError for an unknown objective, PlanError for a model without ops.
    """
    if objective not in ("train", "inference"):
        raise UsageError(f"objective {objective!r} is not known; take 'train' or 'inference'")
    if not graph.ops:
        raise PlanError("the model runs no ops for these inputs: there is nothing to divide")
    samples = batch or graph.batch
    if not graph.batch:
        raise PlanError(
            "the model's inputs share no batch dim, so it cannot be divided into microbatches or replicas: "
            + "; ".join(graph.notes)
        )
    chosen = assume or default_assumptions(cluster)
    row = units(graph)
    there = pools(cluster, chosen)
    train = objective == "train" and any(t.needs_grad for t in graph.of_role("parameter", "input"))
    search = Search(
        graph,
        row,
        there,
        batch=samples,
        assume=chosen,
        optimizer=optimizer,
        headroom=HEADROOM,
        train=train,
        limits=limits,
    )
    found = search.run(seconds)
    if not found.layouts:
        lines = "".join(f"\n  - {line}" for line in remedies(search))
        raise InfeasibleError(f"{graph.name} does not fit {_cluster_text(there)}: {found.why_not}{lines}")
    best = found.layouts[0]
    flops = sum(op.flops for op in graph.ops) / graph.batch * samples * (3.0 if train else 1.0)
    plan = to_plan(search, best)
    memory = tuple(
        (name, round(best.stages[s % best.degrees.stages].memory))
        for s, stage in enumerate(plan.stages[: best.degrees.stages])
        for name in stage.devices
    )
    slowest = max(range(best.degrees.stages), key=lambda s: best.stages[s].forward + best.stages[s].backward)
    plan = replace(
        plan,
        devices=tuple(d.name for d in cluster.devices),
        status="feasible",
        gap=round(found.gap, 4),
        predicted=Predicted(best.seconds, plan.stages[slowest].devices[0], memory),
        reasons=reasons(search, found, flops),
    )
    return Large(plan, best, found, flops)


def default_assumptions(cluster: Cluster) -> Assumptions:
    """Mixed precision where every device has products in 16 bits, else full."""
    return Assumptions(precision="mixed" if all(d.half_flops for d in cluster.devices) else "full")


def to_plan(search: Search, layout: Layout) -> Plan:
    """Stages in the model's order; a stage's devices are replicas, each of ``tensor`` devices in a row."""
    graph, degrees = search.graph, layout.degrees
    row, count = search.units.row, degrees.stages * degrees.chunks
    again_of = [_recomputed(search, layout, s) for s in range(count)]
    stage_of: dict[str, int] = {}
    marked: dict[str, int] = {}
    for s in range(count):
        start, stop = layout.stages[s % degrees.stages].spans[s // degrees.stages]
        for u in range(start, stop):
            for i in row[u].ops:
                stage_of[graph.ops[i].name] = s
                marked[graph.ops[i].name] = 2 * s + (u in again_of[s])
    names = stage_names(graph, stage_of, count)
    again = stage_names(graph, marked, 2 * count)
    stages = []
    for s in range(count):
        rank = s % degrees.stages
        group = degrees.groups[layout.stages[rank].group]
        modules, ops = names[s]
        repeated = (*again[2 * s + 1][0], *again[2 * s + 1][1])
        stages.append(
            Stage(
                _devices(search.pools, degrees, rank), modules, ops, repeated, _shards(search, layout, s), group.degree
            )
        )
    return Plan(
        stages=tuple(stages),
        model=graph.name,
        fingerprint=graph.fingerprint,
        batch=Batch(search.batch, layout.microbatches),
        schedule="interleaved" if degrees.chunks > 1 else "1f1b",
        zero=degrees.zero,
    )


def _devices(there: Sequence[Pool], degrees: Degrees, rank: int) -> tuple[str, ...]:
    used = [0] * len(there)
    for group in degrees.groups:
        size = group.replicas * group.degree
        if rank < group.stages:
            start = used[group.pool] + rank * size
            return there[group.pool].names[start : start + size]
        used[group.pool] += group.stages * size
        rank -= group.stages
    raise IndexError(rank)


def _recomputed(search: Search, layout: Layout, s: int) -> set[int]:
    """Units of stage ``s`` (in the model's order) that run again in backward: the first of each kind."""
    stage = layout.stages[s % layout.degrees.stages]
    left = list(stage.recomputed)
    for chunk, (start, stop) in enumerate(stage.spans):
        chosen = set()
        for u in range(start, stop):
            kind = search.units.row[u].kind
            if left[kind] > 0:
                left[kind] -= 1
                chosen.add(u)
        if chunk == s // layout.degrees.stages:
            return chosen
    raise IndexError(s)


def _shards(search: Search, layout: Layout, s: int) -> tuple[tuple[str, str], ...]:
    """(parameter with its numbers as '*', placement) of every parameter the stage divides."""
    degrees = layout.degrees
    group = degrees.groups[layout.stages[s % degrees.stages].group]
    if group.degree == 1:
        return ()
    start, stop = layout.stages[s % degrees.stages].spans[s // degrees.stages]
    found: dict[str, str] = {}
    for kind in dict.fromkeys(search.units.row[u].kind for u in range(start, stop)):
        division = search.prices.division(search.pools[group.pool], kind, group.degree, degrees.sequence)
        for name, form in division.parameters if division else ():
            if isinstance(form, int):
                found[_NUMBER.sub("*", search.graph.tensor(name).path or name)] = f"Shard({form})"
    return tuple(found.items())


def _cluster_text(there: Sequence[Pool]) -> str:
    return " + ".join(f"{p.count} x {p.device.kind}" for p in there)
