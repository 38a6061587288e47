"""Manual: a person's split points, or any op -> stage map, as a Plan in the model's own names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from partita.assign import covers
from partita.errors import PlanError
from partita.graph import Graph
from partita.plan import Batch, Plan, Stage


def stage_names(
    graph: Graph, stage_of: Mapping[str, int], count: int
) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Per stage (modules, ops): the fewest names that say the map; whole modules where they are whole."""
    stages_in: dict[str, set[int]] = {}
    for op in graph.ops:
        for module in _enclosing(op.module):
            stages_in.setdefault(module, set()).add(stage_of[op.name])
    listed: list[tuple[dict[str, None], dict[str, None]]] = [({}, {}) for _ in range(count)]
    for op in graph.ops:
        stage = stage_of[op.name]
        whole = next((m for m in _enclosing(op.module) if len(stages_in[m]) == 1), None)
        modules, ops = listed[stage]
        if whole is None:
            ops[op.name] = None
        else:
            modules[whole] = None
    if any("@" in module for module in stages_in):  # else nothing is called twice: a thousand layers stay quick
        return tuple((tuple(_merge_calls(modules, stages_in)), tuple(ops)) for modules, ops in listed)
    return tuple((tuple(modules), tuple(ops)) for modules, ops in listed)


def _enclosing(module: str) -> Iterable[str]:
    """'a.b.c' -> 'a', 'a.b', 'a.b.c': outermost first, the model itself left out."""
    parts = module.split(".") if module else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _merge_calls(modules: Mapping[str, None], stages_in: Mapping[str, set[int]]) -> Iterable[str]:
    """``b, b@1, b@2`` of one stage are ``b`` when no call of b is elsewhere."""
    result: dict[str, None] = {}
    for name in modules:
        plain = ".".join(part.partition("@")[0] for part in name.split("."))
        calls = [s for m, s in stages_in.items() if covers(plain, m)]
        merged = name if plain != name and len(set().union(*calls)) > 1 else plain
        if plain == name and len(set().union(*calls)) > 1:
            merged = name if "@" in name or not _has_calls(plain, stages_in) else f"{name}@0"
        result[merged] = None
    return result


def _has_calls(plain: str, stages_in: Mapping[str, set[int]]) -> bool:
    last = plain.rpartition(".")[2]
    return any(m != plain and m.rpartition(".")[2].partition("@")[0] == last and "@" in m for m in stages_in)


def plan_from_cuts(
    graph: Graph,
    at: Sequence[str],
    devices: Sequence[str],
    *,
    batch: int = 0,
    microbatches: int = 1,
    schedule: str = "1f1b",
) -> Plan:
    """Stage k begins where the first op of ``at[k-1]`` (a module, a module call or an op) stands in the model's order.

    Raises PlanError naming every split point that is unknown or out of order.
    """
    if len(devices) < len(at) + 1:
        raise PlanError(
            f"{len(at)} split points make {len(at) + 1} stages, but there are {len(devices)} devices: "
            f"give {len(at) + 1} devices or fewer split points"
        )
    modules = dict.fromkeys(m for op in graph.ops for m in _enclosing(op.module))
    problems: list[str] = []
    starts: list[int] = []
    for name in at:
        first = next(
            (i for i, op in enumerate(graph.ops) if op.name == name or (name and covers(name, op.module))), None
        )
        if first is None:
            near = difflib.get_close_matches(name, list(modules), n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(near)}?" if near else f"; the model has {', '.join(list(modules)[:8])}"
            problems.append(f"split point '{name}' names no module or op that runs{hint}")
        elif first == 0:
            problems.append(f"split point '{name}' is the very beginning of the model: the first stage would be empty")
        elif starts and first <= starts[-1]:
            problems.append(
                f"split point '{name}' runs before '{at[len(starts) - 1]}' or begins with it: "
                "list them in the order they run"
            )
        else:
            starts.append(first)
            continue
        starts.append(starts[-1] if starts else 0)
    if problems:
        raise PlanError("the model cannot be split there:", tuple(problems))
    stage_of = {op.name: sum(i >= s for s in starts) for i, op in enumerate(graph.ops)}
    names = stage_names(graph, stage_of, len(at) + 1)
    stages = tuple(Stage((devices[i],), modules=m, ops=o) for i, (m, o) in enumerate(names))
    return Plan(
        stages=stages,
        model=graph.name,
        fingerprint=graph.fingerprint,
        devices=tuple(devices[: len(stages)]),
        batch=Batch(batch or graph.batch, microbatches),
        schedule=schedule,
        reasons=tuple(f"split before {name}, by hand" for name in at),
    )


def plan_live(
    children: Sequence[tuple[str, int]], name: str, devices: Sequence[str], *, at: Sequence[str] = (), reason: str = ""
) -> Plan:
    """For a model that must run as its Python goes: child modules (name, parameter bytes) in order, over the devices.

    ``at``: where each next device begins; empty: parts of near-equal bytes.
    """
    problems = []
    order = [n for n, _ in children]
    for point in at:
        if point not in order:
            near = difflib.get_close_matches(point, order, n=3, cutoff=0.4)
            problems.append(
                f"split point '{point}' is not a module{'; did you mean ' + ', '.join(near) if near else ''}"
            )
    if problems:
        raise PlanError("the model cannot be split there:", tuple(problems))
    parts: list[list[str]] = [[] for _ in devices]
    total, done = sum(b for _, b in children) or 1, 0
    current = 0
    for child, nbytes in children:
        if at:
            current += child in at
        else:
            current = min(len(devices) - 1, done * len(devices) // total)
        parts[min(current, len(devices) - 1)].append(child)
        done += nbytes
    stages = tuple(Stage((d,), modules=tuple(p)) for d, p in zip(devices, parts, strict=True) if p)
    why = f"runs as its Python goes, one device at a time: {reason}" if reason else "runs as its Python goes"
    return Plan(
        stages=stages or (Stage((devices[0],)),), model=name, devices=tuple(devices), schedule="gpipe", reasons=(why,)
    )
