"""Trace: what happened (or is predicted to happen) on each device, as events on one clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One instruction on one device. ``start`` and ``end`` in seconds from the beginning of the step."""

    device: str
    name: str
    kind: str
    segment: int
    microbatch: int
    start: float
    end: float
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """``memory``: peak bytes per device. ``origin``: 'measured' or 'simulated'."""

    events: tuple[Event, ...]
    memory: tuple[tuple[str, int], ...] = ()
    origin: str = "measured"

    @property
    def step_seconds(self) -> float:
        return max((e.end for e in self.events), default=0.0) - min((e.start for e in self.events), default=0.0)

    def busy_seconds(self, device: str) -> float:
        """Seconds the device spent computing (F, B, W)."""
        return sum(e.end - e.start for e in self.events if e.device == device and e.kind in "FBW")

    def bubble(self, device: str) -> float:
        """Share of the step the device was not computing: 0 is always busy."""
        return 1.0 - self.busy_seconds(device) / self.step_seconds if self.step_seconds else 0.0

    def to_chrome(self) -> dict[str, object]:
        """The Chrome trace format's JSON object; opens in Perfetto and chrome://tracing. Microseconds."""
        devices = list(dict.fromkeys(e.device for e in self.events))
        rows: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": d}} for i, d in enumerate(devices)
        ]
        rows += [
            {
                "ph": "X", "name": e.name, "cat": e.kind, "pid": 0, "tid": devices.index(e.device),
                "ts": e.start * 1e6, "dur": (e.end - e.start) * 1e6,
                "args": {"segment": e.segment, "microbatch": e.microbatch, "bytes": e.nbytes},
            }
            for e in self.events
        ]  # fmt: skip
        return {"traceEvents": rows, "otherData": {"origin": self.origin}}
