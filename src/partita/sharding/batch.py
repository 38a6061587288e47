"""Where the batch goes: for every tensor how microbatches hold it, for every op when it runs.

    x:Split ─ linear:split ─ relu:split ─ batch_norm:WHOLE ─ linear:whole ─▶ y:Whole
    position_ids:Once ─ embedding (weight:Fixed) ─▶ Split: its rows follow the batch

Microbatching is sharding the batch dim in time. One walk in program order applies the rules of ``registry``; what no
rule proves runs on the whole batch, with the reason kept. Facts found on the way (a value wanted before the
microbatches start, memory written in another phase) are noted and the walk is repeated until nothing new is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from partita.errors import UsageError
from partita.graph import Graph, Op, Tensor
from partita.program import Fixed, Layout, Once, Partial, Split, Whole
from partita.sharding import rules  # noqa: F401  (fills the table)
from partita.sharding.aliasing import Finding, Memory
from partita.sharding.apply import Decision, batch_dim, decide
from partita.sharding.call import Rewrite
from partita.sharding.early import Early
from partita.sharding.sizes import sizes_are_true


@dataclass(frozen=True, slots=True)
class Coupling:
    """An op that needs the whole batch though its operands do not, and why, in words for a person."""

    op: str
    reason: str


@dataclass(frozen=True, slots=True)
class BatchLayouts:
    """What ``layouts`` found. ``of``: layout of each tensor. ``phase``: 'once', 'split' or 'whole' of each op.

    ``rewrites``: split-phase ops that run differently from what the graph says (see ``Rewrite``). ``couplings``: the
    ops that first needed the whole batch. ``takes``: (op, tensor) -> rows a split-phase op takes of a tensor that is
    there whole. ``early``: once-phase ops that read model inputs (they are there from the start, whole).
    """

    of: Mapping[str, Layout]
    phase: Mapping[str, str]
    rewrites: Mapping[str, Rewrite]
    couplings: tuple[Coupling, ...]
    microbatchable: bool
    takes: Mapping[tuple[str, str], Split]
    early: frozenset[str] = frozenset()
    _local: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def weighted(self) -> Mapping[str, Rewrite]:
        """Ops whose microbatch results are means: multiplied by (microbatch samples) / (batch samples)."""
        return {name: r for name, r in self.rewrites.items() if r.kind == "weighted"}

    def take(self, op: str, tensor: str) -> Layout:
        """How the op wants the tensor: the rows of its microbatch, or as it is held."""
        return self.takes.get((op, tensor), self.of[tensor])

    def sizes_follow_microbatch(self, op: Op) -> bool:
        """Whether a ``Size`` among the op's arguments is a true size, evaluated at the samples the op really holds.

        False: it is a number of the model (``x / batch``), evaluated at the full batch.
        """
        return self.phase[op.name] == "split" and sizes_are_true(op)

    def flops_by_phase(self, graph: Graph) -> dict[str, int]:
        found = {"once": 0, "split": 0, "whole": 0}
        for op in graph.ops:
            found[self.phase[op.name]] += op.flops
        return found


def layouts(graph: Graph, *, batch_norm: str = "exact") -> BatchLayouts:
    """Layout of every tensor, phase of every op. ``batch_norm``: 'exact' or 'per_microbatch' (statistics of each part).

    Exact for every batch size the graph vouches for: where a rule does not prove that running on parts gives the
    same numbers, the op runs on the joined batch. A user's rule that does not fit its op raises ``UsageError``.
    """
    if batch_norm not in ("exact", "per_microbatch"):
        raise UsageError(f"batch_norm={batch_norm!r}: needs 'exact' or 'per_microbatch'")
    if graph.batch == 0:
        return _undivided(graph)
    early, memory = Early(graph), Memory(graph)
    forced: dict[str, str] = {}
    local: set[str] = set(early.row_numbers())
    while True:
        walk = _Walk(graph, batch_norm, forced, early.hoisted, local)
        walk.run()
        wanted = early.wanted(walk.decisions, walk.of)
        if wanted - early.hoisted:
            early.hoisted |= wanted
            continue
        misplaced = early.misplaced({name: d.phase for name, d in walk.decisions.items()}, local)
        if misplaced:
            local -= misplaced
            continue
        scattered = walk.scattered()
        if scattered:
            forced.update(
                dict.fromkeys(scattered, "it merges dims with the samples inside, and its result is needed whole")
            )
            continue
        if early.unreachable.keys() - forced.keys():
            forced.update(early.unreachable)
            continue
        found = memory.conflicts({name: d.phase for name, d in walk.decisions.items()}, walk.of, local)
        if not found:
            break
        _note(found, forced, local, early)
    return walk.result(early)


def _note(found: tuple[Finding, ...], forced: dict[str, str], local: set[str], early: Early) -> None:
    for finding in found:
        if finding.remedy == "local" and finding.op not in forced:
            local.add(finding.op)
        else:
            local.discard(finding.op)
            early.refused.add(finding.op)
            early.hoisted.discard(finding.op)
            forced.setdefault(finding.op, finding.reason)


def _undivided(graph: Graph) -> BatchLayouts:
    of: dict[str, Layout] = {t.name: Whole() for t in graph.tensors}
    phase = {op.name: "whole" for op in graph.ops}
    return BatchLayouts(of, phase, {}, (), False, {})


def leaf_layout(tensor: Tensor) -> Layout:
    """Layout of an input, parameter, buffer or constant."""
    if not tensor.follows_batch:
        return Fixed() if tensor.needs_grad else Once()
    if tensor.role != "input":
        return Whole()
    dim = batch_dim(tensor.shape)
    return Whole() if dim is None else Split(dim, tensor.shape[dim].per_sample)  # type: ignore[union-attr]


class _Walk:
    """One pass in program order with the facts known so far."""

    def __init__(
        self, graph: Graph, batch_norm: str, forced: Mapping[str, str], hoisted: set[str], local: set[str]
    ) -> None:
        self.graph, self.batch_norm = graph, batch_norm
        self.forced, self.hoisted, self.local = forced, hoisted, local
        self.of: dict[str, Layout] = {}
        self.decisions: dict[str, Decision] = {}
        self.couplings: list[Coupling] = []
        self.drawn_late = False

    def run(self) -> None:
        for tensor in self.graph.tensors:
            if tensor.role != "op":
                self.of[tensor.name] = leaf_layout(tensor)
        for op in self.graph.ops:
            decision = self._decide(op)
            self.decisions[op.name] = decision
            self.drawn_late = self.drawn_late or (op.random and decision.phase == "whole")
            for name, layout in zip(op.outputs, decision.outputs, strict=True):
                if name:
                    self.of[name] = layout
            if decision.phase == "whole" and decision.coupling:
                self.couplings.append(Coupling(op.name, _sentence(op, decision.reason)))

    def _decide(self, op: Op) -> Decision:
        if op.name in self.forced:
            carried = any(isinstance(self.of[name], Whole) for name in op.uses())
            return Decision.whole(op, self.forced[op.name], coupling=not carried)
        if op.random and self.drawn_late:
            return Decision.whole(op, "its random numbers come after those of an op on the whole batch", coupling=False)
        if op.name in self.hoisted:
            return Decision("once", tuple(Once() for _ in op.outputs))
        return decide(self.graph, op, self.of, batch_norm=self.batch_norm, local=self.local)

    def scattered(self) -> set[str]:
        """Split-phase ops whose results, samples not outermost, would have to be joined: they must run whole."""
        needed = set(self.graph.outputs)
        found: set[str] = set()
        for op in reversed(self.graph.ops):
            whole = self.decisions[op.name].phase == "whole"
            layouts = [self.of[name] for name in op.outputs if name in needed]
            if not whole and any(isinstance(layout, Split) and layout.outer > 1 for layout in layouts):
                found.add(op.name)
                whole = True
            if whole:
                needed.update(op.uses())
        return found

    def result(self, early: Early) -> BatchLayouts:
        phase = {name: d.phase for name, d in self.decisions.items()}
        rewrites = {name: d.rewrite for name, d in self.decisions.items() if d.rewrite is not None}
        takes = {(name, t): split for name, d in self.decisions.items() for t, split in d.takes}
        dividing = [op for op in self.graph.ops if phase[op.name] == "split" and self._follows(op)]
        heavy = any(op.flops for op in self.graph.ops)
        able = any(op.flops > 0 or not heavy for op in dividing)
        return BatchLayouts(
            self.of,
            phase,
            rewrites,
            tuple(self.couplings),
            able,
            takes,
            frozenset(early.hoisted),
            frozenset(self.local),
        )

    def _follows(self, op: Op) -> bool:
        return any(isinstance(self.of[name], Split | Partial) for name in op.outputs if name)


def _sentence(op: Op, reason: str) -> str:
    where = f" in {op.module}" if op.module else ""
    line = f" ({op.source})" if op.source else ""
    return f"{op.name} [{op.target}]{where}{line} needs the whole batch: {reason}"
