"""Pricing: candidates as plans in the model's names, simulated as they will run, and ranked.

Single devices and teams, one process and many go the same way: lower, cost, simulate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from partita.apart import simulate_apart
from partita.cost.table import segment_costs
from partita.divide import Division, divide
from partita.errors import PlanError
from partita.group_costs import with_collectives, with_members
from partita.lower import lower
from partita.manual import stage_names
from partita.plan import Batch, Offload, Plan, Stage
from partita.planners.build import Built, usable_bytes
from partita.planners.objective import updating
from partita.planners.problem import Candidate
from partita.planners.shards import named, prices
from partita.planners.task import Task
from partita.sharding.choose import matches
from partita.simulate import simulate

RANK_OPS = 3000  # of all candidates that are simulated: work, not time, so that a request has one answer on any machine
WORTH = 0.95  # of the time of a plan of whole ops, on the devices alone, that another must not exceed where both fit


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate as a plan, with what simulation says of it. ``update``: seconds more that the optimizer, which is no
    part of the step, takes on the host for the parameters that live there."""

    plan: Plan
    built: Built
    candidate: Candidate
    seconds: float
    memory: tuple[tuple[str, int], ...]
    bottleneck: str
    over: tuple[str, float] = ("", 0.0)
    update: float = 0.0

    @property
    def lends(self) -> bool:
        return any(stage.lend for stage in self.candidate.stages)

    @property
    def divided(self) -> bool:
        return any(stage.tensor > 1 for stage in self.plan.stages)

    @property
    def fitting(self) -> bool:
        return not self.over[0]


def to_plan(task: Task, built: Built, candidate: Candidate, *, named: bool = True) -> Plan:
    """``named``: stages by modules where they are whole, as a person would write them; False: op by op (quicker)."""
    problem, graph = built.problem, task.graph
    stage_of = {
        graph.ops[i].name: s for s, c in enumerate(candidate.stages) for b in c.blocks for i in built.blocks[b].ops
    }
    count = len(candidate.stages)
    if named:
        names = stage_names(graph, stage_of, count)
    else:
        ops_of: list[list[str]] = [[] for _ in range(count)]
        for name, s in stage_of.items():
            ops_of[s].append(name)
        names = tuple(((), tuple(ops)) for ops in ops_of)
    taken = [0] * len(problem.pools)
    made = []
    sizes: tuple[int, ...] = ()
    doubled = len(candidate.stages) > problem.num_devices
    for s, choice in enumerate(candidate.stages):
        members = 1
        if choice.pool < 0:
            devices = tuple(d.name for d in task.cluster.devices)
            sizes = _by_speed(task, devices)
        elif doubled:
            devices = (problem.pools[0].devices[_turn(candidate, s, problem.num_devices)],)
        else:
            start = taken[choice.pool]
            devices = problem.pools[choice.pool].devices[start : start + choice.replicas]
            taken[choice.pool] += choice.replicas
            members = problem.pools[choice.pool].members
        if members > 1:
            devices = tuple(d for leader in devices for d in built.teams[leader])
        again = tuple(name for b in choice.recompute for name in built.units[b])
        asked, sent, hosted = (
            tuple(name for name, ops in wanted if any(stage_of[graph.ops[i].name] == s for i in ops))
            for wanted in (task.resolved.recompute, task.resolved.offload, task.resolved.lent)
        )
        away, lent = (
            tuple(name for b in chosen for name in built.units[b]) for chosen in (choice.offload, choice.lend)
        )
        wishes = _wishes(task, [i for b in choice.blocks for i in built.blocks[b].ops]) if members > 1 else ()
        recompute = tuple(dict.fromkeys((*asked, *again)))
        offload = Offload(tuple(dict.fromkeys((*sent, *away))), tuple(dict.fromkeys((*hosted, *lent))))
        made.append(Stage(devices, names[s][0], names[s][1], recompute, wishes, members, offload))
    return Plan(
        stages=tuple(made),
        model=graph.name,
        fingerprint=graph.fingerprint,
        devices=tuple(d.name for d in task.cluster.devices),
        batch=Batch(task.batch, candidate.microbatches, sizes),
        schedule=candidate.schedule if len(candidate.stages) > 1 else task.constraints.schedule or "1f1b",
        batch_norm=task.batch_norm,
        zero=problem.zero,
    )


def _turn(candidate: Candidate, stage: int, count: int) -> int:
    """Which of ``count`` devices has the stage, where each has two: dealt round, or there and back."""
    return stage % count if candidate.schedule == "interleaved" else min(stage, 2 * count - 1 - stage)


def _wishes(task: Task, ops: Sequence[int]) -> tuple[tuple[str, str], ...]:
    """The placements asked for that concern a stage of these ops."""
    graph = task.graph
    names = {graph.ops[i].name for i in ops}
    paths = {graph.tensor(n).path or n for i in ops for n in graph.ops[i].uses() if graph.tensor(n).role == "parameter"}
    return tuple(wish for wish in task.constraints.shard if any(matches(wish[0], n) for n in (*paths, *names)))


