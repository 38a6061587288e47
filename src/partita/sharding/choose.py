"""Choose: which dim of each op of a stage its group divides, so that work and messages together take least time.

    x ─ norm ─ linear n ─ gelu n ─ linear k ─ + x        one all_reduce forward, one backward: Megatron's pair
                                                          (Shoeybi et al. 2019), found, not written down

Candidates spread from the dims of parameters and of heads through the rules, in both directions; then the cheapest
labelling is found (``eliminate``). The wishes of a plan (``Stage.shard``) leave what agrees with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from partita.graph import Graph, Op, Size
from partita.sharding.eliminate import Table, cheapest
from partita.sharding.options import Option, Ways, functional
from partita.sharding.placements import REPLICATE, Partial, Placement, Shard, even, parse_placement
from partita.sharding.prices import Prices, conversion, keeping, work
from partita.sharding.reading import VIEWS, short

PER_TENSOR, PER_OP = 5, 9
APART = 1e6  # seconds: only where a plan asks for nothing else is a divided parameter gathered
Wishes = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """``options``: of every op of the stage. ``held``: of every parameter it uses. ``seconds``: the search's price."""

    options: Mapping[str, Option]
    held: Mapping[str, Placement]
    seconds: float = 0.0


def choose(
    graph: Graph,
    ops: Iterable[str],
    members: int,
    *,
    wishes: Wishes = (),
    outside: frozenset[str] = frozenset(),
    whole: frozenset[str] = frozenset(),
    prices: Prices | None = None,
) -> Choice:
    """The cheapest way to run these ops (in program order) on ``members`` members.

    ``outside``: tensors that others need whole. ``whole``: parameters that must be held whole (used elsewhere too).
    """
    inside = set(ops)
    search = _Search(graph, [op for op in graph.ops if op.name in inside], members, wishes, outside, whole)
    search.spread()
    return search.solve(prices or Prices())


