"""Memory over time, reduced to the moments that can bind.

Usage that no choice changes is taken off the limit; a moment at which even the largest choices fit goes, and so does
one whose neighbour in time holds at least as much under every choice, with no more room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.planners.labelling.contract import Core
from partita.planners.labelling.problem import Floats, Ints, Problem


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """One core node's usage above its smallest: ``usage[label, k]`` at moments ``begin[k] <= t < end[k]``."""

    begin: Ints
    end: Ints
    usage: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """``room[t]``: what is left at moment ``t`` for usage above the smallest; ``spans`` per core node."""

    room: Floats
    spans: tuple[Spans, ...]


def memory_of(problem: Problem, core: Core) -> Memory:
    """The limit over the moments that can bind. Some room is negative where no answer can fit."""
    nothing = Spans(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 0)))
    if not problem.usages or not np.isfinite(problem.limit):
        return Memory(np.zeros(0), tuple(nothing for _ in core.nodes))
    spans, least = [], []
    members = _members(problem, core)
    for own, num_labels in zip(members, [*(len(labels) for labels in core.labels), 1], strict=True):
        whole = _spans(own, num_labels)
        if not len(whole.begin):
            spans.append(whole)
            continue
        floor = whole.usage.min(axis=0)
        least.append((whole.begin, whole.end, floor))
        above = whole.usage - floor
        varies = above.any(axis=0)
        spans.append(Spans(whole.begin[varies], whole.end[varies], above[:, varies]))
    return _compressed(problem.limit, spans[:-1], least)


def _members(problem: Problem, core: Core) -> list[list[tuple[int, int, Floats]]]:
    """Per core node: (begin, end, usage per label) of itself and of all that it absorbed; last, the settled ones."""
    members: list[list[tuple[int, int, Floats]]] = [[] for _ in range(len(core.nodes) + 1)]
    for v, (position, label) in core.followers().items():
        begin, end = problem.intervals[v]
        if end > begin:
            members[position].append((begin, end, problem.usages[v][label]))
    return members


def _spans(members: Sequence[tuple[int, int, Floats]], num_labels: int) -> Spans:
    """The sum of ``members`` as a step function of time, per label."""
    if not members:
        return Spans(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((num_labels, 0)))
    begin = np.array([m[0] for m in members])
    end = np.array([m[1] for m in members])
    usage = np.array([m[2] for m in members], dtype=np.float64)
    times = np.unique(np.concatenate([begin, end]))
    change = np.zeros((len(times), num_labels))
    np.add.at(change, np.searchsorted(times, begin), usage)
    np.add.at(change, np.searchsorted(times, end), -usage)
    level = change.cumsum(axis=0)[:-1]
    new = np.ones(len(level), dtype=bool)
    new[1:] = (level[1:] != level[:-1]).any(axis=1)
    starts = np.flatnonzero(new)
    return Spans(times[starts], times[np.append(starts[1:], len(times) - 1)], np.ascontiguousarray(level[starts].T))


def _compressed(limit: float, spans: list[Spans], least: list[tuple[Ints, Ints, Floats]]) -> Memory:
    edges = [s.begin for s in spans] + [s.end for s in spans] + [x for b, e, _ in least for x in (b, e)]
    times = np.unique(np.concatenate([np.zeros(0, np.int64), *edges]))
    if len(times) < 2:
        return Memory(np.zeros(0), tuple(spans))
    change = np.zeros(len(times))
    for begin, end, floor in least:
        np.add.at(change, np.searchsorted(times, begin), floor)
        np.add.at(change, np.searchsorted(times, end), -floor)
    room = limit - change.cumsum()[:-1]
    most = np.zeros(len(times))
    rises = np.ones(len(times) - 2, dtype=bool)  # moment t holds no more than t + 1 under every choice
    falls = np.ones(len(times) - 2, dtype=bool)
    for span in spans:
        if not len(span.begin):
            continue
        begin, end = np.searchsorted(times, span.begin), np.searchsorted(times, span.end)
        np.add.at(most, begin, span.usage.max(axis=0))
        np.add.at(most, end, -span.usage.max(axis=0))
        joined = np.zeros(len(begin), dtype=bool)
        joined[1:] = begin[1:] == end[:-1]
        up = np.where(joined[1:], (span.usage[:, 1:] >= span.usage[:, :-1]).all(axis=0), True)
        down = np.where(joined[1:], (span.usage[:, 1:] <= span.usage[:, :-1]).all(axis=0), False)
        _clear(falls, begin[0:1], np.zeros(1, dtype=bool))
        _clear(rises, begin[1:], up)
        _clear(falls, begin[1:], down)
        last = np.ones(len(end), dtype=bool)
        last[:-1] = joined[1:]
        last[-1] = False
        _clear(rises, end, last)
    rises &= room[1:] <= room[:-1]
    falls &= room[1:] >= room[:-1]
    binding = most.cumsum()[:-1] > room
    binding[:-1] &= ~rises
    binding[1:] &= ~(falls & ~rises)
    binding |= room < 0
    kept = np.concatenate([[0], binding.cumsum()])
    return Memory(
        room[binding],
        tuple(
            _moved(span, kept[np.searchsorted(times, span.begin)], kept[np.searchsorted(times, span.end)])
            for span in spans
        ),
    )


def _clear(flags: np.ndarray, boundary: Ints, allowed: np.ndarray) -> None:
    """Flag ``t`` stands for the step from moment ``t`` to ``t + 1``; a change at ``boundary`` is the step before it."""
    step = boundary[~allowed] - 1
    flags[step[(step >= 0) & (step < len(flags))]] = False


def _moved(span: Spans, begin: Ints, end: Ints) -> Spans:
    full = end > begin
    return Spans(begin[full], end[full], np.ascontiguousarray(span.usage[:, full]))
