"""Explain: what a layout is, where its step's time goes, what binds, the next best, what more hardware would bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from partita.cluster import Device
from partita.cost.communication import Channel
from partita.planners.large.layout import Degrees, Layout
from partita.planners.large.prices import Pool
from partita.planners.large.search import Found, Search
from partita.units import format_bytes, format_seconds

OTHERS = 4


def reasons(search: Search, found: Found, flops: float) -> tuple[str, ...]:
    """A line each."""
    best = found.layouts[0]
    return (
        f"layout: {spell(best.degrees)}",
        _speed(search, best, flops),
        f"where the step's time goes: {_parts(best)}",
        _memory(search, best),
        *_others(found),
        *_margins(search, found),
        f"the best of {found.listed} layouts by lower bound; {found.tried} were priced with their cuts; "
        f"no layout of this family is faster than {format_seconds(found.bound)}",
    )


def spell(degrees: Degrees) -> str:
    """``16 stages x 128 replicas x tensor degree 8 ...``."""
    text = []
    for group in degrees.groups:
        text.append(
            f"{group.stages} stage{'s' * (group.stages != 1)} x {group.replicas} replica{'s' * (group.replicas != 1)} "
            f"x tensor degree {group.degree}"
        )
    words = [" then ".join(text)]
    if degrees.sequence:
        words.append("activations between products divided along the sequence")
    if degrees.chunks > 1:
        words.append(f"{degrees.chunks} stages a device, interleaved")
    if degrees.zero:
        words.append(f"ZeRO level {degrees.zero}")
    words.append(f"microbatches of {degrees.samples} sample{'s' * (degrees.samples != 1)}")
    return ", ".join(words)


def _speed(search: Search, best: Layout, flops: float) -> str:
    count = sum(pool.count for pool in search.pools)
    idle = count - best.degrees.devices
    rest = f"; {idle} of {count} devices are left idle" if idle else ""
    return (
        f"speed: {search.batch / best.seconds:.4g} samples a second, {flops / best.seconds / count / 1e12:.4g} Tflop/s "
        f"a device of the model's own work{rest}"
    )


def _parts(best: Layout) -> str:
    return ", ".join(
        f"{name} {100 * part / best.seconds:.0f} %" for name, part in best.parts if part > 0.004 * best.seconds
    )


def _memory(search: Search, best: Layout) -> str:
    fullest = max(range(len(best.stages)), key=lambda s: best.stages[s].memory)
    stage = best.stages[fullest]
    pool = search.pools[best.degrees.groups[stage.group].pool]
    again = [sum(s.recomputed) for s in best.stages]
    units = [sum(b - a for a, b in s.spans) for s in best.stages]
    room = format_bytes(pool.device.memory_bytes)
    text = f"memory: stage {fullest} is fullest with {format_bytes(stage.memory)} of {room}"
    if not any(again):
        return f"{text}; nothing is recomputed"
    binds = "memory binds: " if best.degrees.recompute == "needed" else ""
    return (
        f"{text}; {binds}up to {max(again)} of {max(units)} units a device are recomputed in backward "
        f"({sum(again)} of {sum(units)} in all)"
    )


def _others(found: Found) -> list[str]:
    """The best layout of each other combination of stages, replicas and tensor degree."""
    best = found.layouts[0]
    seen, lines = {best.degrees.groups}, []
    for other in found.layouts[1:]:
        if other.degrees.groups in seen:
            continue
        seen.add(other.degrees.groups)
        slower = other.seconds / best.seconds - 1.0
        lines.append(f"next best: {spell(other.degrees)}: {format_seconds(other.seconds)}, {100 * slower:.1f} % slower")
        if len(lines) == OTHERS:
            break
    return lines


def _margins(search: Search, found: Found) -> list[str]:
    """The same model with a little more of one thing: the best of the layouts already found, priced again."""
    best = found.layouts[0]
    tries: list[tuple[str, Callable[[Pool], Pool]]] = [
        ("a quarter more memory", lambda p: replace(p, device=_more_memory(p, 1.25))),
        ("links inside nodes twice as fast", lambda p: replace(p, inside=_faster(p.inside))),
        ("links between nodes twice as fast", lambda p: replace(p, across=_faster(p.across))),
        ("memory bandwidth twice as fast", lambda p: replace(p, device=_more_bandwidth(p))),
    ]
    lines = []
    for name, turn in tries:
        other = search.changed(tuple(map(turn, search.pools)))
        seconds = other.best_of([layout.degrees for layout in found.layouts[:8]])
        gain = best.seconds / seconds - 1.0
        lines.append(f"{name} would be worth {100 * gain:.1f} %" if gain > 5e-4 else f"{name} would bring nothing")
    return lines


def _more_memory(pool: Pool, factor: float) -> Device:
    return replace(pool.device, memory_bytes=int(pool.device.memory_bytes * factor))


def _more_bandwidth(pool: Pool) -> Device:
    return replace(pool.device, memory_bandwidth=2.0 * pool.device.memory_bandwidth)


def _faster(channel: Channel) -> Channel:
    return replace(channel, bandwidth=2.0 * channel.bandwidth)
