"""Result: a layout as a Plan in the model's own names, with what it costs and why in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from partita.cluster import Cluster
from partita.cost.roofline import Assumptions
from partita.errors import PlanError, UsageError
from partita.graph import Graph
from partita.manual import stage_names
from partita.plan import Batch, Offload, Plan, Predicted, Stage
from partita.plan_text import explain_later
from partita.planners.constraints import Constraints
from partita.planners.large.abreast import abreast, sizes_of
from partita.planners.large.clock import ranked
from partita.planners.large.degrees import Degrees, Group, Layout
from partita.planners.large.explain import reasons
from partita.planners.large.marks import blocks_in_order
from partita.planners.large.prices import Pool
from partita.planners.large.remedies import why_not
from partita.planners.large.request import requested
from partita.planners.large.search import NEAR, SECONDS, Found, Limits, Search
from partita.planners.large.whatif import margins

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
    constraints: Constraints | Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    seconds: float = SECONDS,
) -> Large:
    """The fastest layout of a large model on a described cluster, in closed form; nothing is run.

    ``batch``: samples a step (0: the graph's). ``assume``: shares of published peaks that are reached (None: mixed
    precision where every device has 16-bit products). ``limits``: instead of the numbers among the ``constraints``.
    Raises InfeasibleError with remedies that were planned and fit, PlanError for a model without ops or constraints
    that contradict each other (the smallest set that does), UsageError for an unknown objective.
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
    train = objective == "train" and any(t.needs_grad for t in graph.of_role("parameter", "input"))
    request = requested(
        graph, cluster, samples, optimizer, Constraints.read(constraints), train=train,
        assume=assume or default_assumptions(cluster), limits=limits,
    )  # fmt: skip
    search = request.search
    found = ranked(search, joined(search.run(seconds), search))
    if not found.layouts:
        raise why_not(request, found)
    best = found.layouts[0]
    flops = sum(op.flops for op in graph.ops) / graph.batch * samples * (3.0 if train else 1.0)
    plan = to_plan(search, best)
    slowest = max(range(best.degrees.stages), key=lambda s: best.stages[s].forward + best.stages[s].backward)
    plan = replace(
        plan,
        devices=tuple(d.name for d in cluster.devices),
        status="feasible",
        gap=round(found.gap, 4),
        predicted=Predicted(best.seconds, plan.stages[slowest].devices[0], _memory(search, plan, best)),
        reasons=reasons(search, found, flops),
    )
    return Large(explain_later(plan, lambda: margins(request, found.layouts)), best, found, flops)


def default_assumptions(cluster: Cluster) -> Assumptions:
    """Mixed precision where every device has products in 16 bits, else full."""
    return Assumptions(precision="mixed" if all(d.half_flops for d in cluster.devices) else "full")


def joined(found: Found, search: Search) -> Found:
    """With the layouts that put unequal devices side by side."""
    best = min((x.seconds for x in found.layouts), default=float("inf"))
    more = tuple(abreast(search, best * NEAR))
    layouts = tuple(sorted((*found.layouts, *more), key=lambda x: x.seconds))
    return replace(
        found, layouts=layouts, bound=min(found.bound, *(x.seconds for x in layouts)) if layouts else found.bound,
        tried=found.tried + len(more), listed=found.listed + len(more),
    )  # fmt: skip


def _memory(search: Search, plan: Plan, best: Layout) -> tuple[tuple[str, int], ...]:
    if best.degrees.shares:
        mine = zip(best.degrees.groups, best.stages, strict=True)
        return tuple((name, round(s.memory)) for g, s in mine for name in _side(search.pools, g))
    return tuple(
        (name, round(best.stages[s].memory))
        for s, stage in enumerate(plan.stages[: best.degrees.stages])
        for name in stage.devices
    )


def _side(there: Sequence[Pool], group: Group) -> tuple[str, ...]:
    return there[group.pool].names[: group.replicas * group.degree]


def to_plan(search: Search, layout: Layout) -> Plan:
    """Stages in the model's order; a stage's devices are replicas, each of ``tensor`` devices in a row."""
    graph, degrees = search.graph, layout.degrees
    row, count = search.units.row, degrees.stages * degrees.chunks
    p, rows = degrees.stages, search.rows(degrees)
    assert rows is not None
    again_in = [search.marks.recomputed(search.kinds, x.spans, x.recomputed) for x in layout.stages]
    again_of = [again_in[s % p][s // p] for s in range(count)]
    stage_of: dict[str, int] = {}
    marked: dict[str, int] = {}
    for s in range(count):
        start, stop = layout.stages[s % degrees.stages].spans[s // degrees.stages]
        away = [u for u in again_of[s] if rows[layout.stages[s % p].group].leaves[search.kinds[u]]]
        for u in range(start, stop):
            for i in row[u].ops:
                stage_of[graph.ops[i].name] = s
                marked[graph.ops[i].name] = 3 * s + (1 + (u in away) if u in again_of[s] else 0)
    blocks = blocks_in_order(degrees, tuple(s.spans for s in layout.stages), search.marks.places)
    names = stage_names(graph, stage_of, count)
    kept = stage_names(graph, marked, 3 * count)
    stages = []
    for s in range(count):
        rank = s % degrees.stages
        group = degrees.groups[layout.stages[rank].group]
        modules, ops = names[s]
        repeated, sent = ((*kept[k][0], *kept[k][1]) for k in (3 * s + 1, 3 * s + 2))
        stages.append(
            Stage(
                _devices(search.pools, degrees, rank, blocks[rank]),
                modules,
                ops,
                repeated,
                _shards(search, layout, s),
                group.degree,
                Offload(sent),
            )
        )
    return Plan(
        stages=tuple(stages),
        model=graph.name,
        fingerprint=graph.fingerprint,
        batch=Batch(search.batch, layout.microbatches, sizes_of(search, layout) if degrees.shares else ()),
        schedule=degrees.schedule if degrees.stages > 1 else search.limits.order or degrees.schedule,
        zero=degrees.zero,
    )


def _devices(there: Sequence[Pool], degrees: Degrees, rank: int, block: int) -> tuple[str, ...]:
    if degrees.shares:
        return tuple(name for group in degrees.groups for name in _side(there, group))
    group = degrees.groups[degrees.group_of(rank)]
    size = group.replicas * group.degree
    return there[group.pool].names[block * size : (block + 1) * size]


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
