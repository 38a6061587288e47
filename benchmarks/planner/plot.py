"""Plot: lines of points on logarithmic axes as one small SVG, no library needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10

WIDTH, HEIGHT, MARGIN = 420, 300, 56
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37")


@dataclass(frozen=True, slots=True)
class Line:
    """``points``: (x, y), both above 0."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    x: str
    y: str
    lines: tuple[Line, ...]


def svg(panels: Sequence[Panel]) -> str:
    """The panels side by side."""
    drawn = "\n".join(
        f'<g transform="translate({i * WIDTH},0)">\n{_panel(panel)}\n</g>' for i, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(panels) * WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n{drawn}\n</svg>\n'
    )


def _panel(panel: Panel) -> str:
    xs = [x for line in panel.lines for x, _ in line.points]
    ys = [y for line in panel.lines for _, y in line.points]
    low_y, high_y = 10 ** floor(log10(min(ys))), max(ys) * 1.3

    def at(x: float, y: float) -> tuple[float, float]:
        across = log10(x / min(xs)) / max(log10(max(xs) / min(xs)), 1e-9)
        up = log10(y / low_y) / log10(high_y / low_y)
        return MARGIN + across * (WIDTH - 1.6 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    parts = [f'<text x="{WIDTH / 2}" y="20" text-anchor="middle" font-size="13">{panel.title}</text>']
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">{panel.x}</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">{panel.y}</text>'
    )
    for x in sorted(set(xs)):
        left, bottom = at(x, low_y)
        parts.append(f'<text x="{left:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{x:g}</text>')
    for k in range(floor(log10(low_y)), floor(log10(high_y)) + 1):
        for times in (1, 2, 5):
            if low_y <= times * 10.0**k <= high_y:
                left, height = at(min(xs), times * 10.0**k)
                right, _ = at(max(xs), low_y)
                parts.append(f'<path d="M{left:.1f} {height:.1f}H{right:.1f}" stroke="#ddd"/>')
                parts.append(
                    f'<text x="{left - 4:.1f}" y="{height + 4:.1f}" text-anchor="end">{times * 10.0**k:g}</text>'
                )
    for line, colour in zip(panel.lines, COLOURS, strict=False):
        path = " L".join(f"{a:.1f} {b:.1f}" for a, b in (at(x, y) for x, y in line.points))
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        a, b = at(*line.points[-1])
        parts.append(f'<text x="{a - 4:.1f}" y="{b - 6:.1f}" text-anchor="end" fill="{colour}">{line.name}</text>')
    return "\n".join(parts)
