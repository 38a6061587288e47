"""Which stage runs each op of a graph under a plan: the one reading of a plan's names, for check, lowering and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache

from partita.graph import Graph, Op
from partita.plan import Plan


def covers(module: str, call: str) -> bool:
    """Whether a plan's module name covers a module call: ``blocks.0`` covers ``blocks.0.attn`` and ``blocks.0@1``,
    ``blocks.0@1`` only that call (with what it calls), ``blocks.0@0`` the first, ``""`` (the model) everything.
    """
    if not module:
        return True
    if "@" not in module and "@" not in call:
        return call.startswith(module) and (len(call) == len(module) or call[len(module)] == ".")
    return _fits(_parts(module), _parts(call))


@lru_cache(maxsize=1 << 16)
def _parts(name: str) -> tuple[tuple[str, str], ...]:
    """``blocks.0@1`` -> (('blocks', ''), ('0', '1'))."""
    if not name:
        return ()
    return tuple((part, call) for part, _, call in (word.partition("@") for word in name.split(".")))


def _fits(prefix: tuple[tuple[str, str], ...], parts: tuple[tuple[str, str], ...]) -> bool:
    if len(prefix) > len(parts):
        return False
    return all(a[0] == b[0] and (not a[1] or a[1] == (b[1] or "0")) for a, b in zip(prefix, parts, strict=False))


class Names:
    """What each name in ``lists`` (one list of module names per index) claims; the longest name that covers wins."""

    def __init__(self, lists: Iterable[Iterable[str]]) -> None:
        self._table: dict[tuple[str, ...], list[tuple[int, tuple[tuple[str, str], ...], int]]] = {}
        self._memo: dict[str, int | None] = {}
        for index, names in enumerate(lists):
            for name in names:
                parts = _parts(name)
                rank = 2 * len(parts) * 64 + sum(bool(call) for _, call in parts)
                self._table.setdefault(tuple(p for p, _ in parts), []).append((rank, parts, index))
        for entries in self._table.values():
            entries.sort(key=lambda e: (-e[0], e[2]))

    def find(self, call: str) -> int | None:
        """Index of the list whose name covers this module call best; None where none does."""
        if call not in self._memo:
            self._memo[call] = self._search(call)
        return self._memo[call]

    def first(self, call: str) -> int | None:
        """Index of the first list with a name that covers this module call."""
        return min(self._covering(call), default=None)

    def _search(self, call: str) -> int | None:
        return next(self._covering(call), None)

    def _covering(self, call: str) -> Iterator[int]:
        """Longest names first."""
        parts = _parts(call)
        plain = tuple(p for p, _ in parts)
        for length in range(len(plain), -1, -1):
            for _, prefix, index in self._table.get(plain[:length], ()):
                if _fits(prefix, parts):
                    yield index


def listing_of(patterns: tuple[str, ...]) -> Callable[[Op], int]:
    """Op -> position of the first pattern that names it or a module around it; -1: none does."""
    names = Names([p] for p in patterns)
    single = {p: at for at, p in reversed(tuple(enumerate(patterns)))}

    def position(op: Op) -> int:
        return min((at for at in (names.first(op.module), single.get(op.name)) if at is not None), default=-1)

    return position


def listed(plan: Plan, graph: Graph) -> dict[str, int]:
    """Op name -> stage, for the ops the plan names (alone or through a module)."""
    single = {name: s for s, stage in reversed(tuple(enumerate(plan.stages))) for name in stage.ops}
    names = Names(stage.modules for stage in plan.stages)
    found: dict[str, int] = {}
    for op in graph.ops:
        stage = single.get(op.name)
        if stage is None:
            stage = names.find(op.module)
        if stage is not None:
            found[op.name] = stage
    return found


def assign(plan: Plan, graph: Graph) -> dict[str, int]:
    """Op name -> index of the stage that runs it, for every op.

    Named ops win, then the longest module name that covers. What no stage names runs at the latest stage among the ops
    whose results it uses; where there are none (masks, constants), at the earliest stage among the ops that use it.
    An op made of nothing but constants and inputs (``arange``) moves forward to its first user, whoever lists it.
    """
    return pulled(graph, complete(graph, listed(plan, graph)))


def stages_of(plan: Plan, graph: Graph) -> dict[str, int]:
    """``assign`` for a graph that the plan may not have been made for (another mode, other arguments): ops that change
    one memory in place run where it was made, however many stages that takes together.

    What is in the way moves to later stages, as little as there is: a stage that has only a copy would change that.
    """
    stage = assign(plan, graph)
    groups = [(*writers, *others) for _, writers, others in changed_in_place(graph)]
    if all(len({stage[op.name] for op in group}) < 2 for group in groups):
        return stage
    before: dict[str, int] = {}
    while before != stage:
        before = dict(stage)
        for group in groups:
            stage.update(dict.fromkeys((op.name for op in group), max(stage[op.name] for op in group)))
        for op in graph.ops:
            makers = [i for i in map(graph.producer, op.uses()) if i is not None]
            stage[op.name] = max(stage[op.name], *(stage[graph.ops[i].name] for i in makers), 0)
    return stage


def changed_in_place(graph: Graph) -> list[tuple[str, list[Op], list[Op]]]:
    """(memory, the ops that change it, the op that made it or, for what comes from outside, all that use it)."""
    touching: dict[str, list[Op]] = {}
    written: dict[str, list[Op]] = {}
    for op in graph.ops:
        for base in {graph.tensor(t).base or t for t in op.uses()}:
            touching.setdefault(base, []).append(op)
        for base in op.writes:
            written.setdefault(base, []).append(op)
    found = []
    for base, writers in written.items():
        producer = graph.producer(base)
        others = [graph.ops[producer]] if producer is not None else touching.get(base, [])
        found.append((base, writers, others))
    return found


def pulled(graph: Graph, stage: Mapping[str, int]) -> dict[str, int]:
    """``stage`` with each op that follows no other stage's work no later than the first op that uses its result."""
    free: set[str] = set()
    for op in graph.ops:
        makers = [graph.producer(name) for name in op.uses()]
        loose = all(i is None or graph.ops[i].name in free for i in makers)
        if loose and not op.writes and not any(graph.tensor(o).needs_grad for o in op.outputs if o):
            free.add(op.name)
    result = dict(stage)
    for op in reversed(graph.ops):
        for name in op.uses():
            maker = graph.producer(name)
            if maker is not None and graph.ops[maker].name in free:
                made = graph.ops[maker].name
                result[made] = min(result[made], result[op.name])
    return result


