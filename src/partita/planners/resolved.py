"""Resolved: what constraints mean for one graph and cluster, in indices of ops, with every contradiction at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from partita.check_tensor import tensor_problems
from partita.cluster import Cluster
from partita.errors import PlanError
from partita.graph import Graph, Op
from partita.plan import Plan, Stage
from partita.planners.constraints import Constraints

Named = tuple[tuple[str, tuple[int, ...]], ...]
"""(name, its ops)."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """Constraints in op indices: (name, ops) groups, (name, first op) starts, (op, device) places, (name, ops) to
    recompute, to offload, whose parameters live in host memory."""

    together: Named = ()
    starts: tuple[tuple[str, int], ...] = ()
    place: tuple[tuple[int, str], ...] = ()
    recompute: Named = ()
    offload: Named = ()
    lent: Named = ()


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
    away = tuple((name, ops) for glob in constraints.offload for name, ops in ops_of(glob, "offload").items())
    for name, ops in away:
        twice = next((other for other, theirs in again if not set(ops).isdisjoint(theirs)), None)
        if twice is not None:
            problems.append(f"recompute {twice!r} and offload {name!r} contradict: keep each part under one of them")
    lent = tuple((n, ops) for glob in constraints.lent for n, ops in ops_of(glob, "offload_parameters").items())
    problems += _lent_problems(graph, lent, again, away)
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
    problems += _degrees(constraints, len({s for _, s in starts if s}) + 1, len(cluster.devices))
    problems += _divisions(graph, cluster, constraints)
    used, most = len({d for _, d in place.values()}), _most_stages(constraints, len(cluster.devices))
    if used > most:
        problems.append(f"place uses {used} devices, each a stage of its own, but {most} stages are allowed")
    if problems:
        raise PlanError("the constraints cannot be met", tuple(dict.fromkeys(problems)))
    return Resolved(
        tuple(groups), tuple(starts), tuple((i, d) for i, (_, d) in sorted(place.items())), again, away, lent
    )


def _lent_problems(graph: Graph, lent: Named, again: Named, away: Named) -> Iterator[str]:
    """What is wrong with parameters asked to live in host memory."""
    inside = {i for _, ops in lent for i in ops}
    held: dict[str, str] = {}
    for name, ops in lent:
        for word, others in (("recompute", again), ("offload", away)):
            for other, theirs in others:
                if not set(ops).isdisjoint(theirs) and (word == "recompute" or other != name):
                    both = f"{word} {other!r} and offload_parameters {name!r}"
                    yield f"{both} contradict: keep each part under one of them"
        held |= {n: name for i in ops for n in graph.ops[i].uses() if graph.tensor(n).role == "parameter"}
    for i, op in enumerate(graph.ops):
        for used in op.uses() if held and i not in inside else ():
            if used in held:
                yield (
                    f"offload_parameters {held[used]!r}: {graph.tensor(used).path or used} is used by {op.name} too; "
                    "name that as well, or neither"
                )


def _most_stages(constraints: Constraints, devices: int) -> int:
    return min(filter(None, (constraints.max_stages, constraints.stages)), default=devices)


def _degrees(constraints: Constraints, needed: int, devices: int) -> list[str]:
    """What is wrong with numbers of stages, replicas and microbatches. ``needed``: stages that split points make."""
    lines = []
    exact, most, replicas = constraints.stages, constraints.max_stages, constraints.num_replicas
    if most and needed > most:
        lines.append(f"max_stages {most} and {needed - 1} split points contradict: they make {needed} stages")
    if exact and needed > exact:
        lines.append(f"stages {exact} and {needed - 1} split points contradict: they make {needed} stages")
    if exact and most and exact > most:
        lines.append(f"stages {exact} and max_stages {most} contradict")
    if needed > devices:
        lines.append(f"split_before makes {needed} stages, but there are {devices} devices")
    tensor = max(constraints.tensor, 1)
    if tensor > devices:
        return [*lines, f"tensor {tensor} needs {tensor} devices a stage; there are {devices}"]
    wide = max(replicas, 1) * tensor
    if max(exact, 1) * wide > devices:
        each = [f"replicas {replicas}"] * (replicas > 1) + [f"tensor {tensor}"] * (tensor > 1)
        what = " with ".join([f"stages {exact}"] * bool(exact) + each)
        what = f"stages {exact} of {replicas} replicas" if exact and replicas > 1 and tensor == 1 else what
        lines.append(f"{what} need {max(exact, 1) * wide} devices; there are {devices}")
    if tensor > 1 and needed > 1 and needed * tensor > devices >= needed:
        lines.append(f"{needed} stages with tensor {tensor} need {needed * tensor} devices; there are {devices}")
    if replicas > 1 and needed > 1 and needed * replicas > devices >= needed:
        lines.append(f"{needed} stages of {replicas} replicas need {needed * replicas} devices; there are {devices}")
    if constraints.microbatches and replicas > constraints.microbatches:
        lines.append(f"replicas {replicas} and microbatches {constraints.microbatches} contradict: one would idle")
    return lines


def _divisions(graph: Graph, cluster: Cluster, constraints: Constraints) -> list[str]:
    """What is wrong with wishes for divided ops and state."""
    lines = []
    members = max(constraints.tensor, 2)
    if constraints.shard and constraints.tensor == 1:
        lines.append(
            f"shard {constraints.shard[0][0]!r} and tensor 1 contradict: nothing is divided; drop one of the two"
        )
    elif constraints.shard:
        stage = Stage(tuple(f"member {k}" for k in range(members)), shard=constraints.shard, tensor=members)
        found = tensor_problems(Plan((stage,)), graph, dict.fromkeys((op.name for op in graph.ops), 0))
        lines += [line.removeprefix("stage 0").lstrip(", ") for line in found]
    most = max(Counter(d.node for d in cluster.devices).values(), default=0)
    if constraints.tp_within_node and constraints.tensor > most:
        lines.append(f"tensor {constraints.tensor} and tp_within_node contradict: a node has {most} devices")
    if constraints.lent and (constraints.zero > 0 or constraints.tensor > 1):
        what = f"zero {constraints.zero}" if constraints.zero > 0 else f"tensor {constraints.tensor}"
        lines.append(
            f"{what} and offload_parameters contradict: a device would hold parts of both; drop one of the two"
        )
    if constraints.zero > 0 and constraints.num_replicas == 1:
        lines.append(f"zero {constraints.zero} and replicas 1 contradict: it shards over replicas; drop one of the two")
    return lines
