"""Explain: why a plan is as it is, a line each: cuts and their neighbours, what binds, memory's parts, runners-up.

In closed form, from what the search has in hand; what is simulated or planned anew is ``whatif``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from partita.cost.blocks import Block
from partita.planners.build import Built
from partita.planners.objective import (
    allowed_stage,
    candidate_bytes,
    candidate_seconds,
    copying,
    lent_blocks,
    lent_bytes,
    received_bytes,
    stage_bytes,
    stage_time,
    static_bytes,
    updating,
    weight_bytes,
)
from partita.planners.problem import Candidate, Problem, StageChoice
from partita.units import format_bytes, format_seconds


def describe(problem: Problem, candidate: Candidate) -> str:
    """``2 stages (4 devices: 2x1 + 1x2), 8 microbatches, 1f1b`` in few words."""
    stages = candidate.stages
    if len(stages) == 1:
        r = stages[0].replicas
        one = "one team" if problem.pools[stages[0].pool].members > 1 else "one device"
        shape = one if r == 1 else f"{r} replicas of the whole model"
    else:
        widest = max(s.replicas for s in stages)
        shape = f"{len(stages)} stages" + (
            f" on {'+'.join(str(s.replicas) for s in stages)} devices" if widest > 1 else ""
        )
    again = sum(len(s.recompute) for s in stages)
    tail = f", {again} parts recomputed" if again else ""
    away = sum(len(s.offload) for s in stages)
    tail += f", {away} parts offloaded" if away else ""
    lent = sum(len(s.lend) for s in stages)
    tail += f", parameters of {lent} parts in host memory" if lent else ""
    teams = [problem.pools[s.pool].members for s in stages]
    if max(teams) > 1:
        tail += f", ops divided by {'+'.join(map(str, dict.fromkeys(teams)))}"
    if problem.zero:
        tail += f", ZeRO {problem.zero}"
    m = candidate.microbatches
    schedule = f", {candidate.schedule}" if len(stages) > 1 else ""
    return f"{shape}, {m} microbatch{'es' if m != 1 else ''}{schedule}{tail}"


def cut_reasons(built: Built, candidate: Candidate) -> tuple[str, ...]:
    """For each cut: where, what crosses it, and what the neighbouring cuts would cost."""
    problem, parts = built.problem, built.blocks
    now = candidate_seconds(problem, candidate)
    n = problem.samples(candidate.microbatches)
    lines = []
    for k in range(1, len(candidate.stages)):
        left, right = candidate.stages[k - 1], candidate.stages[k]
        crossing = format_bytes(received_bytes(problem, right.blocks, n))
        where = part_name(parts[min(right.blocks)])
        shifts = []
        for word, moved in (("earlier", shifted(candidate, k, -1)), ("later", shifted(candidate, k, 1))):
            if moved is None:
                continue
            block = max(left.blocks) if word == "earlier" else min(right.blocks)
            if not all(allowed_stage(problem, s.blocks, s.pool) for s in moved.stages):
                shifts.append(f"{word} is against the constraints")
                continue
            change = candidate_seconds(problem, moved) / now - 1.0
            short = [
                format_bytes(need - problem.pools[s.pool].memory_bytes)
                for need, s in zip(candidate_bytes(problem, moved), moved.stages, strict=True)
                if need > problem.pools[s.pool].memory_bytes
            ]
            text = f"exceeds a device's memory by {short[0]}" if short else f"{change:+.1%}"
            shifts.append(f"one part {word} ({part_name(parts[block])}): {text}")
        beside = "; ".join(shifts)
        lines.append(f"cut before {where}: {crossing} a microbatch cross it{'; ' + beside if beside else ''}")
    return tuple(lines)


def part_name(block: Block) -> str:
    """As the user's model calls it."""
    return block.name or f"op {block.start}"


