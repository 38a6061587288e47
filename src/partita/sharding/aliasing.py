"""Memory changed in place, seen across phases: who must run in which phase so that everybody reads what eager read.

    once ─▶ split ─▶ whole          a phase starts when the one before it is over

In program order within a phase nothing changes; between phases a write must not overtake a read, nor a read a write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from partita.graph import Graph, Op, Tensor
from partita.program import Layout, Split

_RANK = {"once": 0, "split": 1, "whole": 2}
_UNIFORM = frozenset(
    [
        "zeros",
        "ones",
        "full",
        "empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
    ]
)
_MAYBE_VIEW = frozenset(
    "contiguous reshape flatten reshape_as to type_as _reshape_alias".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Finding:
    """``remedy``: 'whole' (run the op on the whole batch) or 'local' (make the factory's tensor per microbatch)."""

    op: str
    reason: str
    remedy: str = "whole"


def _kind(op: Op) -> str:
    parts = op.target.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "aten" else ""


class Memory:
    """Which ops touch which memory, and in what order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.index = {op.name: i for i, op in enumerate(graph.ops)}
        self.touching: dict[str, list[Op]] = {}
        self.making: dict[str, set[str]] = {}
        for op in graph.ops:
            outputs = {self.base(name) for name in op.outputs if name}
            for base in dict.fromkeys([*(self.base(name) for name in op.uses()), *outputs, *op.writes]):
                self.touching.setdefault(base, []).append(op)
                if base in outputs:
                    self.making.setdefault(base, set()).add(op.name)
        self.written = dict.fromkeys(base for op in graph.ops for base in op.writes)
        self.doubtful = self._doubtful()

    def base(self, name: str) -> str:
        tensor: Tensor = self.graph.tensor(name)
        return tensor.base or tensor.name

    def conflicts(self, phase: Mapping[str, str], of: Mapping[str, Layout], local: set[str]) -> tuple[Finding, ...]:
        """What must change for in-place memory to read as in eager; empty when nothing must."""
        found: list[Finding] = []
        for base in self.written:
            made_by = self.graph.producer(base)
            if made_by is None:
                found += self._outside(base, phase)
            else:
                found += self._inside(base, self.graph.ops[made_by], phase, of, local)
            if found:
                return tuple(found)
        for group in self.doubtful:
            if any(phase[op.name] == "split" for op in group):
                return tuple(
                    Finding(op.name, "whether it shares memory that is changed in place depends on the sizes")
                    for op in group
                    if phase[op.name] != "whole"
                )
        return ()

    def _outside(self, base: str, phase: Mapping[str, str]) -> list[Finding]:
        """Parameters, buffers, constants, inputs: they outlive the microbatches."""
        ops = self.touching[base]
        path = self.graph.tensor(base).path or base
        writes = [op for op in ops if base in op.writes]
        for op in writes:
            if phase[op.name] == "split" and _kind(op) not in ("batch_norm", "_native_batch_norm_legit"):
                return [Finding(op.name, f"it changes {path} with values of the batch")]
        if any(phase[op.name] == "whole" for op in writes):
            late = [op for op in ops if op.name in self.making.get(base, ()) and phase[op.name] != "whole"]
            if late:
                return [Finding(op.name, f"it shares the memory of {path}, which is changed at the end") for op in late]
        highest = highest_write = -1
        for op in ops:
            rank = _RANK[phase[op.name]]
            if rank < (highest if base in op.writes else highest_write):
                return [Finding(op.name, f"it must see {path} in the order the model reads and changes it")]
            highest = max(highest, rank)
            if base in op.writes:
                highest_write = max(highest_write, rank)
        return []

    def _inside(
        self, base: str, maker: Op, phase: Mapping[str, str], of: Mapping[str, Layout], local: set[str]
    ) -> list[Finding]:
        """A value of the model itself."""
        ops = self.touching[base]
        last = max(self.index[op.name] for op in ops if base in op.writes)
        bound = [maker] + [op for op in ops if self.index[op.name] <= last and op is not maker]
        phases = {phase[op.name] for op in bound}
        why = "memory it uses is changed in place by an op that runs in another phase"
        if len(phases) > 1:
            fillable = _kind(maker) in _UNIFORM and self.graph.tensor(base).follows_batch
            if fillable and phase[maker.name] == "once" and "whole" not in phases and maker.name not in local:
                return [Finding(maker.name, why, "local")]
            return [Finding(op.name, why) for op in bound if phase[op.name] != "whole"]
        if phases == {"split"}:
            for op in bound:
                if base in op.writes and not self._keeps(op, base, of):
                    return [Finding(op.name, "it changes in place what is laid out otherwise") for op in bound]
        return []

    def _keeps(self, op: Op, base: str, of: Mapping[str, Layout]) -> bool:
        """The written operand already lies as the rule lays the result."""
        written = [of[name] for name in op.uses() if self.base(name) == base]
        results = [of[name] for name in op.outputs if name and self.base(name) == base]
        target = written[:1]
        followers = [name for name in op.uses() if isinstance(of[name], Split)]
        if target and followers and not isinstance(target[0], Split):
            return False
        return bool(target) and all(result == target[0] for result in results)

    def _doubtful(self) -> tuple[tuple[Op, ...], ...]:
        """Groups of ops over memory that a ``reshape`` or ``contiguous`` shares or copies depending on the sizes,
        where one writes and a later one reads by another way."""
        parent: dict[str, str] = {}

        def top(name: str) -> str:
            while parent.get(name, name) != name:
                name = parent[name]
            return name

        root: dict[str, str] = {}
        for op in self.graph.ops:
            used = op.uses()
            maybe = _kind(op) in _MAYBE_VIEW
            for out in filter(None, op.outputs):
                same = next((name for name in used if self.base(name) == self.base(out)), None)
                root[out] = out if maybe or same is None else root.get(same, same)
                if maybe and used:
                    a, b = top(self.base(out)), top(self.base(used[0]))
                    parent[a] = b
        groups: dict[str, list[Op]] = {}
        for op in self.graph.ops:
            for base in dict.fromkeys([*(self.base(n) for n in op.uses()), *(self.base(n) for n in op.outputs if n)]):
                groups.setdefault(top(base), []).append(op)
        found = []
        for key, ops in groups.items():
            ways: set[str] = set()
            for op in ops:
                mine = {root.get(n, n) for n in op.uses() if top(self.base(n)) == key}
                if ways - mine and mine - ways or len(mine | ways) > 1 and ways:
                    found.append(tuple(dict.fromkeys(ops)))
                    break
                if any(top(base) == key for base in op.writes):
                    ways |= {root.get(n, n) for n in op.uses() if self.base(n) in op.writes}
        return tuple(found)