def _by_speed(task: Task, devices: Sequence[str]) -> tuple[int, ...]:
    """Samples for each device so that all end together."""
    lines = [task.seconds_of(task.cluster.device(name).kind) for name in devices]
    sizes = [1] * len(devices)
    for _ in range(task.batch - len(devices)):
        k = min(range(len(devices)), key=lambda i: lines[i][0] + max(lines[i][1], 1e-12) * (sizes[i] + 1))
        sizes[k] += 1
    return tuple(sizes)


def price(task: Task, built: Built, candidate: Candidate) -> Ranked | None:
    """The candidate as simulated, whether or not it fits; None where its stages wait for each other."""
    graph, cluster = task.graph, task.cluster
    plan = to_plan(task, built, candidate, named=False)
    synced = task.sync and len(plan.stages) == 1 and len(plan.stages[0].groups) == plan.batch.microbatches
    how = task.synced if synced else task.layouts
    division: Division | None = None
    if any(stage.tensor > 1 for stage in plan.stages):
        how = task.layouts
        division = divide(graph, how, plan, batch=task.batch or 1, prices=prices(plan, cluster), ranks=1)
        assert division is not None
        plan = named(graph, plan, division)
    program = lower(graph, how, plan, batch=task.batch or 1, train=task.train, division=division)
    table = task.table if division is None else task.divider.table_of(division.members[0], cluster)
    costs = segment_costs(program, table, cluster)
    if division is not None:
        costs = with_collectives(costs, division, program, cluster)
    optimizer = task.optimizer if task.train else "none"
    try:
        if task.processes:
            trace = simulate_apart(
                program, costs, cluster, optimizer=optimizer, zero=plan.zero, gathered=built.problem.gathered
            )
        else:
            trace = simulate(program, costs, cluster, optimizer=optimizer)
    except PlanError:
        return None
    if division is not None:
        trace = with_members(trace, program, division, optimizer=optimizer, processes=task.processes)
    busy = {device: trace.busy_seconds(device) for device, _ in trace.memory}
    slowest = max(busy, key=busy.__getitem__) if busy else ""
    missing = [(d, need - usable_bytes(cluster.device(d), processes=task.processes)) for d, need in trace.memory]
    worst = max(missing, key=lambda pair: pair[1], default=("", 0.0))
    over = worst if worst[1] > 0 else ("", 0.0)
    update = sum(updating(built.problem, s) for s in candidate.stages if s.pool >= 0)
    seconds = trace.step_seconds or candidate.seconds
    return Ranked(plan, built, candidate, seconds, trace.memory, slowest, over, update)


def rank(task: Task, listed: Iterable[tuple[Built, Candidate]]) -> tuple[list[Ranked], float]:
    """Those that fit, best first: all of a small graph's, of a large one's the first ``RANK_OPS`` worth; how full the
    best filled device of any would be.
    """
    limits = {d.name: usable_bytes(d, processes=task.processes) for d in task.cluster.devices}
    ops = 0
    ranked: list[Ranked] = []
    overshoot = float("inf")
    for built, candidate in listed:
        if ranked and ops >= RANK_OPS:
            break
        ops += len(task.graph.ops)
        found = price(task, built, candidate)
        if found is None:
            continue
        overshoot = min(overshoot, max((need / limits[device] for device, need in found.memory), default=0.0))
        if found.fitting:
            ranked.append(found)
    return best_first(ranked), overshoot


def best_first(ranked: Iterable[Ranked]) -> list[Ranked]:
    """By step time (of divided ops, or with parameters in host memory, only where that is worth it), then bytes,
    stages, microbatches."""
    return sorted(
        ranked,
        key=lambda r: (
            float(f"{(r.seconds + r.update) / (WORTH if r.divided or r.lends else 1.0):.6g}"),
            sum(n for _, n in r.memory),
            len(r.plan.stages),
            r.plan.batch.microbatches,
        ),
    )


def slowest_op(task: Task, built: Built, candidate: Candidate, stage: int) -> tuple[str, float]:
    """The op that takes most of the stage's computing on its device, and its share."""
    choice, n = candidate.stages[stage], built.problem.samples(candidate.microbatches)
    kind = task.cluster.device(built.problem.pools[choice.pool].devices[0]).kind
    table = task.table
    rows = table.forward[kind] + (table.backward[kind] + table.weight[kind] if task.train else 0.0)
    ops = [i for b in choice.blocks for i in built.blocks[b].ops]
    seconds = [float(rows[i, 0] + rows[i, 1] * n) for i in ops]
    most = max(range(len(ops)), key=seconds.__getitem__)
    return task.graph.ops[ops[most]].name, seconds[most] / max(sum(seconds), 1e-30)


def finished(task: Task, best: Ranked) -> Plan:
    """The plan with its stages named as a person would."""
    plan = to_plan(task, best.built, best.candidate)
    stages = tuple(replace(s, shard=priced.shard) for s, priced in zip(plan.stages, best.plan.stages, strict=True))
    return replace(plan, stages=stages, reasons=best.plan.reasons)
