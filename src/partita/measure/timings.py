"""Timings: from the samples of a profile to a Timing of each unit.

Of repeats the lower quartile counts: neighbours on the machine only ever add. What they and the system take of cores
that are all at work even in the quietest round is added once, for all units together (``held_up``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType

from partita.cost.affine import Affine, through
from partita.cost.measured import Timing

PHASES = ("forward", "backward", "weight")
LEAST_ALONE = 0.5  # two devices that halve each other's speed are one: less is noise
MOST_HELD_UP = 1.08


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one run of a unit. ``fresh``: the first of a step, when there are no gradients yet. ``alone``: the
    other devices did nothing. ``wall``: seconds by the wall clock; ``turn``: the round."""

    phase: str
    unit: int
    fresh: bool
    seconds: float
    wall: float
    turn: int
    alone: bool


def numbers(
    lanes: Sequence[Sequence[Sample]],
    units: Sequence[tuple[int, str, bool, float]],
    smaller: Mapping[str, Sequence[Mapping[str, float]]] = MappingProxyType({}),
) -> dict[str, list[dict[str, float]]]:
    """Signature -> numbers of each timed instance: typical over rounds, then the median over ``lanes``, devices of one
    kind. ``units``: (number, signature, whether it runs once on the whole batch, bytes it keeps).

    ``smaller``: what was found for the same units at fewer samples. Where only those were timed adding to gradients,
    what a first gradient takes more is theirs: it is memory of the parameters' size, whatever the samples.
    """
    times: dict[tuple[int, str, bool], list[float]] = {}
    for samples in lanes:
        rounds: dict[tuple[int, str, bool], list[float]] = {}
        for s in samples:
            if not s.alone:
                rounds.setdefault((s.unit, s.phase, s.fresh), []).append(s.seconds)
        more = held_up(samples)
        for key, seconds in rounds.items():
            times.setdefault(key, []).append(_typical(seconds) * more)
    typical = {key: median(values) for key, values in times.items()}
    found: dict[str, list[dict[str, float]]] = {}
    for index, signature, whole, saved in units:
        alike = smaller.get(signature, ())
        before = alike[len(found.get(signature, ()))] if alike else {}
        row = {}
        for phase in PHASES:
            new = typical.get((index, phase, True), 0.0)
            adding = typical.get((index, phase, False))
            more = before.get(f"first {phase}", 0.0) if adding is None else new - adding
            row[phase], row[f"first {phase}"] = new - more, more
        row["first"] = sum(row[f"first {phase}"] for phase in PHASES)
        row["saved"] = saved
        row["whole"] = float(whole)
        found.setdefault(signature, []).append(row)
    return found


def held_up(samples: Iterable[Sample]) -> float:
    """Wall clock over the device's own time while all devices work, in the quietest round: what the system and the
    process's other threads take has no idle core to go to. From 1 to ``MOST_HELD_UP``: more is a neighbour's doing, who
    may be gone when the plan runs."""
    rounds: dict[int, list[Sample]] = {}
    for s in samples:
        if not s.alone:
            rounds.setdefault(s.turn, []).append(s)
    own = [(sum(s.wall for s in turn), sum(s.seconds for s in turn)) for turn in rounds.values()]
    shares = [wall / seconds for wall, seconds in own if seconds > 0]
    return min(max(min(shares, default=1.0), 1.0), MOST_HELD_UP)


def ease(lanes: Sequence[Sequence[Sample]]) -> float:
    """Share of the units' seconds that they take with nothing beside them, on the lane that ran so: all units together,
    since single ones of a millisecond say little. At most 1: neighbours do not help."""
    for samples in lanes:
        beside: dict[tuple[int, str, bool], list[float]] = {}
        by_itself: dict[tuple[int, str, bool], list[float]] = {}
        for s in samples:
            (by_itself if s.alone else beside).setdefault((s.unit, s.phase, s.fresh), []).append(s.seconds)
        shared = [key for key in by_itself if key in beside]
        together = sum(_typical(beside[key]) for key in shared) * held_up(samples)
        if together > 0:
            return min(1.0, max(LEAST_ALONE, sum(min(by_itself[key]) for key in shared) / together))
    return 1.0


def _typical(times: Sequence[float]) -> float:
    """The lower quartile: neighbours on the machine only ever add."""
    ordered = sorted(times)
    return ordered[(len(ordered) - 1) // 4]


def lines(
    by_size: Sequence[Mapping[str, Sequence[Mapping[str, float]]]],
    counts: Sequence[int],
    signatures: Iterable[str],
    alone: float,
) -> dict[str, Timing]:
    """Signature -> Timing, through what was measured at the smallest and the largest number of samples."""
    result = {}
    for signature in dict.fromkeys(signatures):
        found: dict[str, Affine] = {}
        for name in (*PHASES, "first", "saved"):
            values = [_value(m.get(signature, ()), name) for m in by_size]
            if len(counts) == 1:
                found[name] = Affine(0.0, values[0] / counts[0])
            else:
                found[name] = _through(counts[0], values[0], counts[-1], values[-1])
        result[signature] = Timing(
            found["forward"],
            found["backward"],
            found["weight"],
            saved=found["saved"],
            first=found["first"],
            alone=alone,
        )
    return result


def _through(n1: int, y1: float, n2: int, y2: float) -> Affine:
    """The line through both; through the second and zero where that would put more work below nothing."""
    line = through(n1, y1, n2, y2)
    return line if line.fixed >= 0.0 else Affine(0.0, y2 / n2)


def _value(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """Of one unit: its part for each microbatch plus its part for the whole batch."""
    split = [r[name] for r in rows if not r["whole"]]
    whole = [r[name] for r in rows if r["whole"]]
    return (median(split) if split else 0.0) + (median(whole) if whole else 0.0)
