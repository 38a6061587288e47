"""Clock: a layout's step played in the true order of its schedule, stage by stage, with uneven stages and messages.

    forward of a microbatch     begins when its message has come and the device is free
    message of t seconds        leaves when its maker ends; ``Assumptions.messages_hidden`` of t passes beside whatever
                                the receiver does, for the rest the receiver does nothing else
    tail                        gradients' reduction and the optimizer, when a device's last step has ended

Replicas of equal groups are alike, so one is played. Long steps are played for twice and three times as many
microbatches as there are stages, and the rest is added at the rate between: a full pipeline repeats itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from partita.planners.large.degrees import Degrees, Layout
from partita.planners.large.exchange import send_seconds
from partita.planners.large.search import Found, Search
from partita.schedules import Orders, schedule

MOST_STEPS = 12_000
RANKED, RANK_SECONDS = 10, 1.2


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage in the model's order: seconds of a microbatch; ``message``: of what it receives, one way."""

    forward: float
    backward: float
    late: float
    message: float


def ranked(search: Search, found: Found, seconds: float = RANK_SECONDS) -> Found:
    """The best layouts in the order of their played seconds; the rest, in closed form, after them."""
    began = time.process_time()
    played: list[Layout] = []
    for layout in found.layouts[:RANKED]:
        if played and time.process_time() - began > seconds:
            break
        played.append(retimed(layout, step_seconds(search, layout)))
    rest = found.layouts[len(played) :]
    return replace(found, layouts=(*sorted(played, key=lambda x: x.seconds), *rest))


def retimed(layout: Layout, seconds: float) -> Layout:
    """The layout with its played seconds; what its parts do not explain is the bubble."""
    known = sum(part for name, part in layout.parts if name != "bubble")
    parts = tuple((n, max(seconds - known, 0.0) if n == "bubble" else part) for n, part in layout.parts)
    return replace(layout, seconds=seconds, parts=parts)


def step_seconds(search: Search, layout: Layout) -> float:
    """Seconds of a step. Layouts of one stage, and those too long to play, keep their closed form."""
    degrees = layout.degrees
    if degrees.stages == 1:
        return layout.closed
    stages = stages_of(search, layout)
    hidden, train = search.assume.messages_hidden, search.pricer.train
    tails = [s.tail for s in layout.stages]
    if len(degrees.groups) > 1:
        if 2 * len(stages) * layout.microbatches > 2 * MOST_STEPS:
            return layout.closed
        return _play(_orders(degrees, layout.microbatches, train), stages, tails, hidden, degrees)
    mine = ceil(layout.microbatches / degrees.groups[0].replicas)
    one = replace(degrees, groups=(replace(degrees.groups[0], replicas=1),))

    def seconds(m: int) -> float:
        return _play(_orders(one, m, train), stages, tails, hidden, one)

    p = degrees.stages
    few, more = 2 * p, 3 * p
    if 2 * len(stages) * mine <= MOST_STEPS or mine <= more:
        return seconds(mine)
    return seconds(few) + (seconds(more) - seconds(few)) / p * (mine - few)


def stages_of(search: Search, layout: Layout) -> tuple[Stage, ...]:
    """Every stage of the plan in the model's order; what a device takes for all its stages is shared out by units."""
    degrees, rows, p = layout.degrees, search.rows(layout.degrees), layout.degrees.stages
    assert rows is not None
    found: dict[int, Stage] = {}
    for rank, mine in enumerate(layout.stages):
        group, row = degrees.groups[mine.group], rows[mine.group]
        again = search.marks.recomputed(search.kinds, mine.spans, mine.recomputed)
        plain = []
        for (start, stop), some in zip(mine.spans, again, strict=True):
            counts = row.counts[:, stop] - row.counts[:, start]
            forward = float(row.forward @ counts)
            backward = float(row.backward @ counts) + sum(float(row.relief[search.kinds[u]]) for u in some)
            plain.append((forward, backward, float(row.late @ counts)))
        scale = [
            mine.forward / max(sum(x[0] for x in plain), 1e-30),
            mine.backward / max(sum(x[1] for x in plain), 1e-30),
        ]
        for chunk, ((start, _), (forward, backward, late)) in enumerate(zip(mine.spans, plain, strict=True)):
            entering = float(row.sent[row.kinds[start - 1]]) if start else 0.0
            message = send_seconds(search.pools[group.pool], group, entering, degrees.sequence)
            found[chunk * p + rank] = Stage(forward * scale[0], backward * scale[1], late, message)
    return tuple(found[s] for s in range(len(found)))


@lru_cache(maxsize=32)
def _orders(degrees: Degrees, microbatches: int, train: bool) -> Orders:
    """The schedule's own order; a device's name is its stage and its number among the replicas."""
    p = degrees.stages
    counts = [degrees.groups[degrees.group_of(rank)].replicas for rank in range(p)]
    stages = (tuple(f"{s % p}.{i}" for i in range(counts[s % p])) for s in range(p * degrees.chunks))
    return schedule(degrees.schedule, tuple(stages), microbatches, train=train)


def _play(orders: Orders, stages: Sequence[Stage], tails: Sequence[float], hidden: float, degrees: Degrees) -> float:
    last = len(stages) - 1
    ended: dict[tuple[str, int, int], float] = {}
    clock = dict.fromkeys(orders, 0.0)
    at = dict.fromkeys(orders, 0)
    split = degrees.schedule == "zero_bubble"
    waiting = list(orders)
    while waiting:
        left = []
        for device in waiting:
            steps, now, i = orders[device], clock[device], at[device]
            while i < len(steps):
                step = steps[i]
                kind, s, m = step.kind, step.stage, step.microbatch
                stage = stages[s]
                if kind == "F":
                    before, message = (("F", s - 1, m) if s else None), stage.message
                    took = stage.forward
                elif kind == "B":
                    before, message = (("B", s + 1, m) if s < last else None), stages[min(s + 1, last)].message
                    took = stage.backward - (stage.late if split else 0.0)
                else:
                    before, message, took = None, 0.0, stage.late
                if before is not None:
                    if before not in ended:
                        break
                    now = max(now, ended[before] + hidden * message) + (1.0 - hidden) * message
                now += took
                ended[kind, s, m] = now
                i += 1
            clock[device], at[device] = now, i
            if i < len(steps):
                left.append(device)
        waiting = left
    return max(end + tails[int(device.partition(".")[0])] for device, end in clock.items())