def shifted(candidate: Candidate, k: int, by: int) -> Candidate | None:
    """Cut k one block earlier or later; None where a stage would be empty or is not a run of blocks."""
    left, right = candidate.stages[k - 1], candidate.stages[k]
    if max(left.blocks) + 1 != min(right.blocks):
        return None
    if by < 0:
        if len(left.blocks) < 2:
            return None
        block = max(left.blocks)
        new = (_without(left, block), replace(right, blocks=(block, *right.blocks)))
    else:
        if len(right.blocks) < 2:
            return None
        block = min(right.blocks)
        new = (replace(left, blocks=(*left.blocks, block)), _without(right, block))
    return replace(candidate, stages=(*candidate.stages[: k - 1], *new, *candidate.stages[k + 1 :]))


def _without(stage: StageChoice, block: int) -> StageChoice:
    return replace(
        stage,
        blocks=tuple(b for b in stage.blocks if b != block),
        recompute=tuple(b for b in stage.recompute if b != block),
        offload=tuple(b for b in stage.offload if b != block),
        lend=tuple(b for b in stage.lend if b != block),
    )


def binding_reasons(built: Built, candidate: Candidate, optimizer: str) -> tuple[str, ...]:
    """Which stage sets the pace and which device is fullest, with memory's parts."""
    problem = built.problem
    times = [stage_time(problem, s, candidate.microbatches) for s in candidate.stages]
    busy = [t.microbatches * (t.forward + t.backward + t.weight) + t.whole for t in times]
    if not problem.train:
        busy = [t.microbatches * t.forward + t.whole for t in times]
    lines = []
    if len(busy) > 1:
        slow = max(range(len(busy)), key=busy.__getitem__)
        mean = sum(b * s.replicas for b, s in zip(busy, candidate.stages, strict=True)) / sum(
            s.replicas for s in candidate.stages
        )
        lines.append(
            f"stage {slow} sets the pace: its device computes {format_seconds(busy[slow])} a step, "
            f"{busy[slow] / mean - 1:.1%} above the mean"
        )
    need = candidate_bytes(problem, candidate)
    shares = [n / problem.pools[s.pool].memory_bytes for n, s in zip(need, candidate.stages, strict=True)]
    full = max(range(len(shares)), key=shares.__getitem__)
    stage = candidate.stages[full]
    team = problem.on(stage.pool)
    total, trained = weight_bytes(team, stage.blocks)
    if lent := list(lent_blocks(team, stage)):
        away, away_trained = problem.lendable[lent].sum(axis=0)
        total, trained = total - float(away), trained - float(away_trained)
    shared, mine = problem.pools[stage.pool].shared, -(-candidate.microbatches // stage.replicas)
    static = static_bytes(team, total, trained, stage.replicas, shared, mine)
    given = given_bytes(team, stage.blocks)
    parts = [("parameters", total - given)]
    if problem.train and problem.zero and stage.replicas > 1:
        parts = [(f"parameters, gradients and {optimizer} state", static - given)]
    elif problem.train:
        parts += [("gradients", trained), (f"{optimizer} state", problem.optimizer_factor * trained)]
    parts.append(("activations and buffers", max(need[full] - static + given, 0.0)))
    split = ", ".join(f"{name} {format_bytes(value)}" for name, value in parts if value)
    lines.append(
        f"memory is fullest in stage {full}: {format_bytes(need[full])} of "
        f"{format_bytes(problem.pools[stage.pool].memory_bytes)} ({shares[full]:.0%}): {split}"
    )
    return tuple(lines)


def offload_reasons(built: Built, candidate: Candidate) -> tuple[str, ...]:
    """What waits in host memory: how much it frees and costs, beside recomputing it."""
    problem, m = built.problem, candidate.microbatches
    count, n = sum(len(s.offload) for s in candidate.stages), problem.samples(m)
    if not count:
        return ()
    freed = copies = waits = again = 0.0
    for stage in candidate.stages:
        team, pool = problem.on(stage.pool), problem.pools[stage.pool]
        times, blocks = team.times(m), list(stage.offload)
        moved = float(times.gone_at(n)[blocks].sum())
        runs = -(-m // stage.replicas)
        freed = max(freed, moved)
        copies += 2.0 * runs * moved * pool.host
        waits += runs * float(times.waits(n, stage.pool, times.gone_at(n) * pool.host)[blocks].sum())
        forward = times.forward[stage.pool][blocks]
        again += runs * float(forward[:, 0].sum() + forward[:, 1].sum() * n)
    return (
        f"activations of {count} parts wait in host memory, because they do not fit: up to {format_bytes(freed)} of a "
        f"device a microbatch; their copies take {format_seconds(copies)} a step in all, of which computing hides all "
        f"but {format_seconds(waits)} (making them again instead: {format_seconds(again)})",
    )


def lent_reasons(built: Built, candidate: Candidate, optimizer: str) -> tuple[str, ...]:
    """What lives in host memory: how much that frees, what the copies take, and the optimizer there."""
    problem, m = built.problem, candidate.microbatches
    count = sum(len(lent_blocks(problem, s)) for s in candidate.stages if s.pool >= 0)
    if not count:
        return ()
    freed = copies = waits = update = 0.0
    for stage in candidate.stages:
        runs, lent = -(-m // stage.replicas), list(lent_blocks(problem, stage))
        size, trained = problem.lendable[lent].sum(axis=0)
        freed = max(freed, -lent_bytes(problem, stage))
        both = 2.0 * size + trained if problem.train else size
        copies += runs * float(both) * problem.pools[stage.pool].host
        only = replace(stage, offload=())
        waits += runs * copying(replace(problem, offload=()), only, m)
        update += updating(problem, stage)
    what = f"parameters of {count} parts live in host memory"
    what += f", with their gradients and {optimizer} state" if problem.train else ""
    lines = [
        f"{what}: that frees up to {format_bytes(freed)} of a device; copies take {format_seconds(copies)} a step in "
        f"all, of which computing hides all but {format_seconds(waits)}"
    ]
    if problem.train:
        lines.append(
            f"an optimizer step over them runs on the host and takes about {format_seconds(update)} there, which is no "
            "part of the step predicted here (offload_parameters: false forbids it)"
        )
    return tuple(lines)


def other_reasons(
    problem: Problem, best: float, others: Sequence[tuple[Candidate, float]], limit: int = 3
) -> tuple[str, ...]:
    """The next best plans with what they would cost."""
    lines = []
    for candidate, seconds in list(others)[:limit]:
        change = f" ({seconds / best - 1:+.1%})" if best else ""
        lines.append(f"next best: {describe(problem, candidate)}: {format_seconds(seconds)}{change}")
    return tuple(lines)


def given_bytes(problem: Problem, blocks: Sequence[int]) -> float:
    """Of ``weight_bytes``, what is no parameter."""
    return sum(w.nbytes for w in problem.weights if w.given and not set(w.blocks).isdisjoint(blocks))


def shortage(problem: Problem) -> str:
    """What is short, in numbers: parameters, gradients and state against all memory, or what one part needs."""
    blocks = range(problem.num_blocks)
    total, trained = weight_bytes(problem, tuple(blocks))
    total -= given_bytes(problem, tuple(blocks))
    static = total + ((1.0 + problem.optimizer_factor) * trained if problem.train else 0.0)
    room = sum(p.memory_bytes * len(p.devices) for p in problem.pools)
    what = "parameters, gradients and optimizer state" if problem.train else "parameters"
    if static > room and not problem.may_lend and not problem.lend:
        return f"{what} alone take {format_bytes(static)}, and the devices may hold {format_bytes(room)} together"
    largest = max(p.memory_bytes for p in problem.pools)
    alone = [
        min(
            stage_bytes(problem, StageChoice((b,), 0), m, "1f1b", devices_after=1, joined=problem.joined and m > 1)
            for m in problem.microbatches
        )
        for b in blocks
    ]
    b = max(blocks, key=alone.__getitem__)
    return (
        f"{what} take {format_bytes(static)} of the {format_bytes(room)} that the devices may hold together; with its "
        f"activations the largest part takes {format_bytes(alone[b])} of a device's {format_bytes(largest)}"
    )
