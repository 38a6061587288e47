"""What can be computed before the microbatches start: cheap values of the inputs that carry no gradient.

``mask.sum()`` couples the batch, but the mask is there from the start: counted once, whole, it lets ``loss / count``
stay a sum over microbatches. The same holds for the number of labels that a mean loss divides by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from partita.graph import Graph, Op, Ref, Size, Tensor
from partita.program import Layout, Once, Partial
from partita.sharding.apply import Decision

_CHEAP = 0.01  # a part of the model's FLOPs that may run before the microbatches instead of in them
_FREE = 1_000_000  # FLOPs that are too few to count
_SAME_ROWS = frozenset(
    "view reshape unsqueeze to _to_copy contiguous clone detach alias lift_fresh_copy".split()  # noqa: SIM905
)


class Early:
    """Closures of ops that may move to the once phase. ``refused``: ops found to be unable to."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.hoisted: set[str] = set()
        self.refused: set[str] = set()
        self.unreachable: dict[str, str] = {}
        self._touching: dict[str, list[Op]] = {}
        self._readers: dict[str, list[Op]] = {}
        self._chains: list[set[str]] = []
        self._written: set[str] = {base for op in graph.ops for base in op.writes}
        for op in graph.ops:
            for name in {*op.uses(), *filter(None, op.outputs)}:
                self._touching.setdefault(self._base(graph.tensor(name)), []).append(op)
        self._limit = _FREE + _CHEAP * sum(op.flops for op in graph.ops)

    @staticmethod
    def _base(tensor: Tensor) -> str:
        return tensor.base or tensor.name

    def wanted(self, decisions: Mapping[str, Decision], of: Mapping[str, Layout]) -> set[str]:
        """Ops to move to the once phase, so that those which couple the batch without a gradient run there.

        Ops whose rewrite needs a total that cannot be had early are noted in ``unreachable``.
        """
        found: set[str] = set()
        for op in self.graph.ops:
            decision = decisions[op.name]
            if decision.phase == "whole" and decision.coupling:
                for start in (op, *self._counted(op, of)):
                    found |= self._closure([start]) or set()
            rewrite = decision.rewrite
            if rewrite is not None and rewrite.kind == "sum_over_total" and not isinstance(of[rewrite.target], Once):
                at = self.graph.producer(rewrite.target)
                closure = set() if at is None else self._closure([self.graph.ops[at]])
                if at is None and self._base(self.graph.tensor(rewrite.target)) in self._written:
                    closure = None
                if closure is None:
                    self.unreachable[op.name] = "its mean is over a number of targets known only after the model ran"
                else:
                    found |= closure
        return found

    def _counted(self, op: Op, of: Mapping[str, Layout]) -> list[Op]:
        """Makers of the sums over the batch it uses: had whole, they are plain numbers to it."""
        makers = [self.graph.producer(name) for name in op.uses() if isinstance(of[name], Partial)]
        return [self.graph.ops[at] for at in makers if at is not None]

    def _closure(self, start: Iterable[Op]) -> set[str] | None:
        """These ops and all they need, by name, if all can run early at little cost; else None."""
        found: dict[str, Op] = {}
        stack = list(start)
        while stack:
            op = stack.pop()
            if op.name in found:
                continue
            if op.name in self.refused or op.random or op.reads or op.target.startswith("opaque:"):
                return None
            if any(self.graph.tensor(name).needs_grad for name in op.outputs if name):
                return None
            found[op.name] = op
            for name in (*op.uses(), *filter(None, op.outputs)):
                base = self._base(self.graph.tensor(name))
                at = self.graph.producer(name)
                if base in self._written:
                    if self.graph.producer(base) is None:
                        return None
                    stack += self._touching[base]
                if at is not None:
                    stack.append(self.graph.ops[at])
        return set(found) if sum(op.flops for op in found.values()) <= self._limit else None

    def row_numbers(self) -> set[str]:
        """``arange(batch)`` made only to index rows (``x[arange(batch), last]``): counted anew in every microbatch."""
        for op in self.graph.ops:
            for name in op.uses():
                self._readers.setdefault(name, []).append(op)
        for op in self.graph.ops:
            if is_row_count(op):
                chain = {op.name}
                if self._only_index(op.outputs[0], chain):
                    self._chains.append(chain)
        return set().union(*self._chains)

    def misplaced(self, phase: Mapping[str, str], local: Set[str]) -> set[str]:
        """Row numbers that some op reads which is not divided: there they must be those of the whole batch."""
        found: set[str] = set()
        for chain in self._chains:
            if chain & local and any(phase[op] != "split" for op in chain | self._indexing(chain)):
                found |= chain
        return found & local

    def _indexing(self, chain: set[str]) -> set[str]:
        outputs = (name for op in self.graph.ops if op.name in chain for name in op.outputs)
        return {op.name for name in outputs for op in self._readers.get(name, [])}

    def _only_index(self, name: str, chain: set[str]) -> bool:
        """Whether all that is done with the tensor is indexing a dim of exactly the batch's size."""
        if name in self.graph.outputs or self._base(self.graph.tensor(name)) in self._written:
            return False
        for op in self._readers.get(name, []):
            kind = op.target.split(".")[1] if op.target.startswith("aten.") else ""
            if kind == "index":
                source, listed = op.args[0], op.args[1]
                if not isinstance(source, Ref) or source.name == name or not isinstance(listed, tuple):
                    return False
                places = [i for i, item in enumerate(listed) if item == Ref(name)]
                shape = self.graph.tensor(source.name).shape
                if len(places) != 1 or shape[places[0]] != Size(0, 1):
                    return False
                continue
            if kind not in _SAME_ROWS or op.args[0] != Ref(name) or op.uses() != (name,):
                return False
            chain.add(op.name)
            if not self._only_index(op.outputs[0], chain):
                return False
        return True


def is_row_count(op: Op) -> bool:
    """Whether the op is ``arange(batch)``."""
    if op.target == "aten.arange.default":
        return op.args[:1] == (Size(0, 1),)
    return (
        op.target in ("aten.arange.start", "aten.arange.start_step")
        and op.args[:2] == (0, Size(0, 1))
        and (len(op.args) < 3 or op.args[2] == 1)
    )
