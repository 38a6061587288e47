"""Explain: why a plan is as it is, a line each: cuts and their neighbours, what binds, memory's parts, runners-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from partita.cost.blocks import Block
from partita.cost.memory import static_bytes
from partita.planners.build import Built
from partita.planners.objective import (
    allowed_stage,
    candidate_bytes,
    candidate_seconds,
    received_bytes,
    stage_time,
    weight_bytes,
)
from partita.planners.problem import Candidate, Problem, StageChoice
from partita.units import format_bytes, format_seconds


def describe(problem: Problem, candidate: Candidate) -> str:
    """``2 stages (4 devices: 2x1 + 1x2), 8 microbatches, 1f1b`` in few words."""
    stages = candidate.stages
    if len(stages) == 1:
        r = stages[0].replicas
        shape = "one device" if r == 1 else f"{r} replicas of the whole model"
    else:
        widest = max(s.replicas for s in stages)
        shape = f"{len(stages)} stages" + (
            f" on {'+'.join(str(s.replicas) for s in stages)} devices" if widest > 1 else ""
        )
    again = sum(len(s.recompute) for s in stages)
    tail = f", {again} parts recomputed" if again else ""
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
        where = _name(parts[min(right.blocks)])
        shifts = []
        for word, moved in (("earlier", _shift(candidate, k, -1)), ("later", _shift(candidate, k, 1))):
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
            shifts.append(f"one part {word} ({_name(parts[block])}): {text}")
        beside = "; ".join(shifts)
        lines.append(f"cut before {where}: {crossing} a microbatch cross it{'; ' + beside if beside else ''}")
    return tuple(lines)


def _name(block: Block) -> str:
    return block.name or f"op {block.start}"


def _shift(candidate: Candidate, k: int, by: int) -> Candidate | None:
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
    total, trained = weight_bytes(problem, stage.blocks)
    state = problem.optimizer_factor * trained
    rest = need[full] - total - state - (trained if problem.train else 0.0)
    parts = [("parameters", total)]
    if problem.train:
        parts += [("gradients", trained), (f"{optimizer} state", state)]
    parts.append(("activations and buffers", max(rest, 0.0)))
    split = ", ".join(f"{name} {format_bytes(value)}" for name, value in parts if value)
    lines.append(
        f"memory is fullest in stage {full}: {format_bytes(need[full])} of "
        f"{format_bytes(problem.pools[stage.pool].memory_bytes)} ({shares[full]:.0%}): {split}"
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


def replica_bytes(problem: Problem, candidate: Candidate, stage: int, optimizer: str) -> tuple[float, float]:
    """Static bytes of a stage's first device and of its other replicas."""
    choice = candidate.stages[stage]
    total, trained = weight_bytes(problem, choice.blocks)
    shared = problem.pools[choice.pool].shared
    first = static_bytes(total, trained, optimizer=optimizer, train=problem.train)
    return first, static_bytes(total, trained, optimizer=optimizer, train=problem.train, owner=not shared)
