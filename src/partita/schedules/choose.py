"""``schedule``: the order of steps on each device, by the schedule's name, for any placement."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from partita.errors import PlanError
from partita.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from partita.schedules.greedy import play
from partita.schedules.steps import Orders, Placement, Step

RULES = MappingProxyType(
    {"gpipe": gpipe.RULE, "1f1b": one_f_one_b.RULE, "interleaved": interleaved.RULE, "zero_bubble": zero_bubble.RULE}
)
NAMES = tuple(RULES)


def schedule(
    name: str, placement: Placement, num_microbatches: int, *, joined: bool = False, train: bool = True
) -> Orders:
    """Device -> its steps, for ``placement[stage]`` = the stage's devices (several: replicas taking turns).

    Every F, B (and W, in zero_bubble) stands exactly once and no device waits for ever. ``joined``: a part of the model
    runs once on the joined batch between all F and all B, so each device ends its forwards first. ``train`` False:
    forwards only. Raises PlanError for an unknown name, no stages or fewer than one microbatch.
    """
    if name not in RULES:
        raise PlanError(f"schedule {name!r} is not known; take one of {', '.join(NAMES)}")
    if not placement or not all(placement):
        raise PlanError(f"a schedule needs one or more stages with one or more devices each; got {placement!r}")
    if num_microbatches < 1:
        raise PlanError(f"a schedule needs at least 1 microbatch; got {num_microbatches}")
    rule = RULES[name]
    if name == "interleaved" and train and not joined:
        orders = interleaved.textbook(placement, num_microbatches)
        if orders is not None:
            return orders
    if joined:
        rule = replace(rule, all_forwards_first=True)
    return play(rule, placement, num_microbatches, train=train)


def order(
    name: str, *, num_stages: int, num_microbatches: int, rank: int, num_ranks: int = 0, joined: bool = False
) -> tuple[Step, ...]:
    """Steps of one rank, with stages dealt round to ``num_ranks`` ranks (as many as stages where 0)."""
    ranks = num_ranks or num_stages
    placement = tuple((str(s % ranks),) for s in range(num_stages))
    return schedule(name, placement, num_microbatches, joined=joined)[str(rank)]
