"""The figures every report shows: predicted beside measured, and by how much they differ."""

from __future__ import annotations

from dataclasses import dataclass

from partita.trace import Trace
from partita.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. None: not known on that side."""

    name: str
    unit: str
    predicted: float | None
    measured: float | None

    def show(self, value: float | None) -> str:
        if value is None:
            return "-"
        if self.unit == "bytes":
            return format_bytes(value)
        return f"{value:.0%}" if self.unit == "share" else format_seconds(value)

    @property
    def off(self) -> str:
        """How far the prediction is from what was measured: '+8 %' is too high by 8 %."""
        if self.predicted is None or self.measured is None:
            return "-"
        if self.unit == "share":
            return f"{(self.predicted - self.measured) * 100:+.0f} points"
        return f"{self.predicted / self.measured - 1:+.0%}" if self.measured else "-"


def devices_of(*traces: Trace | None) -> tuple[str, ...]:
    """Every device that appears, those with memory figures first, in their order."""
    found: dict[str, None] = {}
    for trace in traces:
        if trace is not None:
            found.update(dict.fromkeys(device for device, _ in trace.memory))
    for trace in traces:
        if trace is not None:
            found.update(dict.fromkeys(event.device for event in trace.events))
    return tuple(found)


def compare(predicted: Trace | None, measured: Trace | None) -> tuple[Row, ...]:
    """Step time, then busy time, idle share and peak memory of each device."""
    rows = [
        Row(
            "step", "seconds",
            predicted.step_seconds if predicted else None,
            measured.step_seconds if measured else None,
        )
    ]  # fmt: skip
    for device in devices_of(predicted, measured):
        before, after = (_of_device(t, device) for t in (predicted, measured))
        rows += [
            Row(f"{device} {name}", unit, before[i], after[i])
            for i, (name, unit) in enumerate((("busy", "seconds"), ("idle", "share"), ("peak memory", "bytes")))
        ]
    return tuple(rows)


def _of_device(trace: Trace | None, device: str) -> tuple[float | None, float | None, float | None]:
    if trace is None:
        return None, None, None
    return trace.busy_seconds(device), trace.bubble(device), dict(trace.memory).get(device)
