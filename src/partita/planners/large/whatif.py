"""What if: the same request planned anew with a little more of one thing: what the next unit of money would buy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from partita.cluster import Device
from partita.cost.communication import Channel
from partita.planners.large.clock import ranked
from partita.planners.large.degrees import Degrees, Layout
from partita.planners.large.explain import spell
from partita.planners.large.prices import Pool
from partita.planners.large.remedies import multiplied
from partita.planners.large.request import Request
from partita.planners.large.search import Search
from partita.units import format_seconds

GIB = 1 << 30
SECONDS = 2.0
LIKELY = 6


def margins(request: Request, layouts: Sequence[Layout]) -> tuple[str, ...]:
    """Lines: more memory, faster links, more devices, a larger batch, each planned anew in a few seconds.

    ``layouts``: found for the request itself, best first.
    """
    best, likely = layouts[0], tuple(x.degrees for x in layouts[:LIKELY] if not x.degrees.shares)
    search = request.search
    tries: list[tuple[str, Callable[[Pool], Pool]]] = [
        ("1GiB more on every device", lambda p: _memory(p, p.device.memory_bytes + GIB)),
        ("half as much memory again", lambda p: _memory(p, p.device.memory_bytes * 3 // 2)),
        ("links inside nodes twice as fast", lambda p: replace(p, inside=_faster(p.inside))),
        ("links between nodes twice as fast", lambda p: replace(p, across=_faster(p.across))),
        ("memory twice as fast", lambda p: replace(p, device=_read_faster(p.device))),
    ]
    lines = [_line(name, search, search.changed(tuple(map(turn, search.pools))), best, likely) for name, turn in tries]
    more = multiplied(request.cluster, 2)
    if more is not None:
        lines.append(_line("twice as many devices", search, request.again(cluster=more).search, best))
    lines.append(_line(f"a batch of {2 * request.batch}", search, search.changed(batch=2 * request.batch), best))
    return tuple(lines)


def _line(name: str, now: Search, other: Search, best: Layout, likely: Sequence[Degrees] = ()) -> str:
    found = ranked(other, other.run(SECONDS, likely))
    if not found.layouts:
        return f"{name}: no layout was found in {SECONDS:g} s"
    made = found.layouts[0]
    gain = (other.batch / made.seconds) / (now.batch / best.seconds) - 1.0
    if made.degrees == best.degrees or gain <= 5e-4:
        same = "the layout stays" if made.degrees == best.degrees else "no faster"
    else:
        same = f"then {spell(made.degrees)}"
    worth = f"{100 * gain:+.1f} % samples a second" if abs(gain) > 5e-4 else "worth nothing"
    return f"{name}: {worth} ({format_seconds(made.seconds)} a step); {same}"


def _memory(pool: Pool, nbytes: int) -> Pool:
    return replace(pool, device=replace(pool.device, memory_bytes=nbytes))


def _faster(channel: Channel) -> Channel:
    return replace(channel, bandwidth=2.0 * channel.bandwidth)


def _read_faster(device: Device) -> Device:
    return replace(device, memory_bandwidth=2.0 * device.memory_bandwidth)
