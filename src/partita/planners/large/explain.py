"""Explain: what a layout is, where its step's time goes, why these degrees and cuts, what binds, what else was near.

Prices of neighbours are the search's own, in closed form; ``whatif`` plans anew with other hardware.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from partita.planners.large.degrees import Degrees, Layout
from partita.planners.large.search import Found, Search
from partita.units import format_bytes, format_seconds

OTHERS = 4
SECONDS = 1.0  # of this process, for prices of what was not chosen


def reasons(search: Search, found: Found, flops: float) -> tuple[str, ...]:
    """A line each."""
    best = found.layouts[0]
    return (
        f"layout: {spell(best.degrees)}",
        _speed(search, best, flops),
        f"where the step's time goes: {_parts(best)}",
        *_played(best),
        *_cuts(search, best),
        *_degrees(search, best),
        _memory(search, best),
        *_held(search, best),
        *_links(search, best),
        *_others(found),
        f"the best of {found.listed} layouts by lower bound; {found.tried} were priced with their cuts; in closed form "
        f"no layout of this family is faster than {format_seconds(found.bound)} (gap {found.gap:.1%})",
    )


def spell(degrees: Degrees) -> str:
    """``16 stages x 128 replicas x tensor degree 8 ...``."""
    text = []
    if degrees.shares:
        sides = [f"{g.replicas} with {n} samples" for g, n in zip(degrees.groups, degrees.shares, strict=True)]
        words = [f"1 stage, replicas of unequal kinds side by side: {', '.join(sides)}"]
        words.append(f"tensor degree {degrees.groups[0].degree}")
        return ", ".join([*words, f"ZeRO level {degrees.zero}"] if degrees.zero else words)
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
    elif degrees.stages > 1 and degrees.order != "1f1b":
        words.append(degrees.order.replace("_", " "))
    if degrees.zero:
        words.append(f"ZeRO level {degrees.zero}")
    words.append(f"microbatches of {degrees.samples} sample{'s' * (degrees.samples != 1)}")
    return ", ".join(words)


def _speed(search: Search, best: Layout, flops: float) -> str:
    count = sum(pool.count for pool in search.pools)
    idle = count - best.degrees.devices
    rest = f"; {idle} of {count} devices are left idle" if idle else ""
    peak = sum(search.assume.peak(pool.device) * pool.count for pool in search.pools)
    return (
        f"speed: {search.batch / best.seconds:.4g} samples a second, {flops / best.seconds / count / 1e12:.4g} Tflop/s "
        f"a device of the model's own work ({flops / best.seconds / peak:.0%} of the devices' peak){rest}"
    )


def _parts(best: Layout) -> str:
    return ", ".join(
        f"{name} {100 * part / best.seconds:.0f} %" for name, part in best.parts if part > 0.004 * best.seconds
    )


def _played(best: Layout) -> list[str]:
    if best.degrees.stages == 1:
        return []
    how = best.degrees.schedule.replace("_", " ")
    played, closed = format_seconds(best.seconds), format_seconds(best.closed)
    return [
        f"played step by step under {how}: {played}; in closed form {closed}; messages hold up the stage that receives"
    ]


def _cuts(search: Search, best: Layout) -> list[str]:
    """Which stage sets the pace, and what moving its ends by a unit would cost."""
    if best.degrees.stages * best.degrees.chunks == 1:
        return []
    busy = [s.forward + s.backward for s in best.stages]
    per = [b / best.degrees.groups[s.group].replicas for b, s in zip(busy, best.stages, strict=True)]
    slow = max(range(len(busy)), key=per.__getitem__)
    spans = [span for k in range(best.degrees.chunks) for span in (s.spans[k] for s in best.stages)]
    least, most = format_seconds(min(busy)), format_seconds(max(busy))
    lines = [
        f"cuts: stages take {least} to {most} a microbatch; stage {slow} sets the pace, with "
        f"{_units(search, best.stages[slow].spans)}"
    ]
    told = []
    for what, cut, by in (
        ("its first unit to the stage before", slow, 1),
        ("its last unit to the stage after", slow + 1, -1),
    ):
        if 0 < cut < len(spans):
            stops = [stop for _, stop in spans]
            stops[cut - 1] += by
            if stops[cut - 1] in search.marks.starts and spans[cut - 1][0] < stops[cut - 1] < spans[cut][1]:
                told.append(f"{what} {_change(_moved(search, best, stops), best.closed)}")
    return lines + ([f"giving {'; '.join(told)}"] if told else [])


def _moved(search: Search, best: Layout, stops: list[int]) -> float | None:
    rows = search.rows(best.degrees)
    assert rows is not None
    layout = search.pricer.priced(best.degrees, rows, stops)
    return layout.closed if layout is not None else None


def _units(search: Search, spans: tuple[tuple[int, int], ...]) -> str:
    """``layers.7 to layers.13``, and how many more chunks."""
    start, stop = spans[0]
    first, last = search.units.row[start].name, search.units.row[stop - 1].name
    text = first if first == last else f"{first} to {last}"
    return text + (f" and {len(spans) - 1} chunk{'s' * (len(spans) > 2)} more" if len(spans) > 1 else "")


def _change(seconds: float | None, now: float) -> str:
    return "would not fit" if seconds is None else f"{100 * (seconds / now - 1):+.1f} %"


def _degrees(search: Search, best: Layout) -> list[str]:
    """For every degree, what its nearest other value would cost, and which part of the step would grow."""
    told = []
    began = time.process_time()
    for what, other in _beside(search, best.degrees):
        if time.process_time() - began > SECONDS:
            break
        rows = search.rows(other)
        layout = search.pricer.price(other, rows) if rows is not None else None
        if layout is None:
            told.append(f"{what}: does not fit")
            continue
        before, after = dict(best.parts), dict(layout.parts)
        before["bubble"] = max(before["bubble"] - (best.seconds - best.closed), 0.0)
        grown = max(after, key=lambda name: after[name] - before[name])
        change = layout.closed / best.closed - 1
        why = f" ({grown} {format_seconds(after[grown] - before[grown])} more)" if change > 0.002 else ""
        told.append(f"{what}: {100 * change:+.1f} %{why}")
    return [f"had it been otherwise, in closed form: {'; '.join(told)}"] if told else []


def _beside(search: Search, d: Degrees) -> Iterator[tuple[str, Degrees]]:
    """Layouts that differ in one choice, the devices used as fully."""
    if d.shares:
        return
    one = len(d.groups) == 1
    g = d.groups[0]
    pool = search.pools[g.pool]
    limits = search.limits
    if one and not limits.degree:
        for degree in (g.degree // 2, 2 * g.degree):
            replicas = min(pool.count // degree // g.stages, search.batch) if degree else 0
            if replicas and degree <= pool.per_node and (degree > 1 or not d.sequence) and not limits.replicas:
                changed = replace(d, groups=(replace(g, degree=degree, replicas=replicas),), sequence=degree > 1)
                yield f"tensor degree {degree}", changed
    if one and d.chunks == 1 and not (limits.total or limits.most or limits.replicas):
        for stages in (g.stages // 2, 2 * g.stages):
            replicas = min(pool.count // g.degree // stages, search.batch) if stages else 0
            if replicas:
                changed = replace(d, groups=(replace(g, stages=stages, replicas=replicas),))
                yield f"{stages} stage{'s' * (stages > 1)}", changed if stages > 1 else replace(changed, order="1f1b")
    if not (limits.samples or limits.microbatches):
        for samples in (d.samples // 2, 2 * d.samples):
            if samples and -(-search.batch // samples) >= max(x.replicas for x in d.groups):
                yield f"microbatches of {samples}", replace(d, samples=samples)
    if search.pricer.train and limits.zero < 0 and max(x.replicas for x in d.groups) > 1:
        for zero in (d.zero - 1, d.zero + 1):
            if 0 <= zero <= (3 if d.stages == 1 else 1):
                yield f"ZeRO level {zero}", replace(d, zero=zero)
    if d.sequence and limits.sequence is None:
        yield "activations not divided along the sequence", replace(d, sequence=False)
    if d.stages > 1 and d.schedule != "1f1b" and not (limits.order or limits.total or limits.chunks):
        yield "1f1b with one stage a device", replace(d, chunks=1, order="1f1b")


def _memory(search: Search, best: Layout) -> str:
    fullest = _fullest(search, best)
    stage = best.stages[fullest]
    pool = search.pools[best.degrees.groups[stage.group].pool]
    rows = search.rows(best.degrees)
    assert rows is not None
    again = [sum(s.recomputed) for s in best.stages]
    away = sum(n for s in best.stages for n, leaves in zip(s.recomputed, rows[s.group].leaves, strict=True) if leaves)
    units = [sum(b - a for a, b in s.spans) for s in best.stages]
    room = format_bytes(pool.device.memory_bytes)
    who = f"a replica on {pool.device.kind}" if best.degrees.shares else f"stage {fullest}"
    text = f"memory: {who} is fullest with {format_bytes(stage.memory)} of {room}"
    if not any(again):
        return f"{text}; nothing is recomputed or offloaded"
    binds = "memory binds: " if best.degrees.recompute == "needed" else ""
    if not away:
        how = "recomputed in backward"
    elif away == sum(again):
        how = "offloaded: their activations wait in host memory"
    else:
        how = f"relieved: {away} offloaded to host memory, {sum(again) - away} recomputed in backward"
    return (
        f"{text}; {binds}up to {max(again)} of {max(units)} units a device are {how} "
        f"({sum(again)} of {sum(units)} in all)"
    )


def _fullest(search: Search, best: Layout) -> int:
    def part(s: int) -> float:
        stage = best.stages[s]
        return stage.memory / search.pools[best.degrees.groups[stage.group].pool].device.memory_bytes

    return max(range(len(best.stages)), key=part)


def _held(search: Search, best: Layout) -> list[str]:
    rows = search.rows(best.degrees)
    assert rows is not None
    stage = _fullest(search, best)
    mine, degrees = best.stages[stage], best.degrees
    if degrees.shares:
        degrees, stage = degrees.side(mine.group), 0
    held = search.pricer.loads.breakdown(degrees, stage, rows[mine.group], mine.spans, mine.recomputed)
    words = ", ".join(f"{name} {format_bytes(size)}" for name, size in held if size >= 1 << 20)
    return [f"of that: {words}"]


def _links(search: Search, best: Layout) -> list[str]:
    """What waits for links inside nodes and between them."""
    parts = dict(best.parts)
    group = best.degrees.groups[0]
    near = "inside nodes" if group.degree <= search.pools[group.pool].per_node else "inside and between nodes"
    told = []
    if parts["tensor exchange"] > 0.004 * best.seconds:
        told.append(
            f"{format_seconds(parts['tensor exchange'])} a step of exchanges between the devices of an op, {near}"
        )
    if parts["messages"] > 0.004 * best.seconds:
        told.append(f"{format_seconds(parts['messages'])} of messages between stages")
    if parts["gathers not hidden"] > 0.004 * best.seconds:
        told.append(f"{format_seconds(parts['gathers not hidden'])} of ZeRO's gathers that compute does not hide")
    if parts["reduction and optimizer"] > 0.004 * best.seconds:
        told.append(f"{format_seconds(parts['reduction and optimizer'])} at the end for gradients and the optimizer")
    return [f"links: {'; '.join(told)}"] if told else []


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
