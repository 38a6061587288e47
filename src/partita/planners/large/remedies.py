"""Remedies: the least change of one thing under which a large model fits, each planned before it is offered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from partita.planners.large.layout import Layout
from partita.planners.large.prices import Pool
from partita.planners.large.search import Search
from partita.units import format_bytes, format_seconds

FACTORS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0)
SECONDS = 1.5


def remedies(search: Search) -> tuple[str, ...]:
    """Lines: more memory, more devices, an optimizer with less state."""
    lines = []
    for factor in FACTORS:
        memory = tuple(
            replace(p, device=replace(p.device, memory_bytes=int(factor * p.device.memory_bytes))) for p in search.pools
        )
        if (layout := _fits(search.changed(memory))) is not None:
            amounts = " and ".join(dict.fromkeys(format_bytes(p.device.memory_bytes) for p in memory))
            lines.append(f"devices of {amounts} fit: {format_seconds(layout.seconds)} a step")
            break
    for factor in (f for f in FACTORS if f == int(f)):
        more = tuple(_more(p, int(factor)) for p in search.pools)
        if (layout := _fits(search.changed(more))) is not None:
            lines.append(f"{int(factor)} times as many devices fit: {format_seconds(layout.seconds)} a step")
            break
    if (layout := _fits(search.changed(optimizer="sgd"))) is not None:
        lines.append(f"optimizer 'sgd' fits: {format_seconds(layout.seconds)} a step")
    return tuple(lines) or ("no change of one thing alone makes it fit: use more and larger devices",)


def _fits(search: Search) -> Layout | None:
    found = search.run(SECONDS)
    return found.layouts[0] if found.layouts else None


def _more(pool: Pool, factor: int) -> Pool:
    return replace(pool, names=tuple(_names(pool, factor)))


def _names(pool: Pool, factor: int) -> Iterator[str]:
    for copy in range(factor):
        for name in pool.names:
            yield name if copy == 0 else f"{name}+{copy}"
