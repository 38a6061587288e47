"""Asked: a person's constraints as limits of the search and marks on the row of units."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np

from partita.cost.blocks import legal_cuts
from partita.errors import PlanError
from partita.graph import Graph
from partita.planners.constraints import Constraints
from partita.planners.large.marks import Marks, Placed
from partita.planners.large.prices import Pool
from partita.planners.large.search import Limits
from partita.planners.large.tensor import WHOLE, Form
from partita.planners.large.units import Units, op_work, units
from partita.planners.resolved import enclosing, find

MOST = 0.9  # of a unit's work in the ops that were named: the unit is meant


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """``wanted``: parameters that must be held so where ops are divided."""

    units: Units
    limits: Limits
    marks: Marks
    wanted: dict[str, Form]


def asked(graph: Graph, pools: Sequence[Pool], constraints: Constraints) -> Asked:
    """The constraints for this model on these devices. Raises PlanError with every name that means nothing."""
    problems: list[str] = []
    names = _Names(graph, problems)
    together = [ops for entry in constraints.keep_together for ops in names.groups(entry, alone=len(entry) == 1)]
    starts = [(name, ops[0]) for glob in constraints.split_before for name, ops in names.of(glob, "split_before")]
    again, away = (
        [ops for glob in getattr(constraints, what) for _, ops in names.of(glob, what)]
        for what in ("recompute", "offload")
    )
    legal = legal_cuts(graph) if starts else ()
    for name, op in starts:
        if op == 0:
            problems.append(f"split_before {name!r}: it is the beginning of the model; there is nothing before it")
        elif not legal[op]:
            problems.append(f"split_before {name!r}: an op after it changes in place what an op before it made")
    wanted = _wanted(graph, constraints.shard, problems)
    row = _row(graph, [op for _, op in starts], together, [*again, *away])
    marks = _marks(graph, row, [op for _, op in starts], together, again, away)
    both = {u.kind for u, a, h in zip(row.row, marks.again, marks.away, strict=True) if a and not h}
    if both & {u.kind for u, h in zip(row.row, marks.away, strict=True) if h}:
        problems.append("recompute and offload name equal parts, which are kept in one way here: take one of them")
    if constraints.lent:
        problems.append(
            "offload_parameters is for devices of one process; on described clusters each has its own process, and "
            "zero 3 divides parameters there"
        )
    if away and not all(pool.device.host_bandwidth for pool in pools):
        problems.append("offload: nobody said how fast the devices reach host memory; describe host_bandwidth")
    places = tuple(
        _placed(graph, row, pools, ops, device, problems)
        for glob, device in constraints.place
        for _, ops in names.of(glob, "place")
    )
    if problems:
        raise PlanError("the constraints cannot be met", tuple(dict.fromkeys(problems)))
    marks = Marks(marks.cuts, marks.floor, marks.again, marks.away, tuple(p for p in places if p is not None))
    return Asked(row, limits_of(constraints), marks, wanted)


def limits_of(constraints: Constraints) -> Limits:
    """The numbers among them."""
    sharded = any(how != "Replicate" for _, how in constraints.shard)
    return Limits(
        degree=constraints.tensor,
        replicas=constraints.num_replicas,
        chunks=constraints.stages_per_device,
        sequence=constraints.sequence,
        within_node=constraints.tp_within_node is not False,
        zero=constraints.zero,
        total=constraints.stages,
        most=constraints.max_stages,
        microbatches=constraints.microbatches,
        divided=sharded,
        order=constraints.schedule,
    )


class _Names:
    """Looks names up; what is not found becomes a problem with the nearest names."""

    def __init__(self, graph: Graph, problems: list[str]) -> None:
        self.graph, self.problems = graph, problems

    def of(self, glob: str, what: str) -> list[tuple[str, tuple[int, ...]]]:
        found = find(self.graph, glob)
        if not found:
            known = list(dict.fromkeys(n for op in self.graph.ops for n in enclosing(op)))
            near = get_close_matches(glob, known, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else f"; the model has {', '.join(known[:6])}, ..."
            self.problems.append(f"{what}: {glob!r} names no module or op of {self.graph.name or 'the model'}{hint}")
        return list(found.items())

    def groups(self, entry: Sequence[str], *, alone: bool) -> list[tuple[int, ...]]:
        """Ops to keep in one stage: of each name a lone glob stands for, or of all names of the entry."""
        found = [ops for glob in entry for _, ops in self.of(glob, "keep_together")]
        return found if alone or not found else [tuple(sorted({i for ops in found for i in ops}))]


def _row(
    graph: Graph, starts: Iterable[int], together: Iterable[Sequence[int]], again: Iterable[Sequence[int]]
) -> Units:
    """The model's units, with as many more as the names need."""
    plain = units(graph)
    also = set(starts)
    for ops in together:
        also |= {min(ops), max(ops) + 1}
    for ops in again:
        if any(0.1 < share < MOST for share in _shares(graph, plain, ops).values()):
            also |= {min(ops), max(ops) + 1}
    return units(graph, also=also) if also else plain


