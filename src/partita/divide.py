"""Divide: what a plan's tensor degrees come to: one local graph per member, the same ops under the same names.

A stage of ``tensor`` devices a replica is lowered as its leaders' alone, the first device of each group; the others
walk their leader's list over their own local graph, and meet it in the collectives that stand between the ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from partita.assign import stages_of
from partita.graph import Graph
from partita.lockstep import effective
from partita.phases import divides, phases_of
from partita.plan import Plan
from partita.sharding.batch import BatchLayouts
from partita.sharding.choose import Choice, choose
from partita.sharding.prices import Prices
from partita.sharding.spmd import Local, Part, localise


@dataclass(frozen=True, slots=True)
class Division:
    """``members``: local graph of each rank. ``stage_of``, ``phases``: of every op of them. ``choices``: stage -> what
    its group divides. ``groups``: leader -> members. ``clones``: what undivided ops change, of which
    members other than the leader have a copy: buffers and inputs; ``rewritten``: parameters, where they share memory.
    """

    members: tuple[Local, ...]
    stage_of: Mapping[str, int]
    phases: Mapping[str, str]
    choices: Mapping[int, Choice]
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    clones: frozenset[str]
    rewritten: frozenset[str] = frozenset()

    @property
    def graph(self) -> Graph:
        """The leaders' graph."""
        return self.members[0].graph


def leaders(plan: Plan) -> Plan:
    """The plan with each group of members as its first device."""
    stages = tuple(replace(s, devices=tuple(g[0] for g in s.groups if g), tensor=1) for s in plan.stages)
    return replace(plan, stages=stages)


def groups_of(plan: Plan) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Leader -> its group, for every group of more than one."""
    found = {g[0]: g for s in plan.stages if s.tensor > 1 for g in s.groups}
    return tuple(found.items())


def divide(
    graph: Graph, layouts: BatchLayouts, plan: Plan, *, batch: int, prices: Prices | None = None, ranks: int = 0
) -> Division | None:
    """None where no stage of the plan has a tensor degree. The plan must have passed ``check``.

    ``ranks``: of the first so many members only (0: of all).
    """
    if all(stage.tensor <= 1 for stage in plan.stages):
        return None
    used, _ = effective(graph, layouts, leaders(plan), batch)
    sizes = plan.batch.split(batch) if batch > 0 and divides(graph, used) else (batch,)
    stage_of = stages_of(plan, graph)
    phases = phases_of(graph, used, single=len(sizes) == 1)
    outside, shared = _outside(graph, stage_of, phases), _shared(graph, stage_of, phases)
    segment_of = {op.name: (stage_of[op.name], phases[op.name]) for op in graph.ops}
    parts, choices = [], {}
    for s, stage in enumerate(plan.stages):
        if stage.tensor < 2:
            continue
        ops = frozenset(op.name for op in graph.ops if stage_of[op.name] == s and phases[op.name] != "once")
        choice = choose(graph, ops, stage.tensor, wishes=stage.shard, outside=outside, whole=shared, prices=prices)
        choices[s] = choice
        parts.append(Part(stage.tensor, ops, choice, shared))
    members = tuple(
        localise(graph, used, parts, rank, segment_of=segment_of, outside=outside)
        for rank in range(ranks or max(s.tensor for s in plan.stages))
    )
    origin = members[0].origin
    stage_of = {op.name: stage_of[origin.get(op.name, op.name)] for op in members[0].graph.ops}
    phases = {op.name: phases[origin.get(op.name, op.name)] for op in members[0].graph.ops}
    return Division(members, stage_of, phases, choices, groups_of(plan),
                    _clones(graph, parts, "buffer", "input"), _clones(graph, parts, "parameter"))  # fmt: skip


def _outside(graph: Graph, stage_of: Mapping[str, int], phases: Mapping[str, str]) -> frozenset[str]:
    """Tensors used by another stage or phase than makes them, and the model's results."""
    found = set(graph.outputs)
    for op in graph.ops:
        for name in op.uses():
            producer = graph.producer(name)
            if producer is not None:
                maker = graph.ops[producer].name
                if (stage_of[maker], phases[maker]) != (stage_of[op.name], phases[op.name]):
                    found.add(name)
    return frozenset(found)


def _shared(graph: Graph, stage_of: Mapping[str, int], phases: Mapping[str, str]) -> frozenset[str]:
    """Parameters used by several stages, or before the step begins."""
    users: dict[str, set[int]] = {}
    for op in graph.ops:
        for name in op.uses():
            if graph.tensor(name).role == "parameter":
                users.setdefault(name, set()).add(-1 if phases[op.name] == "once" else stage_of[op.name])
    return frozenset(name for name, stages in users.items() if len(stages) > 1 or -1 in stages)


def _clones(graph: Graph, parts: list[Part], *roles: str) -> frozenset[str]:
    """What comes from outside and undivided ops of a divided stage change: the leader changes it, the others a copy."""
    found: set[str] = set()
    for part in parts:
        for op in graph.ops:
            if op.name in part.ops and part.choice.options[op.name].way == "replicated":
                found.update(base for base in op.writes if graph.tensor(base).role in roles)
    return frozenset(found)
