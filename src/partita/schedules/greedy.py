"""Orders for any placement, by playing the pipeline with a clock and letting each free device take its best step.

Complete and free of deadlock by construction: the lists are the record of a run that ended. It always ends: the
forward of the lowest unfinished microbatch is never held back by a limit, because limits are at least one, count one
stage's own microbatches, and are used up in microbatch order.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from math import ceil

from partita.schedules.steps import Orders, Placement, Step, device_of, devices_of


@dataclass(frozen=True, slots=True)
class Rule:
    """``all_forwards_first``: a device begins B when its last F is done. ``split_backward``: W steps apart from B.

    ``prefer``: kinds from most to least wanted. ``limited``: forwards held back by ``in_flight_limits``,
    times ``slack`` where a device hosts several stages.
    """

    prefer: str = "BF"
    all_forwards_first: bool = False
    split_backward: bool = False
    limited: bool = True
    slack: int = 1


def in_flight_limits(placement: Placement) -> tuple[int, ...]:
    """Per stage, microbatches one of its devices may hold so that none waits: round trip / time of a microbatch.

    Assumes equal load on all devices: a stage with ``r`` devices that host ``v`` stages each takes ``r / v``. For one
    device a stage this is the textbook's ``num_stages - stage``.
    """
    hosts: dict[str, int] = {}
    for stage in placement:
        for device in dict.fromkeys(stage):
            hosts[device] = hosts.get(device, 0) + 1
    took = stage_times(placement, hosts)
    limits = []
    for s, stage in enumerate(placement):
        limits.append(max(1, ceil(sum(took[s:]) / len(stage) - 1e-9)))
    return tuple(limits)


def stage_times(placement: Placement, hosts: dict[str, int]) -> tuple[float, ...]:
    """Relative seconds of one microbatch in each stage were all devices equally loaded."""
    return tuple(len(stage) ** 2 / sum(hosts[d] for d in stage) for stage in placement)


def play(rule: Rule, placement: Placement, num_microbatches: int, *, train: bool = True) -> Orders:
    """The order of steps on each device."""
    devices, last = devices_of(placement), len(placement) - 1
    hosts = {d: sum(d in stage for stage in placement) for d in devices}
    took = stage_times(placement, hosts)
    slack = rule.slack if max(hosts.values()) > 1 else 1
    limits = tuple(n * slack for n in in_flight_limits(placement))
    memory = tuple(max(1, ceil(sum(took) / len(stage) - 1e-9)) for stage in placement)  # with W steps: most F - W
    kinds = ("F",) if not train else ("F", "B", "W") if rule.split_backward else ("F", "B")
    factor = {"F": 1.0, "B": 1.0 if rule.split_backward else 2.0, "W": 1.0}
    todo: dict[tuple[str, str, int], list[int]] = {}
    for s, stage in enumerate(placement):
        for m in range(num_microbatches):
            for kind in kinds:
                todo.setdefault((stage[m % len(stage)], kind, s), []).append(m)
    done: dict[tuple[str, str, int], int] = dict.fromkeys(todo, 0)
    hosted = {d: tuple(s for s in range(last + 1) if (d, "F", s) in todo) for d in devices}
    forwards_left = {d: sum(len(todo[d, "F", s]) for s in hosted[d]) for d in devices}
    ended: set[tuple[str, int, int]] = set()
    orders: dict[str, list[Step]] = {d: [] for d in devices}
    steps_of = {(k, s): [Step(k, s, m) for m in range(num_microbatches)] for k in kinds for s in range(last + 1)}

    def runnable(device: str, kind: str, s: int) -> int | None:
        key = (device, kind, s)
        mine, count = todo[key], done[key]
        if count == len(mine):
            return None
        m = mine[count]
        if kind == "F":
            if s and ("F", s - 1, m) not in ended:
                return None
            if train and rule.limited and not rule.all_forwards_first:
                if count - done[device, "B", s] >= limits[s]:
                    return None
                if rule.split_backward and count - done[device, "W", s] >= memory[s]:
                    return None
            return m
        if kind == "W":
            return m if count < done[device, "B", s] else None
        if rule.all_forwards_first and forwards_left[device]:
            return None
        ready = ("F", s, m) in ended and (s == last or ("B", s + 1, m) in ended)
        return m if ready else None

    def choose(device: str) -> Step | None:
        for kind in rule.prefer:
            if kind not in kinds:
                continue
            deepest_first = sorted(hosted[device], reverse=not rule.all_forwards_first or kind != "F")
            for s in deepest_first:
                m = runnable(device, kind, s)
                if m is not None:
                    return steps_of[kind, s][m]
        return None

    running: list[tuple[float, int, Step]] = []
    free = dict.fromkeys(range(len(devices)))
    now = 0.0
    index = {d: i for i, d in enumerate(devices)}
    wake = set(free)
    while True:
        for i in sorted(wake):
            if i not in free:
                continue
            step = choose(devices[i])
            if step is None:
                continue
            device = devices[i]
            done[device, step.kind, step.stage] += 1
            forwards_left[device] -= step.kind == "F"
            orders[device].append(step)
            del free[i]
            heapq.heappush(running, (now + took[step.stage] * factor[step.kind], i, step))
        if not running:
            break
        now, wake = running[0][0], set()
        while running and running[0][0] <= now + 1e-9:
            _, i, step = heapq.heappop(running)
            ended.add((step.kind, step.stage, step.microbatch))
            free[i] = None
            wake.add(i)
            beside = step.stage + 1 if step.kind == "F" else step.stage - 1
            if 0 <= beside <= last:
                wake.add(index[device_of(placement, beside, step.microbatch)])
    return {d: tuple(steps) for d, steps in orders.items()}