def _shares(graph: Graph, row: Units, ops: Sequence[int]) -> dict[int, float]:
    """Unit -> the part of its work that is in these ops."""
    mine, found = set(ops), {}
    for u, unit in enumerate(row.row):
        if unit.stop <= min(ops) or unit.start > max(ops):
            continue
        work = [op_work(graph, graph.ops[i]) for i in unit.ops]
        inside = sum(w for i, w in zip(unit.ops, work, strict=True) if i in mine)
        found[u] = inside / sum(work) if sum(work) else float(all(i in mine for i in unit.ops))
    return found


def _marks(
    graph: Graph, row: Units, starts: Sequence[int], together: Sequence[Sequence[int]], again: Sequence[Sequence[int]],
    away: Sequence[Sequence[int]],
) -> Marks:  # fmt: skip
    marks = Marks.none(len(row.row))
    at = np.array([u.start for u in row.row])
    meant = {*starts, *(min(ops) for ops in together), *(max(ops) + 1 for ops in together)}
    for u in row.extra:
        marks.cuts[u] = row.row[u].start in meant  # others begin a unit to be recomputed, not a stage
    for ops in together:
        marks.cuts[(at > min(ops)) & (at <= max(ops))] = False
    for op in starts:
        unit = int(np.searchsorted(at, op))
        marks.floor[unit + 1 :] = np.maximum(marks.floor[unit + 1 :], unit)
    for ops in again:
        for u, share in _shares(graph, row, ops).items():
            marks.again[u] |= share >= MOST
    for ops in away:
        for u, share in _shares(graph, row, ops).items():
            marks.away[u] |= share >= MOST
            marks.again[u] |= share >= MOST
    return marks


def _placed(
    graph: Graph, row: Units, pools: Sequence[Pool], ops: Sequence[int], device: str, problems: list[str]
) -> Placed | None:
    shares = _shares(graph, row, ops)
    inside = [u for u, share in shares.items() if share >= 0.5] or [max(shares, key=lambda u: shares[u])]
    for k, pool in enumerate(pools):
        if device in pool.names:
            return Placed(min(inside), max(inside), k, pool.names.index(device))
    for k, pool in enumerate(pools):
        if fnmatchcase(pool.device.kind, device):
            return Placed(min(inside), max(inside), k)
    known = [*(p.device.kind for p in pools), *(n for p in pools for n in p.names)]
    near = get_close_matches(device, known, n=2)
    problems.append(
        f"place: no device or kind {device!r}; {'did you mean ' + ' or '.join(near) if near else 'there are'} "
        f"{'' if near else ', '.join(known[:4]) + ', ...'}".rstrip()
    )
    return None


def _wanted(graph: Graph, shard: Sequence[tuple[str, str]], problems: list[str]) -> dict[str, Form]:
    found: dict[str, Form] = {}
    parameters = list(graph.of_role("parameter"))
    for glob, how in shard:
        number = re.search(r"\d+", how)
        mine = [t for t in parameters if fnmatchcase(t.path or t.name, glob)]
        if not mine:
            near = get_close_matches(glob, [t.path or t.name for t in parameters], n=3)
            problems.append(f"shard: {glob!r} names no parameter{f'; did you mean {near}?' if near else ''}")
        for tensor in mine:
            if number and int(number.group()) >= len(tensor.shape):
                problems.append(f"shard: {tensor.path or tensor.name} has {len(tensor.shape)} dims; {how} needs more")
            found[tensor.name] = int(number.group()) if number else WHOLE
    return found
