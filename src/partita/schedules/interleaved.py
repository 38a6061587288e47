"""Interleaved 1F1B (Megatron-LM; Narayanan et al., 2021, section 2.2): several stages a device, a smaller bubble.

With stages dealt round to p devices and microbatches a multiple of p it is Megatron's order; any other placement is
played greedily. Two devices, four stages, two microbatches:

    a: F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1
    b: F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1
"""

from __future__ import annotations

from partita.schedules.greedy import Rule
from partita.schedules.steps import Orders, Placement, Step

RULE = Rule(prefer="BF", slack=2)


def textbook(placement: Placement, num_microbatches: int) -> Orders | None:
    """Megatron's order, or None where the placement is not a deal of stages to p devices or p does not divide m."""
    if any(len(stage) != 1 for stage in placement):
        return None
    devices = tuple(dict.fromkeys(stage[0] for stage in placement))
    p, chunks = len(devices), len(placement) // len(devices)
    dealt = all(stage[0] == devices[s % p] for s, stage in enumerate(placement))
    if chunks < 2 or len(placement) % p or num_microbatches % p or not dealt:
        return None
    total = chunks * num_microbatches

    def forward(rank: int, k: int) -> Step:
        turn, within = divmod(k, p * chunks)
        return Step("F", (within // p) * p + rank, turn * p + within % p)

    def backward(rank: int, k: int) -> Step:
        turn, within = divmod(k, p * chunks)
        return Step("B", (chunks - 1 - within // p) * p + rank, turn * p + within % p)

    orders: Orders = {}
    for rank, device in enumerate(devices):
        warm = min(total, 2 * (p - rank - 1) + (chunks - 1) * p)
        steps = [forward(rank, k) for k in range(warm)]
        for k in range(warm, total):
            steps += [forward(rank, k), backward(rank, k - warm)]
        steps += [backward(rank, k) for k in range(total - warm, total)]
        orders[device] = tuple(steps)
    return orders
