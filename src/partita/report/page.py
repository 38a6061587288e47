"""One self-contained HTML page: the plan, why, and the timelines, predicted above measured. Needs jinja2."""

from __future__ import annotations

import os
from importlib import resources
from typing import Any

from partita.errors import UsageError
from partita.plan import Plan
from partita.plan_text import compiles, counted, offloaded, shorten
from partita.report.figures import compare, devices_of
from partita.strict_yaml import write_text
from partita.trace import Trace
from partita.units import format_bytes, format_seconds

WIDTH, LANE, LABEL = 960.0, 26, 90.0


def render(plan: Plan, predicted: Trace | None = None, measured: Trace | None = None) -> str:
    """The page's text. Raises UsageError where jinja2 is not installed."""
    try:
        import jinja2
    except ImportError:
        raise UsageError("the HTML page needs jinja2; install it with: pip install 'partita[report]'") from None
    template = resources.files("partita.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    present = [t for t in (predicted, measured) if t is not None]
    longest = max((t.step_seconds for t in present), default=0.0)
    memory = dict(plan.predicted.memory) if plan.predicted else {}
    stages = [
        {
            "devices": shorten(stage.devices, 60),
            "runs": shorten(stage.modules, 90) or f"{len(stage.ops)} ops",
            "recompute": shorten(stage.recompute, 60),
            "offload": offloaded(stage.offload, 60),
            "compile": compiles(stage.compile, 60),
            "memory": counted([format_bytes(memory[d]) for d in stage.devices if d in memory]),
        }
        for stage in plan.stages
    ]
    figures = [(r.name, r.show(r.predicted), r.show(r.measured), r.off) for r in compare(predicted, measured)]
    return environment.from_string(template).render(
        plan=plan,
        devices=shorten(plan.devices, 120),
        stages=stages,
        figures=figures if present else [],
        lanes=[_lanes(trace, longest) for trace in present],
        width=WIDTH,
        label=LABEL,
        lane=LANE,
    )


def _lanes(trace: Trace, longest: float) -> dict[str, Any]:
    """Rectangles of one timeline, on the scale of the longest."""
    devices = devices_of(trace)
    begin = min((e.start for e in trace.events), default=0.0)
    scale = (WIDTH - LABEL) / longest if longest else 0.0
    boxes = [
        {
            "x": round(LABEL + (e.start - begin) * scale, 2),
            "y": devices.index(e.device) * LANE + 3,
            "w": round(max((e.end - e.start) * scale, 0.4), 2),
            "kind": e.kind,
            "text": f"{e.name} on {e.device}: {format_seconds(e.end - e.start)}"
            + (f", {format_bytes(e.nbytes)}" if e.nbytes else ""),
        }
        for e in trace.events
        if e.kind in ("F", "B", "W", "REDUCE")
    ]
    return {
        "origin": trace.origin,
        "devices": devices,
        "boxes": boxes,
        "height": len(devices) * LANE + 4,
        "step": format_seconds(trace.step_seconds),
    }


def write_page(
    path: str | os.PathLike[str], plan: Plan, predicted: Trace | None = None, measured: Trace | None = None
) -> None:
    """Write the page; raises UsageError where that is not possible."""
    write_text(path, render(plan, predicted, measured), "report")