class _Search:
    def __init__(
        self, graph: Graph, ops: list[Op], members: int, wishes: Wishes, outside: frozenset[str], whole: frozenset[str]
    ) -> None:
        self.graph, self.ops, self.members, self.outside = graph, ops, members, outside
        self.ways = {op.name: Ways(graph, op, members) for op in ops}
        self.options = {op.name: {("replicated", None): self.ways[op.name].replicated()} for op in ops}
        self.made_by = {o: op for op in ops for o in op.outputs if o}
        self.users: dict[str, list[tuple[Op, int]]] = {}
        for op in ops:
            for i, t in enumerate(self.ways[op.name].operands):
                self.users.setdefault(t.name, []).append((op, i))
        self.parameters = {n for n in self.users if graph.tensor(n).role == "parameter"}
        read = {n for op in ops for n in op.reads}  # a piece that runs as one op takes its parameters whole
        self.whole = {n for n in self.parameters if n in whole or n in read}
        self.placements: dict[str, dict[Placement, None]] = {}
        self.queue: dict[str, None] = {}
        self.wanted_of_tensor: dict[str, int | str] = {}
        self.wanted_of_op: dict[str, int | str] = {}
        for pattern, text in wishes:
            wish = parse_placement(text)
            for name in self.parameters:
                tensor = graph.tensor(name)
                if any(matches(pattern, n) for n in (tensor.path, name, *self._aliases(tensor.path))):
                    self.wanted_of_tensor.setdefault(name, _counted(wish, len(tensor.shape)))
            for op in ops:
                if matches(pattern, op.name) and op.outputs and op.outputs[0]:
                    ndim = len(graph.tensor(op.outputs[0]).shape)
                    self.wanted_of_op.setdefault(op.name, _counted(wish, ndim))
        self.held_still = in_place(graph, ops)
        for name in self.held_still:
            self.ways[name].fixed = True

    def _aliases(self, path: str) -> tuple[str, ...]:
        return tuple(alias for alias, held in self.graph.ties if held == path)

    # -- candidates ------------------------------------------------------------------------------------------------

    def spread(self) -> None:
        """Enter every option that follows from the dims of parameters and of parted dims."""
        for op in self.ops:
            ways = self.ways[op.name]
            if ways.fixed:
                continue
            for tensor in ways.operands:
                if tensor.role == "parameter" and (op.flops or len(tensor.shape) > 1 or op.writes):
                    for dim, size in enumerate(tensor.shape):
                        cut = even(size, self.members) if isinstance(size, int) else None
                        if cut is not None:
                            self.propose(tensor.name, Shard(dim, cut))
            if short(op.target) in VIEWS and ways.reading is not None:
                self._parted(op, ways)
            elif op.flops and not any(t.role == "parameter" for t in ways.operands):
                for i in range(len(ways.operands)):
                    self._labels(op, ways, i)
        while self.queue:
            name = next(iter(self.queue))
            del self.queue[name]
            for placement in tuple(self.placements[name]):
                self._follow(name, placement)

    def _parted(self, op: Op, ways: Ways) -> None:
        assert ways.reading is not None
        merged = {
            n for dims in (*ways.reading.inputs, *ways.reading.outputs) for d in dims or () if len(d) > 1 for n in d
        }
        for label in sorted(merged):
            size = ways.reading.sizes.get(label)
            cut = even(size, self.members) if isinstance(size, int) else None
            if cut is not None:
                self.add(op, ways.divided(label, cut))

    def _labels(self, op: Op, ways: Ways, index: int) -> None:
        for label, size in ways.labels_of(index):
            cut = even(size, self.members) if not isinstance(size, Size) else None
            if cut is not None:
                option = ways.divided(label, cut)
                if option is not None and not any(isinstance(p, Partial) for p in option.outputs):
                    self.add(op, option)

    def propose(self, tensor: str, placement: Placement) -> None:
        known = self.placements.setdefault(tensor, {})
        if placement not in known and len(known) < PER_TENSOR:
            known[placement] = None
            self.queue[tensor] = None

    def _follow(self, name: str, placement: Placement) -> None:
        for op, index in self.users.get(name, ()):
            for option in self.ways[op.name].from_input(index, placement):
                self.add(op, option)
        maker = self.made_by.get(name)
        if maker is not None:
            for option in self.ways[maker.name].from_output(maker.outputs.index(name), placement):
                self.add(maker, option)
            for option in tuple(self.options[maker.name].values()):
                self.add(maker, self.ways[maker.name].scattered(option, placement))

    def add(self, op: Op, option: Option | None) -> None:
        known = self.options[op.name]
        if option is None or len(known) >= PER_OP or option in known.values():
            return
        rows = f" {option.outputs[0]}" if option.way == "summed" else ""
        known[f"{option.way} {option.label}{rows}", option.cut] = option  # type: ignore[index]
        if option.way == "summed":
            for placement in tuple(self.placements.get(op.outputs[0], ())):
                self.add(op, self.ways[op.name].scattered(option, placement))
        for tensor, placement in zip(self.ways[op.name].operands, option.inputs, strict=True):
            if isinstance(placement, Shard):
                self.propose(tensor.name, placement)
        for name, placement in zip(op.outputs, option.outputs, strict=True):
            if name and isinstance(placement, Shard | Partial):
                self.propose(name, placement)

    # -- the cheapest ----------------------------------------------------------------------------------------------

    def solve(self, prices: Prices) -> Choice:
        options = {op.name: self._allowed(op) for op in self.ops}
        held = {name: self._kept(name) for name in sorted(self.parameters)}
        one: dict[tuple[str, str], Table] = {}
        two: dict[tuple[tuple[str, str], tuple[str, str]], Table] = {}
        for op in self.ops:
            one["op", op.name] = np.array([work(prices, self.members, self.graph, op, o) for o in options[op.name]])
        for name, kept in held.items():
            tensor = self.graph.tensor(name)
            one["held", name] = np.array([keeping(prices, tensor, p, self.members) for p in kept])
        for name, users in self.users.items():
            self._edges(prices, name, users, options, held, one, two)
        for op in self.ops:
            for index, name in enumerate(op.outputs):
                if name and name in self.outside:
                    price = self._price(prices, name)
                    one["op", op.name] = one["op", op.name] + np.array(
                        [price(o.outputs[index], REPLICATE, 1) for o in options[op.name]]
                    )
        found, seconds = cheapest(one, two)
        return Choice(
            {op.name: options[op.name][found["op", op.name]] for op in self.ops},
            {name: kept[found["held", name]] for name, kept in held.items()},
            seconds,
        )

    def _price(self, prices: Prices, name: str) -> Callable[[Placement, Placement, int], float]:
        tensor = self.graph.tensor(name)
        nbytes, grad = tensor.nbytes(max(self.graph.batch, 1)), tensor.needs_grad
        return lambda held, wanted, count: conversion(prices, self.members, nbytes, held, wanted, grad=grad) / count

    def _edges(
        self,
        prices: Prices,
        name: str,
        users: list[tuple[Op, int]],
        options: Mapping[str, tuple[Option, ...]],
        held: Mapping[str, tuple[Placement, ...]],
        one: dict[tuple[str, str], Table],
        two: dict[tuple[tuple[str, str], tuple[str, str]], Table],
    ) -> None:
        """What the tensor's users pay for having it as they want; those who want the same share one conversion."""
        price = self._price(prices, name)
        maker = self.made_by.get(name)
        for op, index in users:
            mine = options[op.name]
            if maker is None and name not in held:
                costs = [price(REPLICATE, o.inputs[index], len(users)) for o in mine]
                one["op", op.name] = one["op", op.name] + np.array(costs)
                continue
            if maker is None:
                rows = [[self._fetch(price, p, o.inputs[index], len(users)) for o in mine] for p in held[name]]
                key = ("held", name)
            else:
                at = maker.outputs.index(name)
                theirs = options[maker.name]
                rows = [[price(t.outputs[at], o.inputs[index], len(users)) for o in mine] for t in theirs]
                key = ("op", maker.name)
            pair = (key, ("op", op.name))
            table = np.array(rows)
            two[pair] = two[pair] + table if pair in two else table

    @staticmethod
    def _fetch(
        price: Callable[[Placement, Placement, int], float], held: Placement, wanted: Placement, count: int
    ) -> float:
        """A divided parameter is used as it lies: who wants other rows of it wants another division."""
        return price(held, wanted, count) if held == wanted or not isinstance(held, Shard) else APART

    def _allowed(self, op: Op) -> tuple[Option, ...]:
        """The options of an op that agree with the wishes; all of them where none would."""
        found = tuple(self.options[op.name].values())
        wish = self.wanted_of_op.get(op.name)
        if wish is not None:
            agreed = tuple(o for o in found if o.outputs and _agrees(o.outputs[0], wish))
            found = agreed or found
        return found

    def _kept(self, name: str) -> tuple[Placement, ...]:
        wish = self.wanted_of_tensor.get(name)
        found: list[Placement] = [REPLICATE]
        if name not in self.whole:
            found += [p for p in self.placements.get(name, {}) if isinstance(p, Shard)]
        if wish is not None:
            found = [p for p in found if _agrees(p, wish)] or found
        return tuple(found)


