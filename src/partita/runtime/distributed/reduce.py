"""Gradients summed over the ranks that hold a parameter, while the rest of backward still runs.

    backward    head ........ block 3 ........ block 2 ........ block 1 ........ embedding
    sums             head ─▶        block 3 ─▶       block 2 ─▶       block 1 ─▶      embedding, marks ─▶

A parameter's gradient is complete when autograd has come to its leaf in this rank's last backward; it is sent as
soon as it and all before it in the fixed order are (the last to be first used goes first: a tied table's gradient is
complete at the end). Large gradients are sent from where they lie; small ones are packed into flat buckets. The last
bucket carries a mark for each parameter, so that one for which no rank has a gradient gets none. Of a
sharded parameter (ZeRO 2 and 3) each rank gets its rows of the sum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from partita.cost.communication import BUCKET_BYTES
from partita.graph import Graph
from partita.program import Instruction, Program
from partita.runtime.distributed.collective import Flight, Members

Rows = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters summed in one message. ``marks``: with one element a parameter of the set at its end."""

    names: tuple[str, ...]
    marks: bool = False


@dataclass(frozen=True, slots=True)
class Shared:
    """What one set of ranks sums, in order. ``sharded``: each rank gets its rows only."""

    ranks: tuple[int, ...]
    sharded: bool
    names: tuple[str, ...]
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class Sums:
    """What one rank sums with others in a Program. ``expected``: how many of its backwards add to each gradient."""

    shared: tuple[Shared, ...]
    expected: Mapping[str, int]
    silent: frozenset[str] = frozenset()


def sums(
    graph: Graph,
    program: Program,
    instructions: Iterable[Instruction],
    holders: Mapping[str, tuple[int, ...]],
    sharded: frozenset[str],
    silent: frozenset[str],
    rank: int,
    large: Callable[[Rows, int], int],
) -> Sums:
    """``holders``: graph name of each parameter that wants a gradient -> the ranks that sum it with this one.
    ``graph``: this rank's. ``silent``: those to which this rank adds nothing. ``large(ranks, total)``: from how
    many bytes on a gradient, of so many in all, goes alone."""
    first: dict[str, int] = {}  # backward has all of a gradient when it comes to the first use: a tied weight's is late
    for position, op in enumerate(graph.ops):
        for name in op.uses():
            if name in holders:
                first.setdefault(name, position)
    ordered = sorted((n for n, r in holders.items() if len(r) > 1 and rank in r), key=lambda n: (-first.get(n, 0), n))
    shared = []
    for ranks, split in sorted({(holders[n], n in sharded) for n in ordered}):
        names = tuple(n for n in ordered if (holders[n], n in sharded) == (ranks, split))
        total = sum(graph.tensor(n).nbytes(0) for n in names)
        shared.append(Shared(ranks, split, names, _buckets(graph, names, large(ranks, total))))
    expected: dict[str, int] = {}
    for step in instructions:
        if step.kind == "B":
            for name in dict.fromkeys(u.tensor for u in program.segments[step.segment].uses if u.tensor in holders):
                expected[name] = expected.get(name, 0) + 1
    return Sums(tuple(shared), expected, silent)


def _buckets(graph: Graph, names: tuple[str, ...], large: int) -> tuple[Bucket, ...]:
    """Large ones alone, the small ones between them together; marks last, with the last small ones."""
    found: list[Bucket] = []
    small: list[str] = []
    filled = 0
    for name in names:
        size = graph.tensor(name).nbytes(0)
        if size >= large:
            found.append(Bucket((name,)))
            continue
        if small and (
            filled + size > max(BUCKET_BYTES, large) or graph.tensor(name).dtype != graph.tensor(small[0]).dtype
        ):
            found.append(Bucket(tuple(small)))
            small, filled = [], 0
        small.append(name)
        filled += size
    if small and graph.tensor(small[0]).dtype not in ("float32", "float64"):
        found.append(Bucket(tuple(small)))
        small = []
    return (*found, Bucket(tuple(small), marks=True))


@dataclass(eq=False)
class _Sent:
    bucket: Bucket
    flight: Flight


@dataclass(eq=False)
class _State:
    shared: Shared
    members: Members
    next: int = 0
    pushed: int = 0
    sent: list[_Sent] = field(default_factory=list)
    pending: int = 0  # gradients that are not complete


