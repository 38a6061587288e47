"""A plan in plain words: a line for what it is, a table of its stages, and why it is so."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from weakref import WeakKeyDictionary

from partita.device_names import shortened
from partita.plan import Offload, Plan
from partita.units import format_bytes, format_seconds

MOST_ROWS = 40
_NUMBER = re.compile(r"(?:(?<=[.:])|^)(?:0|[1-9][0-9]*)$", re.ASCII)


def shorten(names: Sequence[str], limit: int = 48) -> str:
    """``blocks.0, blocks.1, cpu:0, cpu:1`` -> ``blocks.0-1, cpu:0-1``; the rest is counted where it does not fit."""
    runs: list[list[str]] = []  # [stem, first number, last number] or [name]
    for name in names:
        number = _NUMBER.search(name)
        if number is None:
            runs.append([name])
            continue
        stem, last = name[: number.start()], number.group()
        if runs and len(runs[-1]) == 3 and runs[-1][0] == stem and int(runs[-1][2]) == int(last) - 1:
            runs[-1][2] = last
        else:
            runs.append([stem, last, last])
    parts = ["".join(r[:2]) + (f"-{r[2]}" if len(r) == 3 and r[1] != r[2] else "") for r in runs]
    text = ""
    for i, part in enumerate(parts):
        longer = f"{text}, {part}" if text else part
        if len(longer) > limit and text:
            return f"{text}, and {len(parts) - i} more"
        text = longer
    return text


def offloaded(offload: Offload, limit: int = 48) -> str:
    """What waits in host memory: ``blocks.0-5; parameters of emb``."""
    parts = [shorten(offload.activations, limit)] if offload.activations else []
    parts += [f"parameters of {shorten(offload.parameters, limit)}"] if offload.parameters else []
    return "; ".join(parts) or "-"


def compiles(names: Sequence[str], limit: int = 48) -> str:
    """What ``torch.compile`` takes: ``blocks.0-5``; all of a stage."""
    return "all of it" if tuple(names) == ("",) else shorten(names, limit) or "-"


def counted(words: Sequence[str]) -> str:
    """``2MiB, 2MiB, 1MiB`` -> ``2 x 2MiB, 1MiB``."""
    groups = [(word, len(list(same))) for word, same in groupby(words)]
    return ", ".join(word if n == 1 else f"{n} x {word}" for word, n in groups)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned by spaces, a rule under the header."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


_LATER: WeakKeyDictionary[Plan, Callable[[], tuple[str, ...]]] = WeakKeyDictionary()


def explain_later(plan: Plan, reasons: Callable[[], tuple[str, ...]]) -> Plan:
    """The same plan; reasons that take planning again are worked out when somebody asks (``complete``)."""
    _LATER[plan] = reasons
    return plan


def complete(plan: Plan) -> Plan:
    """The plan with every reason its planner can give, worked out once; a file's plan has those it was saved with."""
    later = _LATER.get(plan)
    if later is None:
        return plan
    found = later()
    _LATER[plan] = lambda: found
    return replace(plan, reasons=(*plan.reasons, *found))


def _some(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """All rows, or the first and last of very many."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    left_out = len(rows) - MOST_ROWS + 1
    return [*rows[: MOST_ROWS - 4], ("...", f"{left_out} stages more", *[""] * (len(rows[0]) - 2)), *rows[-3:]]


def explain(plan: Plan) -> str:
    """``Plan.explain()``."""
    plan = complete(plan)
    count = len(plan.stages)
    size = f", {plan.batch.size} samples" if plan.batch.size else ""
    lines = [
        f"{plan.model or 'model'}: {count} stage{'s' if count != 1 else ''} on {shorten(shortened(plan.devices), 90)}; "
        f"{plan.batch.microbatches} microbatch{'es' if plan.batch.microbatches != 1 else ''}{size}; "
        f"schedule {plan.schedule}"
    ]
    if plan.status == "manual":
        lines.append("written by hand")
    else:
        gap = f", at most {plan.gap:.1%} from the best possible" if plan.status == "feasible" and plan.gap else ""
        lines.append(f"found by the planner ({plan.status}{gap})")
    if plan.batch_norm != "exact":
        lines.append("batch statistics are taken per microbatch, as allowed: numbers differ from the unsplit model's")
    memory = dict(plan.predicted.memory) if plan.predicted else {}
    rows: list[tuple[str, ...]] = []
    hosted, faster = (any(getattr(stage, word) for stage in plan.stages) for word in ("offload", "compile"))
    for i, stage in enumerate(plan.stages):
        parts = shorten(stage.modules)
        if stage.ops:
            parts = f"{parts}{' + ' if parts else ''}{len(stage.ops)} op{'s' if len(stage.ops) != 1 else ''}"
        need = counted([format_bytes(memory[d]) for d in stage.devices if d in memory])
        runs = parts or "what no other stage lists"
        kept = [shorten(stage.recompute) or "-", offloaded(stage.offload)]
        kept = kept[: 1 + hosted] + [compiles(stage.compile)] * faster
        rows.append((str(i), shorten(shortened(stage.devices)), runs, *kept, need or "-"))
    words = ["recomputes", *["offloads"] * hosted, *["compiles"] * faster]
    titles = ("stage", "devices", "runs", *words, "peak memory")
    lines += ["", *table(titles, _some(rows))]
    cores = [d for stage in plan.stages if stage.offload for d in stage.devices if d.startswith("cpu")]
    if cores:
        lines += ["", f"offload gains nothing on {shorten(shortened(cores))}: the host's memory is theirs"]
    sharded: dict[tuple[str, str], list[str]] = {}
    for i, stage in enumerate(plan.stages):
        for entry in stage.shard:
            sharded.setdefault(entry, []).append(f":{i}")
    if sharded:
        lines += ["", "sharded:"]
    for (name, how), at in sharded.items():
        where = shorten(at, 60).replace(":", "")
        lines.append(f"  stage{'s' * (len(at) > 1)} {where}: {name} as {how}")
    if plan.predicted is not None and plan.predicted.step_seconds:
        predicted = plan.predicted
        speedup = predicted.one_device_seconds / predicted.step_seconds
        ratio = f", {speedup:.2f}x one device" if speedup else ""
        slow = f"; {predicted.bottleneck} is the slowest" if predicted.bottleneck else ""
        lines += ["", f"predicted: {format_seconds(predicted.step_seconds)} a step{ratio}{slow}"]
    if plan.reasons:
        lines += ["", "why:", *(f"  - {reason}" for reason in plan.reasons)]
    return "\n".join(lines)
