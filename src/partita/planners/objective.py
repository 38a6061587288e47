"""Objective: seconds and bytes of one stage and of a whole candidate, from the blocks themselves.

The reference for every planner: ``exhaustive`` minimises it by trying all, ``stages`` by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from partita.apart import passes
from partita.cost.memory import alive
from partita.cost.pipeline import StageTime, fill, steady
from partita.planners.problem import Array, Candidate, Problem, StageChoice

Bytes = TypeVar("Bytes", float, Array)


def _at(rows: Array, blocks: Sequence[int], samples: int) -> float:
    fixed, per_sample = rows[list(blocks)].sum(axis=0)
    return float(fixed + per_sample * samples)


def received_bytes(problem: Problem, blocks: Sequence[int], samples: int) -> float:
    """Bytes a stage of these blocks takes from other stages for one microbatch."""
    mine = set(blocks)
    return sum(
        e.fixed + e.per_sample * samples
        for e in problem.edges
        if e.producer not in mine and not mine.isdisjoint(e.consumers)
    )


def weight_bytes(problem: Problem, blocks: Sequence[int]) -> tuple[float, float]:
    """(all, trained) bytes of the parameters these blocks take; shared ones once."""
    mine = set(blocks)
    used = [w for w in problem.weights if not mine.isdisjoint(w.blocks)]
    return sum(w.nbytes for w in used), sum(w.trained for w in used)


def tail_seconds(problem: Problem, trained: Bytes, replicas: int, shared: bool, microbatches: int) -> Bytes:
    """Adding the replicas' gradients: one after the other in a shared memory, else as a ring, with ZeRO's gathering.

    ``microbatches``: of one replica.
    """
    if replicas < 2 or not problem.train:
        return 0.0 * trained
    if shared:
        return (replicas - 1) * problem.reduce_seconds_per_byte * trained
    n = passes(problem.zero, once=microbatches == 1)
    return n * (replicas - 1) * (problem.seconds_per_byte / replicas * trained + problem.latency)


def static_bytes(
    problem: Problem, total: Bytes, trained: Bytes, replicas: int, shared: bool, microbatches: int
) -> Bytes:
    """Parameters, gradients and optimizer state on a device of a stage, under ZeRO's level.

    ``microbatches``: of one replica. Where it has several, gradients stay whole until the last one ends, and parameters
    are gathered for the whole step.
    """
    if not problem.train:
        return total
    level = problem.zero if replicas > 1 and not shared else 0
    once = microbatches == 1
    result = total + problem.optimizer_factor / (replicas if level else 1) * trained
    result = result + trained / (replicas if level > 1 and once else 1)
    if level == 3 and once:
        result = result - trained * (1.0 - 1.0 / replicas) + np.minimum(problem.gathered, trained)
    return result


def is_joined(problem: Problem, stages: int, replicas: int, microbatches: int) -> bool:
    """Whether a part runs once on the joined batch, so that all forwards come before all backwards."""
    return problem.joined and microbatches > 1 and not (problem.sync and stages == 1 and replicas == microbatches)


def stage_time(problem: Problem, choice: StageChoice, microbatches: int, *, synced: bool = False) -> StageTime:
    """Seconds of the stage for one microbatch."""
    problem = problem.on(choice.pool)
    times, n = problem.times(microbatches, synced=synced), problem.samples(microbatches)
    again = set(choice.recompute) | (set(problem.recompute) & set(choice.blocks)) if problem.train else set()
    mine = -(-microbatches // choice.replicas)
    more = copying(problem, choice, microbatches, synced=synced) + updating(problem, choice) / mine
    forward = _at(times.forward[choice.pool], choice.blocks, n)
    received = received_bytes(problem, choice.blocks, n)
    _, trained = weight_bytes(problem, choice.blocks)
    return StageTime(
        forward=forward + (0.0 if problem.train else more),
        backward=_at(times.backward[choice.pool], choice.blocks, n)
        + _at(times.forward[choice.pool], sorted(again), n)
        + more,
        weight=_at(times.weight[choice.pool], choice.blocks, n),
        microbatches=mine,
        transfer=(problem.latency + received * problem.seconds_per_byte) if received else 0.0,
        whole=float(sum(times.whole[choice.pool, b] for b in choice.blocks)),
        tail=tail_seconds(problem, trained, choice.replicas, problem.pools[choice.pool].shared, mine),
    )


def copying(problem: Problem, choice: StageChoice, microbatches: int, *, synced: bool = False) -> float:
    """Seconds for which a microbatch waits for what is copied to and from the host. ``problem``: ``on`` its pool."""
    away, lent = list(offloaded(problem, choice)), list(lent_blocks(problem, choice))
    if not away and not lent:
        return 0.0
    times, n = problem.times(microbatches, synced=synced), problem.samples(microbatches)
    host, moved, home = problem.pools[choice.pool].host, np.zeros(problem.num_blocks), 0.0
    if away:
        moved[away] += times.gone_at(n)[away]
    if lent:
        moved[lent] += problem.lendable[lent, 0]
        home = float(problem.lendable[lent, 1].sum()) * host if problem.train else 0.0
    waits = times.waits(n, choice.pool, moved * host, train=problem.train)
    return float(waits[sorted({*away, *lent})].sum()) + home


def updating(problem: Problem, choice: StageChoice) -> float:
    """Seconds that the optimizer takes more, once a step, as it runs on the host for what lives there."""
    lent = list(lent_blocks(problem, choice))
    return problem.update * float(problem.lendable[lent, 1].sum()) if lent and problem.train else 0.0


def lent_blocks(problem: Problem, choice: StageChoice) -> tuple[int, ...]:
    """Blocks of the stage whose parameters live in host memory."""
    if not (choice.lend or problem.lend) or not problem.lends(choice.pool):
        return ()
    return tuple(sorted(set(choice.lend) | (set(problem.lend) & set(choice.blocks))))


def lent_gains(problem: Problem) -> Array:
    """Bytes that stay on a device for each block's parameters, their gradients and state, where these are lendable."""
    rows = problem.lendable if len(problem.lendable) else np.zeros((problem.num_blocks, 2))
    result: Array = rows[:, 0] + (1.0 + problem.optimizer_factor) * rows[:, 1] * problem.train
    return result


