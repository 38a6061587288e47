"""Constraints: what a person fixes; the planner decides the rest. Names are qualified names or globs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from partita.cluster import Cluster
from partita.errors import PlanError, UsageError
from partita.graph import Graph, Op
from partita.schedules import NAMES


@dataclass(frozen=True, slots=True)
class Constraints:
    """``keep_together``: each entry's modules in one stage (a lone glob: each module it names on its own).

    ``split_before``: a stage begins there. ``place``: (glob, device). ``recompute``: activations dropped and made
    again. ``max_stages``, ``microbatches``: 0 leaves them open. ``schedule``: empty leaves it open. ``replicas``: False
    forbids several devices for one stage.
    """

    keep_together: tuple[tuple[str, ...], ...] = ()
    split_before: tuple[str, ...] = ()
    place: tuple[tuple[str, str], ...] = ()
    recompute: tuple[str, ...] = ()
    max_stages: int = 0
    microbatches: int = 0
    schedule: str = ""
    replicas: bool = True

    @staticmethod
    def read(value: Constraints | Mapping[str, Any] | None) -> Constraints:
        """From what a person wrote. Raises UsageError naming every mistake."""
        if value is None:
            return Constraints()
        if isinstance(value, Constraints):
            return value
        known = {f.name for f in fields(Constraints)}
        problems = []
        for key in value:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                problems.append(f"{key!r} is no constraint{f'; did you mean {near[0]!r}?' if near else ''}")
        try:
            together = tuple(
                (entry,) if isinstance(entry, str) else tuple(map(str, entry))
                for entry in _several(value.get("keep_together"))
            )
            place = value.get("place") or {}
            pairs = place.items() if isinstance(place, Mapping) else place
            made = Constraints(
                together,
                tuple(map(str, _several(value.get("split_before")))),
                tuple((str(a), str(b)) for a, b in pairs),
                tuple(map(str, _several(value.get("recompute")))),
                int(value.get("max_stages") or 0),
                int(value.get("microbatches") or 0),
                str(value.get("schedule") or ""),
                bool(value.get("replicas", True)),
            )
        except (TypeError, ValueError) as error:
            raise UsageError(f"constraints cannot be read: {error}") from error
        if made.schedule and made.schedule not in NAMES:
            problems.append(f"schedule {made.schedule!r} is not known; take one of {', '.join(NAMES)}")
        if made.max_stages < 0 or made.microbatches < 0:
            problems.append("max_stages and microbatches must be 1 or more (0 leaves them open)")
        if problems:
            raise UsageError("constraints: " + "; ".join(problems))
        return made


def _several(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def enclosing(op: Op) -> tuple[str, ...]:
    """Every name the op answers to: its module's path, each module around it (calls without ``@n`` too), its own."""
    names: dict[str, None] = {}
    if op.module:
        parts = op.module.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            names[".".join(p.partition("@")[0] for p in parts[: i + 1])] = None
            names[name] = None
    names[op.name] = None
    return tuple(names)


def find(graph: Graph, glob: str) -> dict[str, tuple[int, ...]]:
    """Outermost matching name -> its ops (indices), for a glob or a plain name."""
    found: dict[str, list[int]] = {}
    for i, op in enumerate(graph.ops):
        for name in enclosing(op):
            if name == glob or fnmatchcase(name, glob):
                found.setdefault(name, []).append(i)
                break
    return {name: tuple(ops) for name, ops in found.items()}


def resolve(graph: Graph, cluster: Cluster, constraints: Constraints) -> Resolved:
    """The constraints as ops and devices. Raises PlanError with every unknown name and contradiction."""
    problems: list[str] = []

    def ops_of(glob: str, what: str) -> dict[str, tuple[int, ...]]:
        found = find(graph, glob)
        if not found:
            names = list(dict.fromkeys(n for op in graph.ops for n in enclosing(op)))
            near = get_close_matches(glob, names, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else f"; the model has {', '.join(names[:6])}, ..."
            problems.append(f"{what}: {glob!r} names no module or op of {graph.name or 'the model'}{hint}")
        return found

    groups: list[tuple[str, tuple[int, ...]]] = []
    for entry in constraints.keep_together:
        found = [(name, ops) for glob in entry for name, ops in ops_of(glob, "keep_together").items()]
        if len(entry) == 1:
            groups += found
        elif found:
            groups.append((" + ".join(entry), tuple(sorted({i for _, ops in found for i in ops}))))
    starts: list[tuple[str, int]] = []
    for glob in constraints.split_before:
        starts += [(name, min(ops)) for name, ops in ops_of(glob, "split_before").items()]
    place: dict[int, tuple[str, str]] = {}
    devices = {d.name for d in cluster.devices}
    for glob, device in constraints.place:
        if device not in devices:
            problems.append(f"place: no device {device!r}; there are {', '.join(sorted(devices))}")
        for ops in ops_of(glob, "place").values():
            for i in ops:
                if i in place and place[i][1] != device:
                    problems.append(
                        f"place: {graph.ops[i].name} is put on {place[i][1]} by {place[i][0]!r} and on {device} by "
                        f"{glob!r}; drop one of the two"
                    )
                place.setdefault(i, (glob, device))
    again = tuple((name, ops) for glob in constraints.recompute for name, ops in ops_of(glob, "recompute").items())
    for name, start in starts:
        for group, ops in groups:
            if min(ops) < start <= max(ops):
                problems.append(
                    f"keep_together {group!r} and split_before {name!r} contradict: {name!r} lies "
                    "inside; drop one of the two"
                )
        if start == 0:
            problems.append(f"split_before {name!r}: it is the beginning of the model; there is nothing before it")
    for group, ops in groups:
        where = {place[i][1]: place[i][0] for i in ops if i in place}
        if len(where) > 1:
            (a, x), (b, y), *_ = where.items()
            problems.append(f"keep_together {group!r} contradicts place {x!r} on {a} and place {y!r} on {b}")
    needed = len({s for _, s in starts if s}) + 1
    if constraints.max_stages and needed > constraints.max_stages:
        problems.append(
            f"max_stages {constraints.max_stages} and {needed - 1} split points contradict: they make {needed} stages"
        )
    if needed > len(cluster.devices):
        problems.append(f"split_before makes {needed} stages, but there are {len(cluster.devices)} devices")
    if len({d for _, d in place.values()}) > (constraints.max_stages or len(cluster.devices)):
        problems.append(f"place uses more devices than max_stages {constraints.max_stages} allows")
    if problems:
        raise PlanError("the constraints cannot be met", tuple(dict.fromkeys(problems)))
    return Resolved(tuple(groups), tuple(starts), tuple((i, d) for i, (_, d) in sorted(place.items())), again)


@dataclass(frozen=True, slots=True)
class Resolved:
    """Constraints in op indices: (name, ops) groups, (name, first op) starts, (op, device) places, (name, ops) to
    recompute."""

    together: tuple[tuple[str, tuple[int, ...]], ...] = ()
    starts: tuple[tuple[str, int], ...] = ()
    place: tuple[tuple[int, str], ...] = ()
    recompute: tuple[tuple[str, tuple[int, ...]], ...] = ()
