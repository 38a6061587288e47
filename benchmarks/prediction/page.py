"""The scatter of predicted against measured, and of each model the two timelines over each other, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10

from benchmarks.prediction.study import CHOSEN, Row
from partita.trace import Trace

SIDE, EDGE, WIDTH, LANE = 560.0, 60.0, 1000.0, 22
COLOURS = ("#3366aa", "#cc5533", "#449955", "#8855aa", "#aa8833", "#338899")
KINDS = {"F": "#5588cc", "B": "#cc7744", "W": "#bbaa44", "REDUCE": "#999999"}


def page(rows: Sequence[Row], summary: dict[str, str]) -> str:
    """Complete HTML, with nothing from outside."""
    body = [scatter(rows), "<table>"]
    body += [f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in summary.items()]
    body.append("</table>")
    for model in dict.fromkeys(r.model for r in rows):
        mine = [r for r in rows if r.model == model and r.traces]
        shown = [r for r in mine if r.name == CHOSEN] + [r for r in mine if "8 x 1f1b" in r.name][:1]
        body += [f"<h2>{escape(r.model)}: {escape(r.name)}</h2>{timelines(r)}" for r in shown]
    style = "body{font:14px sans-serif;margin:2em}td{padding:0 1em 0 0}text{font:12px sans-serif}"
    title = "Predicted and measured"
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>"
        + "\n".join(body)
        + "\n"
    )


def scatter(rows: Sequence[Row]) -> str:
    """Seconds a step, both axes logarithmic; the diagonal is a perfect prediction, the band is 15 %."""
    values = [v for r in rows for v in (r.predicted, r.measured(False))]
    low, high = log10(min(values)) - 0.05, log10(max(values)) + 0.05

    def at(seconds: float) -> float:
        return (log10(seconds) - low) / (high - low) * SIDE

    shift = log10(1.15) / (high - low) * SIDE
    parts = [
        f'<svg width="{SIDE + 2 * EDGE}" height="{SIDE + 2 * EDGE}"><g transform="translate({EDGE},{EDGE})">',
        f'<polygon points="0,{SIDE - shift} 0,{SIDE} {shift},{SIDE} {SIDE},{shift} {SIDE},0 {SIDE - shift},0" '
        'fill="#eef2e6"/>',
        f'<line x1="0" y1="{SIDE}" x2="{SIDE}" y2="0" stroke="#888"/>',
        f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="#333"/>',
        f'<text x="{SIDE / 2}" y="{SIDE + 40}" text-anchor="middle">measured seconds a step</text>',
        f'<text x="-{SIDE / 2}" y="-40" text-anchor="middle" transform="rotate(-90)">predicted</text>',
    ]
    for tick in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
        if low < log10(tick) < high:
            parts.append(f'<text x="{at(tick)}" y="{SIDE + 18}" text-anchor="middle">{tick:g}</text>')
            parts.append(f'<text x="-8" y="{SIDE - at(tick) + 4}" text-anchor="end">{tick:g}</text>')
    models = list(dict.fromkeys(r.model for r in rows))
    for r in rows:
        colour = COLOURS[models.index(r.model) % len(COLOURS)]
        told = escape(f"{r.model}, {r.name}: {r.predicted * 1e3:.0f} ms, measured {r.measured(False) * 1e3:.0f} ms")
        x, y = at(r.measured(False)), SIDE - at(r.predicted)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{told}</title></circle>')
    for i, model in enumerate(models):
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<text x="12" y="{20 + 16 * i}" fill="{colour}">{escape(model)}</text>')
    return "".join(parts) + "</g></svg>"


def timelines(row: Row) -> str:
    """Predicted above measured, on one scale."""
    traces = (("predicted", row.trace), ("measured", row.typical()))
    longest = max(t.step_seconds for _, t in traces)
    devices = list(dict.fromkeys(e.device for e in row.trace.events))
    height = 2 * len(devices) * LANE + 40
    parts = [f'<svg width="{WIDTH + 110}" height="{height}">']
    for block, (title, trace) in enumerate(traces):
        top = block * (len(devices) * LANE + 18)
        parts.append(_lanes(trace, title, devices, top, (WIDTH - 20) / longest))
    return "".join(parts) + "</svg>"


def _lanes(trace: Trace, title: str, devices: Sequence[str], top: float, scale: float) -> str:
    begin = min(e.start for e in trace.events)
    parts = []
    for i, device in enumerate(devices):
        parts.append(f'<text x="0" y="{top + i * LANE + 15}">{title} {escape(device)}</text>')
    for e in trace.events:
        if e.kind in KINDS and e.device in devices:
            x, y = 110 + (e.start - begin) * scale, top + devices.index(e.device) * LANE + 2
            told = escape(f"{e.name} on {e.device}: {(e.end - e.start) * 1e3:.1f} ms")
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{max((e.end - e.start) * scale, 0.4):.2f}" height="{LANE - 4}" '
                f'fill="{KINDS[e.kind]}" stroke="white" stroke-width="0.4"><title>{told}</title></rect>'
            )
    return "".join(parts)
