"""Steps of a schedule: forward, backward, weight gradient of one stage on one microbatch; facts about their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Placement: TypeAlias = tuple[tuple[str, ...], ...]
"""Devices of each stage; microbatch ``m`` of stage ``s`` runs on ``placement[s][m % len(placement[s])]``."""


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """``kind``: 'F' forward, 'B' backward (with the weight gradients unless the schedule has W steps), 'W'."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


Orders: TypeAlias = dict[str, tuple[Step, ...]]


def device_of(placement: Placement, stage: int, microbatch: int) -> str:
    """The device which runs this microbatch of this stage."""
    return placement[stage][microbatch % len(placement[stage])]


def devices_of(placement: Placement) -> tuple[str, ...]:
    """Every device once, in the order of the stages."""
    return tuple(dict.fromkeys(device for stage in placement for device in stage))


def draw(orders: Mapping[str, tuple[Step, ...]]) -> str:
    """One line a device: ``a: F0 F1 B0 B1`` (``F1.0``: stage 1, microbatch 0, where a device has several stages)."""
    lines = []
    for device, steps in orders.items():
        several = len({step.stage for step in steps}) > 1
        words = (str(step) if several else f"{step.kind}{step.microbatch}" for step in steps)
        lines.append(f"{device}: {' '.join(words)}")
    return "\n".join(lines)


def needs(step: Step, num_stages: int) -> tuple[Step, ...]:
    """Steps that must have ended before this one begins."""
    kind, stage, microbatch = step.kind, step.stage, step.microbatch
    if kind == "F":
        return (Step("F", stage - 1, microbatch),) if stage else ()
    if kind == "W":
        return (Step("B", stage, microbatch),)
    later = (Step("B", stage + 1, microbatch),) if stage + 1 < num_stages else ()
    return (Step("F", stage, microbatch), *later)


def stuck(orders: Mapping[str, tuple[Step, ...]], num_stages: int) -> tuple[str, ...]:
    """Empty where every device reaches the end of its list; else who waits for what, one line a device."""
    done: set[Step] = set()
    position = dict.fromkeys(orders, 0)
    moved = True
    while moved:
        moved = False
        for device, steps in orders.items():
            while position[device] < len(steps) and all(n in done for n in needs(steps[position[device]], num_stages)):
                done.add(steps[position[device]])
                position[device] += 1
                moved = True
    lines = []
    for device, steps in orders.items():
        if position[device] < len(steps):
            step = steps[position[device]]
            missing = ", ".join(str(n) for n in needs(step, num_stages) if n not in done)
            lines.append(f"{device} waits with {step} for {missing}")
    return tuple(lines)


def max_in_flight(orders: Mapping[str, tuple[Step, ...]]) -> dict[tuple[str, int], int]:
    """(device, stage) -> most microbatches whose activations it holds at once (until B; with W steps until W)."""
    peak: dict[tuple[str, int], int] = {}
    for device, steps in orders.items():
        release = "W" if any(step.kind == "W" for step in steps) else "B"
        now: dict[int, int] = {}
        for step in steps:
            key = (device, step.stage)
            if step.kind == "F":
                now[step.stage] = now.get(step.stage, 0) + 1
                peak[key] = max(peak.get(key, 0), now[step.stage])
            elif step.kind == release:
                now[step.stage] -= 1
    return peak


def makespan(
    orders: Mapping[str, tuple[Step, ...]],
    num_stages: int,
    *,
    forward: float = 1.0,
    backward: float = 1.0,
    weight: float = 1.0,
) -> float:
    """Seconds until all is done when transfers are free and all stages alike. ``backward`` excludes ``weight``, which
    a B step includes where the schedule has no W steps. Raises ValueError where the orders deadlock.
    """
    end: dict[Step, float] = {}
    clock = dict.fromkeys(orders, 0.0)
    position = dict.fromkeys(orders, 0)
    split = any(step.kind == "W" for steps in orders.values() for step in steps)
    seconds = {"F": forward, "B": backward if split else backward + weight, "W": weight}
    left = sum(len(steps) for steps in orders.values())
    while left:
        before = left
        for device, steps in orders.items():
            while position[device] < len(steps):
                step = steps[position[device]]
                before_it = needs(step, num_stages)
                if any(n not in end for n in before_it):
                    break
                start = max([clock[device], *(end[n] for n in before_it)])
                clock[device] = end[step] = start + seconds[step.kind]
                position[device] += 1
                left -= 1
        if left == before:
            raise ValueError("; ".join(stuck(orders, num_stages)))
    return max(clock.values(), default=0.0)
