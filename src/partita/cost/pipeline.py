"""Step time of a pipeline in closed form: a sum over stages plus a maximum over stages.

    T = sum_s fill(s) + max_s steady(s)

1F1B and GPipe: fill = t, steady = (m-1) t with t = forward + backward + weights of one microbatch, m those of one
replica (Narayanan et al., 2021, section 2.1). Zero bubble (Qi et al., 2023): fill = max(f + b - w, 0), steady = m t -
fill. Exact for equal stages and free transfers; the planner's winners are ranked again by simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds for one microbatch on the stage's slowest device. ``microbatches``: most that one of its devices runs.

    ``transfer``: of what the stage receives, one way. ``whole``: of its part that runs once on the joined batch.
    ``tail``: after the last microbatch (adding replicas' gradients).
    """

    forward: float
    backward: float = 0.0
    weight: float = 0.0
    microbatches: int = 1
    transfer: float = 0.0
    whole: float = 0.0
    tail: float = 0.0


def fill(schedule: str, s: StageTime, *, train: bool = True) -> float:
    """The stage's part of the sum."""
    if not train:
        return s.forward + s.transfer + s.whole
    if schedule == "zero_bubble":
        return max(s.forward + s.backward - s.weight, 0.0) + 2.0 * s.transfer + s.whole
    return s.forward + s.backward + s.weight + 2.0 * s.transfer + s.whole


def steady(schedule: str, s: StageTime, *, train: bool = True) -> float:
    """The stage's candidate for the maximum."""
    rest = s.microbatches - 1
    if not train:
        return rest * max(s.forward, s.transfer) + s.tail
    busy = s.forward + s.backward + s.weight
    if schedule == "zero_bubble":
        return s.microbatches * busy - max(s.forward + s.backward - s.weight, 0.0) + rest * 2.0 * s.transfer + s.tail
    if schedule == "gpipe":
        return rest * max(busy, 2.0 * s.transfer) + s.tail
    return rest * (busy + 2.0 * s.transfer) + s.tail


def step_seconds(schedule: str, stages: Sequence[StageTime], *, train: bool = True) -> float:
    """Seconds of one step with one stage a device (or its replicas)."""
    return sum(fill(schedule, s, train=train) for s in stages) + max(steady(schedule, s, train=train) for s in stages)


def interleaved_seconds(busy: Sequence[Sequence[float]], microbatches: int) -> float:
    """Step time where each device runs several stages: ``busy[device]``: seconds of one microbatch in each of them.

    m times the heaviest device plus (p-1) of one average stage; exact for Megatron's deal of equal stages.
    """
    p = len(busy)
    stages = sum(len(row) for row in busy)
    average = sum(map(sum, busy)) / stages
    return microbatches * max(map(sum, busy)) + (p - 1) * average
