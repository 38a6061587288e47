"""Words: a plan's reasons, a line each, and what is said where nothing fits."""

from __future__ import annotations

from collections.abc import Sequence

from partita.errors import InfeasibleError
from partita.plan import Plan
from partita.plan_text import counted
from partita.planners.explain import (
    binding_reasons,
    cut_reasons,
    lent_reasons,
    offload_reasons,
    other_reasons,
    shortage,
)
from partita.planners.pricing import Ranked
from partita.planners.problem import Problem
from partita.planners.remedies import Request, conflict, remedies
from partita.planners.searching import SLACK
from partita.planners.task import Task
from partita.units import format_bytes, format_seconds


def reasons(task: Task, ranked: Sequence[Ranked], gap: float, searched: Sequence[str]) -> tuple[str, ...]:
    """Of the first of these plans. ``searched``: what came of plans that divide ops or lend parameters, in words."""
    best, others = ranked[0], ranked[1:]
    problem, one = best.built.problem, task.one_device_seconds
    lines = [
        f"searched {problem.num_blocks} parts of {len(task.graph.ops)} ops on {len(task.cluster.devices)} devices, "
        f"{', '.join(map(str, problem.microbatches))} microbatches, {', '.join(problem.schedules)}; "
        f"the fastest few were simulated: {format_seconds(best.seconds)} a step"
    ]
    if best.seconds:
        lines.append(f"{one / best.seconds:.2f}x one device alone ({format_seconds(one)})")
    lines += [*divided(best.plan), *searched]
    mixed = any(c.pool < 0 for c in best.candidate.stages)
    doubled = len(best.candidate.stages) > problem.num_devices
    if mixed:
        lines.append(f"devices of unequal speed get {', '.join(map(str, best.plan.batch.sizes))} samples each")
    elif not doubled:
        lines += cut_reasons(best.built, best.candidate)
        lines += binding_reasons(best.built, best.candidate, task.optimizer)
    couplings = getattr(task.layouts, "couplings", ())
    if problem.joined and couplings:
        what = "; ".join(f"{c.op}: {c.reason}" for c in couplings[:2])
        lines.append(f"what follows an op that needs the whole batch runs once a step, unsplit ({what})")
    elif not task.layouts.microbatchable:
        lines.append("the batch cannot be cut into microbatches, so one stage works at a time")
    if any(c.recompute for c in best.candidate.stages):
        parts = sum(len(c.recompute) for c in best.candidate.stages)
        lines.append(f"{parts} parts are recomputed in backward, because their activations do not fit")
    if not mixed:
        lines += offload_reasons(best.built, best.candidate)
        lines += lent_reasons(best.built, best.candidate, task.optimizer)
    if gap > SLACK:
        lines.append(f"memory limits cost at most {gap:.1%} of the step time")
    elif gap > 0:
        lines.append(f"no plan is more than {gap:.2%} faster in the closed form; the search stopped there")
    shown: list[tuple[Problem, Ranked]] = [(r.built.problem, r) for r in others[:3]]
    lines += [line for p, r in shown for line in other_reasons(p, best.seconds, [(r.candidate, r.seconds)])]
    return tuple(lines)


def divided(plan: Plan) -> tuple[str, ...]:
    """What a plan divides, of ops and of state."""
    lines = []
    for s, stage in enumerate(plan.stages):
        if stage.tensor > 1:
            names = ", ".join(f"{name} {text}" for name, text in stage.shard[:3])
            more = f" and {len(stage.shard) - 3} more" if len(stage.shard) > 3 else ""
            lines.append(
                f"stage {s}: every {stage.tensor} devices divide single ops between them, and {len(stage.shard)} "
                f"parameters: {names}{more}"
            )
    if plan.zero:
        what = "optimizer state" + ", gradients" * (plan.zero > 1) + ", parameters" * (plan.zero > 2)
        lines.append(f"ZeRO {plan.zero}: replicas divide {what} between them (a process a device: torchrun)")
    return tuple(lines)


def why_not(task: Task, request: Request, problem: Problem, reason: str) -> InfeasibleError:
    """The error for a request that cannot be met within memory, with what can."""
    guilty = conflict(request)
    limits = counted([format_bytes(d.memory_bytes) for d in task.cluster.devices])
    if len(task.cluster.devices) <= 8:
        limits = ", ".join(f"{d.name} {format_bytes(d.memory_bytes)}" for d in task.cluster.devices)
    if guilty:
        reason = f"these cannot be met together: {', '.join(map(str, guilty))}"
        reason = reason if len(guilty) > 1 else f"within the devices' memory {guilty[0]} cannot be met"
    elif problem.num_blocks:
        reason = f"{reason}: {shortage(problem)}"
    text = f"{task.name}: {reason} ({limits}; batch {task.batch}, {task.optimizer})"
    return InfeasibleError(text, remedies(request, guilty))
