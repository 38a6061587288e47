"""Calibration: what a plan promised beside what its steps take; a deviation is told once, with its likely cause.

The first steps warm up, the next are timed, the last of these is also recorded: from its trace, the prediction's trace
and the CPU time of the process follows whether other work holds the cores, computing takes longer than it did when the
model's parts were measured, or the devices wait for each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from partita.trace import Trace
from partita.units import format_seconds

WARM_STEPS = 3
TIMED_STEPS = 6
TOLERANCE = 0.15


@dataclass(eq=False)
class Calibration:
    """``predicted``: seconds a step; ``batch``: samples it holds for. ``seconds``: measured so far, in order.

    ``disproved`` is called where a step is so much faster than promised that the model's parts cannot have been timed
    undisturbed: neighbours on the machine only ever add.
    """

    predicted: float
    batch: int
    disproved: Callable[[], None] | None = None
    seconds: list[float] = field(default_factory=list)
    told: bool = False

    @property
    def measured(self) -> float | None:
        """The median of the timed steps; None before there are enough."""
        timed = self.seconds[WARM_STEPS:]
        return median(timed) if len(timed) >= TIMED_STEPS else None

    @property
    def deviation(self) -> float | None:
        """Measured over predicted, less 1: 0.2 is 20 % slower than promised."""
        return None if self.measured is None else self.measured / self.predicted - 1.0

    def wants_trace(self, batch: int) -> bool:
        """Whether the step about to run is the last timed one."""
        return batch == self.batch and len(self.seconds) == WARM_STEPS + TIMED_STEPS - 1

    def note(self, batch: int, seconds: float) -> None:
        """A step of ``batch`` samples took this long."""
        if batch == self.batch and len(self.seconds) < WARM_STEPS + TIMED_STEPS:
            self.seconds.append(seconds)

    def tell(self, measured: Trace, predicted: Callable[[], Trace], cpu_seconds: float) -> None:
        """Warn where the deviation is above the tolerance. ``cpu_seconds``: of the process, in the recorded step."""
        off = self.deviation
        if self.told or off is None or self.measured is None or abs(off) <= TOLERANCE:
            return
        self.told = True
        how, cause = "slower" if off > 0 else "faster", likely_cause(measured, predicted(), cpu_seconds)
        if off < 0 and self.disproved is not None:
            self.disproved()
        warnings.warn(
            f"a step takes {format_seconds(self.measured)}, {abs(off):.0%} {how} than the "
            f"{format_seconds(self.predicted)} that the plan promised: {cause}. "
            "replan() measures again and offers the plan that is best now",
            stacklevel=3,
        )  # fmt: skip


def likely_cause(measured: Trace, predicted: Trace, cpu_seconds: float) -> str:
    """In words, from a step as it ran and as it was predicted."""
    devices = dict.fromkeys(e.device for e in measured.events)
    busy, expected = (sum(t.busy_seconds(d) for d in devices) for t in (measured, predicted))
    idle, planned = (max((t.bubble(d) for d in devices), default=0.0) for t in (measured, predicted))
    if busy and 0 < cpu_seconds < (1.0 - TOLERANCE) * busy:
        return f"other work takes about {1.0 - cpu_seconds / busy:.0%} of these cores' time"
    if expected and abs(busy / expected - 1.0) > 0.5 * TOLERANCE:
        more = "more" if busy > expected else "less"
        return f"computing takes {abs(busy / expected - 1.0):.0%} {more} than when the model's parts were measured"
    if abs(idle - planned) > 0.5 * TOLERANCE:
        return f"a device is idle for {idle:.0%} of the step instead of {planned:.0%}"
    return "what stands between the devices' work (hand-over, adding gradients) takes another time than expected"