def lent_bytes(problem: Problem, choice: StageChoice) -> float:
    """What a device of the stage holds more (it is less, mostly) as parameters live on the host."""
    lent = list(lent_blocks(problem, choice))
    if not lent:
        return 0.0
    sizes = problem.lendable[lent, 0]
    copies = copies_bytes(float(sizes.sum()), float(sizes.max()))
    return float(copies) - float(lent_gains(problem)[lent].sum())


def copies_bytes(total: Bytes, largest: Bytes) -> Bytes:
    """Bytes on the device of parameters that live on the host, ``total`` together and ``largest`` of one block: copies
    for three blocks at most, the one that runs and those beside it (``cost.away.copies_alive``). A gradient on its way
    home is ``transient``, as others are."""
    result: Bytes = np.minimum(total, 3.0 * largest)
    return result


def offloaded(problem: Problem, choice: StageChoice) -> tuple[int, ...]:
    """Blocks of the stage whose activations leave the device."""
    if not problem.train or not problem.pools[choice.pool].host:
        return ()
    return tuple(sorted(set(choice.offload) | (set(problem.offload) & set(choice.blocks))))


def stage_bytes(
    problem: Problem,
    choice: StageChoice,
    microbatches: int,
    schedule: str,
    *,
    devices_after: int,
    joined: bool,
    synced: bool = False,
    least: bool = False,
) -> float:
    """Peak bytes on one device of the stage: the one that holds what replicas share. ``least``: with one microbatch a
    replica gradients come as what they are made of goes, and are not added to all of it.
    """
    problem = problem.on(choice.pool)
    times, n = problem.times(microbatches, synced=synced), problem.samples(microbatches)
    total, trained = weight_bytes(problem, choice.blocks)
    received = received_bytes(problem, choice.blocks, n)
    lent = lent_bytes(problem, choice)
    if not problem.train:
        return total + lent + received + _largest(times.transient, choice.blocks, n)
    mine = -(-microbatches // choice.replicas)
    static = static_bytes(problem, total, trained, choice.replicas, problem.pools[choice.pool].shared, mine)
    again = set(choice.recompute) | (set(problem.recompute) & set(choice.blocks))
    live = [b for b in choice.blocks if b not in again]
    away = offloaded(problem, choice)
    gone = times.gone_at(n) if away else np.zeros(0)
    held = _at(times.saved, live, n) + _at(times.kept, sorted(again), n) + received - float(gone[list(away)].sum())
    living = alive(
        schedule,
        microbatches=mine,
        replicas=choice.replicas,
        devices_after=devices_after,
        devices=problem.num_devices,
        joined=joined,
    )
    owed = _at(times.owed, choice.blocks, n) + received
    peak = _largest(times.saved, choice.blocks, n) if again else 0.0
    peak += 2.0 * float(gone[list(choice.blocks)].max()) if away else 0.0
    whole = float(sum(times.whole_saved[b] for b in choice.blocks))
    activations = living.peak(held, owed, again=bool(again or away))
    if least and mine == 1:
        activations = max(0.0, activations - trained)
    return static + lent + activations + whole + peak + received + _largest(times.transient, choice.blocks, n)


def _largest(rows: Array, blocks: Sequence[int], samples: int) -> float:
    return float(max((rows[b, 0] + rows[b, 1] * samples for b in blocks), default=0.0))


def candidate_seconds(problem: Problem, candidate: Candidate) -> float:
    """The closed-form step time, whether or not it fits."""
    count, m = len(candidate.stages), candidate.microbatches
    schedule = candidate.schedule
    times = []
    for choice in candidate.stages:
        joined = is_joined(problem, count, choice.replicas, m)
        times.append(stage_time(problem, choice, m, synced=problem.joined and not joined))
    return sum(fill(schedule, t, train=problem.train) for t in times) + max(
        steady(schedule, t, train=problem.train) for t in times
    )


def candidate_bytes(problem: Problem, candidate: Candidate, *, least: bool = False) -> tuple[float, ...]:
    """Peak bytes on the fullest device of each stage (``least``: as ``stage_bytes`` has it)."""
    count, m = len(candidate.stages), candidate.microbatches
    after = sum(c.replicas for c in candidate.stages)
    result = []
    for choice in candidate.stages:
        joined = is_joined(problem, count, choice.replicas, m)
        result.append(
            stage_bytes(
                problem, choice, m, candidate.schedule, devices_after=after, joined=joined,
                synced=problem.joined and not joined, least=least,
            )
        )  # fmt: skip
        after -= choice.replicas
    return tuple(result)


def fits(problem: Problem, candidate: Candidate, *, least: bool = False) -> bool:
    """Whether every stage stays within its devices' memory (``least``: or may, by what it holds at least)."""
    need = zip(candidate_bytes(problem, candidate, least=least), candidate.stages, strict=True)
    return all(bytes_ <= problem.pools[c.pool].memory_bytes for bytes_, c in need)


def allowed_stage(problem: Problem, blocks: Sequence[int], pool: int) -> bool:
    """Whether the constraints let these blocks be one stage on this pool."""
    mine = set(blocks)
    for group in problem.together:
        if 0 < len(mine.intersection(group)) < len(set(group)):
            return False
    if any(min(mine) < b <= max(mine) for b in problem.breaks):
        return False
    return all(b not in mine or pool in pools for b, pools in problem.pools_of)