def complete(graph: Graph, known: Mapping[str, int]) -> dict[str, int]:
    """``known`` extended to every op by the rule of ``assign``."""
    stage: dict[str, int] = dict(known)
    loose: list[Op] = []
    for op in graph.ops:
        if op.name in stage:
            continue
        before = [i for i in (graph.producer(name) for name in op.uses()) if i is not None]
        stages = [stage[graph.ops[i].name] for i in before if graph.ops[i].name in stage]
        if stages:
            stage[op.name] = max(stages)
        else:
            loose.append(op)
    if not loose:
        return {op.name: stage[op.name] for op in graph.ops}
    waiting = {op.name for op in loose}
    consumers: dict[str, list[str]] = {name: [] for name in waiting}
    touching: dict[str, list[str]] = {}
    for op in graph.ops:
        for name in op.uses():
            producer = graph.producer(name)
            if producer is not None and graph.ops[producer].name in waiting:
                consumers[graph.ops[producer].name].append(op.name)
        for base in op.writes:
            touching.setdefault(base, []).append(op.name)
        for base in {graph.tensor(name).base or name for name in op.uses()}:
            touching.setdefault(base, []).append(op.name)
    for op in reversed(loose):
        after = [stage[name] for name in consumers[op.name] if name in stage]
        if not after:
            after = [stage[name] for base in op.writes for name in touching.get(base, ()) if name in stage]
        stage[op.name] = min(after, default=0)
    return {op.name: stage[op.name] for op in graph.ops}