def _counted(wish: int | str, ndim: int) -> int | str:
    """Dims counted from the front."""
    return wish % ndim if isinstance(wish, int) and ndim else wish


def _agrees(placement: Placement, wish: int | str) -> bool:
    if isinstance(wish, int):
        return isinstance(placement, Shard) and placement.dim == wish
    return str(placement) == wish


def matches(pattern: str, name: str) -> bool:
    """Whether a wish's name, in which ``*`` stands for anything, is this one."""
    return pattern == name or fnmatchcase(name, pattern)


def in_place(graph: Graph, ops: Iterable[Op]) -> frozenset[str]:
    """Ops that make or change memory which is read again after it was changed in place: they must run undivided, so
    that everybody who reads it reads one memory. (``relu_`` on what nobody reads again is as good as ``relu``.)
    """
    listed = list(ops)
    if not any(op.writes for op in listed):
        return frozenset()
    order = {op.name: i for i, op in enumerate(graph.ops)}
    families: dict[str, list[Op]] = {}
    for op in graph.ops:
        for base in {graph.tensor(t).base or t for t in (*op.uses(), *filter(None, op.outputs))}:
            families.setdefault(base, []).append(op)
    found: set[str] = set()
    for op in listed:
        for base in op.writes:
            if graph.tensor(base).role == "buffer":
                if len(families.get(base, ())) > 1:  # alone, each member may change its own rows (running statistics)
                    found.add(op.name)
                continue
            made = {o for o in op.outputs if o}
            fresh = set(made)
            for later in families.get(base, ()):
                if order[later.name] <= order[op.name]:
                    continue
                used = {t for t in later.uses() if (graph.tensor(t).base or t) == base}
                if used & fresh:
                    fresh.update(o for o in later.outputs if o)
                if used - fresh or not functional(graph, op):
                    found.update(o.name for o in families[base])
                    break
            if not functional(graph, op):
                found.update(o.name for o in families.get(base, ()))
    return frozenset(found & {op.name for op in listed})
