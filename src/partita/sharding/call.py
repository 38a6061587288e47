"""One call of an op as a rule sees it, and what a rule may answer."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from partita.graph import Arg, Dim, Graph, Op, Ref, Size, Tensor


@dataclass(frozen=True, slots=True)
class Rewrite:
    """How a split-phase op must be run differently from what the graph says.

    ``kind`` 'weighted': run as it stands, multiply the result by (samples of the microbatch) / (samples of the batch).
    ``kind`` 'sum_over_total': run with ``args[reduction_arg] = 2`` (sum) and divide by a total taken over the whole
    batch: the number of elements of ``target`` that differ from ``ignore_index``, or, with ``weight``, the sum of
    ``weight[target]`` over them. ``kind`` 'call': run ``target_op`` with ``args`` (and no keyword arguments) instead.
    """

    kind: str
    reduction_arg: int = -1
    target: str = ""
    weight: str = ""
    ignore_index: int = -100
    target_op: str = ""
    args: tuple[Arg, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """The op couples the samples, whatever its layout; ``why`` completes 'needs the whole batch: ...'."""

    why: str


@dataclass(frozen=True, slots=True)
class Ruled:
    """A rule in words (a term per tensor of the call, in order) with a rewrite for the split phase."""

    text: str
    rewrite: Rewrite | None = None


Ruling = str | Ruled | Refusal


@dataclass(frozen=True, slots=True)
class Call:
    """One op of a graph with its tensors looked up. ``batch_norm``: 'exact' or 'per_microbatch'.

    ``local``: ops whose results are made anew for every microbatch (its own row numbers, its own zeros).
    """

    op: Op
    graph: Graph
    batch_norm: str = "exact"
    local: Set[str] = frozenset()

    def arg(self, index: int, default: Arg = None, *, name: str = "") -> Arg:
        """The argument at a position, or by keyword; ``default`` where it was left out."""
        if index < len(self.op.args):
            return self.op.args[index]
        return next((value for key, value in self.op.kwargs if name and key == name), default)

    def number(self, index: int, default: int = 0, *, name: str = "") -> int:
        """The integer argument at a position; ``default`` where it is left out, None or no plain integer."""
        value = self.arg(index, default, name=name)
        return int(value) if isinstance(value, int | bool) else default

    def numbers(self, index: int, *, name: str = "") -> tuple[Dim, ...]:
        """The list-of-integers argument at a position (a single integer counts as a list of one)."""
        value = self.arg(index, None, name=name)
        items = value if isinstance(value, tuple) else () if value is None else (value,)
        return tuple(item for item in items if isinstance(item, int | Size))

    def tensor(self, index: int, *, name: str = "") -> Tensor | None:
        value = self.arg(index, None, name=name)
        return self.graph.tensor(value.name) if isinstance(value, Ref) else None

    def shape(self, index: int = 0) -> tuple[Dim, ...]:
        """Shape of the tensor argument at a position; () where there is none."""
        found = self.tensor(index)
        return found.shape if found else ()

    def operands(self) -> tuple[Tensor, ...]:
        """Every tensor of the arguments in order, repeated where it is used twice."""
        return tuple(self.graph.tensor(name) for name in self._names())

    def _names(self) -> tuple[str, ...]:
        found: list[str] = []
        stack: list[Arg] = [*reversed([value for _, value in self.op.kwargs]), *reversed(self.op.args)]
        while stack:
            item = stack.pop()
            if isinstance(item, Ref):
                found.append(item.name)
            elif isinstance(item, tuple):
                stack += reversed(item)
        return tuple(found)

    def results(self) -> tuple[Tensor | None, ...]:
        """The tensors it makes; None for a result nobody has (an empty name)."""
        return tuple(self.graph.tensor(name) if name else None for name in self.op.outputs)

    def out(self, index: int = 0) -> tuple[Dim, ...]:
        found = self.results()[index] if index < len(self.op.outputs) else None
        return found.shape if found else ()


def labels(count: int, *, start: str = "d") -> list[str]:
    """Names for ``count`` dims: d0, d1, ..."""
    return [f"{start}{i}" for i in range(count)]


def dims_of(values: tuple[Dim, ...], ndim: int) -> set[int]:
    """Dims counted from the front; the sizes among them (never dims) are left out."""
    return {int(v) % max(ndim, 1) for v in values if isinstance(v, int)}


def whole(names: list[str], dims: set[int]) -> str:
    """The term in which these dims are needed whole."""
    return " ".join(f"[{name}]" if i in dims else name for i, name in enumerate(names)) or "()"


def term(names: list[str]) -> str:
    return " ".join(names) or "()"