class Reducer:
    """One backward's sums. Autograd comes to a leaf once in each backward, after all that adds to its gradient, also
    where the products were made apart (``weight_grad``); ``finish`` after the last backward.

    ``rows``: of a sharded parameter, the rows of dim 0 of each rank. ``done(name)``: told each time autograd comes
    there.
    """

    def __init__(
        self, graph: Graph, sums: Sums, aliases: Mapping[str, torch.Tensor],
        members: Callable[[tuple[int, ...]], Members], rows: Callable[[str], Rows], device: torch.device,
    ) -> None:  # fmt: skip
        self.graph, self.sums, self.aliases, self.rows, self.device = graph, sums, aliases, rows, device
        self.done: Callable[[str], None] = lambda name: None
        self.left = dict(sums.expected)
        self.states = [_State(s, members(s.ranks)) for s in sums.shared]
        self.state_of = {n: state for state in self.states for n in state.shared.names}
        for state in self.states:
            state.pending = sum(self.left.get(n, 0) > 0 for n in state.shared.names)
        self._hooks: list[Any] = []
        self.given: set[str] = set()

    def watch_leaves(self) -> None:
        """Have autograd tell when it has come to a leaf (not where gradients are put off until W)."""
        for name, alias in self.aliases.items():
            if name in self.state_of and alias.requires_grad:
                hook = alias.register_post_accumulate_grad_hook(_toucher(self.touch, name))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    def touch(self, name: str) -> None:
        self.done(name)
        self.left[name] -= 1
        if self.left[name] <= 0:
            self.state_of[name].pending -= self.left[name] == 0
            self.advance(self.state_of[name])

    def advance(self, state: _State, *, all_of_them: bool = False) -> None:
        """Start what is complete, in order."""
        buckets = state.shared.buckets
        while state.next < len(buckets):
            bucket = buckets[state.next]
            ready = not state.pending if bucket.marks else all(self.left.get(n, 0) <= 0 for n in bucket.names)
            if not (all_of_them or ready):
                return
            state.next += 1
            with torch.no_grad():
                state.sent.append(_Sent(bucket, self.start(state, bucket)))
                while state.pushed < len(state.sent) and state.sent[state.pushed].flight.push():
                    state.pushed += 1

    def start(self, state: _State, bucket: Bucket) -> Flight:
        shared, what = state.shared, "the gradients' sum"
        size = len(shared.ranks)
        marks: list[torch.Tensor] = []
        if bucket.marks:
            held = [float(n in self.given or self.grad(n) is not None) for n in shared.names]
            marks = [torch.tensor(held, dtype=self.dtype(bucket), device=self.device)]
        if not shared.sharded:
            whole = [self.whole(n) for n in bucket.names]
            if len(whole) == 1 and not marks:
                return state.members.sum(whole[0].view(-1), what)
            flat = torch.cat([w.view(-1) for w in whole] + marks)
            for name in bucket.names:
                self.drop(name)
            return state.members.sum(flat, what)
        splits = [sum(self.rows(n)[r] * self.width(n) for n in bucket.names) for r in range(size)]
        if len(bucket.names) == 1 and not marks:
            name = bucket.names[0]
            flat = self.whole(name).view(-1)
            self.drop(name)
        else:
            apart = [self.whole(n).split(self.rows(n)) for n in bucket.names]  # type: ignore[no-untyped-call]
            flat = torch.cat([t for r in range(size) for t in ([a[r].reshape(-1) for a in apart] + marks)])
            splits = [s + sum(m.numel() for m in marks) for s in splits]
            for name in bucket.names:
                self.drop(name)
        return state.members.scatter(flat, splits, what)

    def grad(self, name: str) -> torch.Tensor | None:
        alias = self.aliases.get(name)
        return alias.grad if alias is not None and name not in self.sums.silent else None

    def drop(self, name: str) -> None:
        """Give a gradient that is sent back, but not that there was one: the marks come last."""
        if self.grad(name) is not None:
            self.given.add(name)
        if name in self.aliases:
            self.aliases[name].grad = None

    def whole(self, name: str) -> torch.Tensor:
        """This rank's gradient, contiguous; zeros where it has none."""
        grad = self.grad(name)
        if grad is not None:
            return grad.contiguous()
        meta = self.graph.tensor(name)
        return torch.zeros(meta.shape_at(0), dtype=getattr(torch, meta.dtype), device=self.device)

    def dtype(self, bucket: Bucket) -> torch.dtype:
        kind: torch.dtype = getattr(torch, self.graph.tensor(bucket.names[0]).dtype) if bucket.names else torch.float32
        return kind

    def width(self, name: str) -> int:
        """Elements of a row."""
        return torch.Size(self.graph.tensor(name).shape_at(0)[1:]).numel()

    def finish(self) -> dict[str, torch.Tensor]:
        """Each shared parameter's sum over its ranks (its own rows where sharded); those for which nobody has a
        gradient are left out."""
        for state in self.states:
            self.advance(state, all_of_them=True)
        for hook in self._hooks:  # or leaf, hook and Reducer would keep each other, and all that was sent, alive
            hook.remove()
        found: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            return self._landed(found)

    def _landed(self, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for state in self.states:
            nobody: set[str] = set()
            waiting, state.sent = deque(state.sent), []
            while waiting:
                sent = waiting.popleft()
                flat, start = sent.flight.land(), 0
                for name in sent.bucket.names:
                    shape = tuple(self.graph.tensor(name).shape_at(0))
                    if state.shared.sharded:
                        shape = (self.rows(name)[state.members.position], *shape[1:])
                    count = torch.Size(shape).numel()
                    found[name] = flat.view(-1)[start : start + count].view(shape)
                    start += count
                if sent.bucket.marks:
                    marks = flat[start:].tolist()
                    nobody.update(n for n, mark in zip(state.shared.names, marks, strict=True) if mark == 0)
            for name in nobody:
                found.pop(name, None)
        return found


def _toucher(touch: Callable[[str], None], name: str) -> Callable[[torch.Tensor], None]:
    def touched(leaf: torch.Tensor) -> None:
        touch(name)

    return touched
