"""SPMD: the graph that one member of a group runs: local sizes, and the collectives between its ops (Xu et al. 2021).

    whole graph        x ─ linear(w: 1536 x 384) ─ gelu ─ linear(v: 384 x 1536) ─ y
    member's graph     x ─ copied ─ linear(w: 768 x 384) ─ gelu ─ linear(v: 384 x 768) ─ all_reduce ─ y

Names stay: a tensor keeps its name in the placement in which others need it, and further placements of it are called
``name@placement``. All members' graphs have the same ops under the same names; only sizes differ.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from partita.graph import Arg, Dim, Graph, Op, Ref, Tensor
from partita.program import Layout, Split
from partita.sharding.batch import BatchLayouts
from partita.sharding.call import Call
from partita.sharding.choose import Choice, in_place
from partita.sharding.local_args import adding_up, local_call
from partita.sharding.options import Option, functional
from partita.sharding.placements import (
    COPIED,
    REPLICATE,
    Copied,
    Partial,
    Placement,
    Replicate,
    Shard,
    local_shape,
)


@dataclass(frozen=True, slots=True)
class Part:
    """Ops of one stage that ``members`` members run, as ``choice`` says. ``shared``: parameters others use too."""

    members: int
    ops: frozenset[str]
    choice: Choice
    shared: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Local:
    """One member's graph and batch layouts. ``shards``: parameters of which it holds rows. ``partial``: parameters
    whose gradient is the sum of the members'. ``origin``: new op -> the op for whose sake it is there.
    """

    graph: Graph
    layouts: BatchLayouts
    shards: Mapping[str, Shard] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    origin: Mapping[str, str] = field(default_factory=dict)


def localise(
    graph: Graph,
    layouts: BatchLayouts,
    parts: Sequence[Part],
    rank: int,
    *,
    segment_of: Mapping[str, Hashable],
    outside: frozenset[str],
) -> Local:
    """The graph of member ``rank`` (of parts with fewer members it is nobody's).

    ``segment_of``: op -> what it runs in one piece with. ``outside``: tensors that are needed whole beyond theirs.
    """
    writer = _Writer(graph, layouts, outside, rank, segment_of)
    part_of = {name: part for part in parts for name in part.ops}
    for part in parts:
        writer.hold(part)
    for op in graph.ops:
        own = part_of.get(op.name)
        if own is None or rank >= own.members:
            writer.ops.append(op)
        else:
            writer.op(op, own)
    return writer.result()


class _Writer:
    def __init__(
        self,
        graph: Graph,
        layouts: BatchLayouts,
        outside: frozenset[str],
        rank: int,
        segment_of: Mapping[str, Hashable],
    ) -> None:
        self.graph, self.layouts, self.outside, self.rank = graph, layouts, outside, rank
        self.segment_of = segment_of
        self.changed = {base for op in graph.ops for base in op.writes}
        self.ops: list[Op] = []
        self.tensors = {t.name: t for t in graph.tensors}
        self.held: dict[str, Placement] = {}
        self.natural: dict[str, str] = {}  # where a tensor's own name is taken by its whole form
        self.versions: dict[tuple[object, ...], str] = {}
        self.shards: dict[str, Shard] = {}
        self.partial: set[str] = set()
        self.origin: dict[str, str] = {}
        self.of = dict(layouts.of)
        self.phase = dict(layouts.phase)
        self.takes = dict(layouts.takes)
        self.numbers: dict[str, int] = {}

    def hold(self, part: Part) -> None:
        """Note how the part's parameters are held, and which get a partial gradient."""
        if self.rank >= part.members:
            return
        wants: dict[str, set[Placement]] = {}
        for op in self.graph.ops:
            if op.name in part.ops:
                option = part.choice.options[op.name]
                for tensor, placement in zip(Call(op, self.graph).operands(), option.inputs, strict=True):
                    wants.setdefault(tensor.name, set()).add(placement)
                for name in op.reads:
                    wants.setdefault(name, set()).add(REPLICATE)
        for name, placement in part.choice.held.items():
            self.held[name] = placement
            if isinstance(placement, Shard):
                self.shards[name] = placement
                shape = local_shape(self.graph.tensor(name).shape, placement, self.rank)
                self.tensors[name] = replace(self.graph.tensor(name), shape=shape)
            elif wants.get(name) == {COPIED} and name not in part.shared:
                self.held[name] = COPIED
                self.partial.add(name)
        self.still = in_place(self.graph, [op for op in self.graph.ops if op.name in part.ops])

    # -- one op ----------------------------------------------------------------------------------------------------

    def op(self, op: Op, part: Part) -> None:
        option = part.choice.options[op.name]
        operands = Call(op, self.graph).operands()
        names = [self.version(t.name, wanted, op, part) for t, wanted in zip(operands, option.inputs, strict=True)]
        twin = self.twin(op, option, [a != t.name for a, t in zip(names, operands, strict=True)])
        if op.target in ("aten.view.default", "aten._unsafe_view.default") and op.name not in self.still:
            op = replace(op, target="aten.reshape.default")  # own rows need not lie as the whole did
        if twin:
            base, _, overload = op.target.rpartition(".")
            op = replace(op, target=f"{base[:-1]}.{overload}", writes=())
        outputs = []
        for name, placement in zip(op.outputs, option.outputs, strict=True):
            outputs.append(self.output(name, placement, op) if name else "")
        local = [self.tensors[n].shape for n in names], [self.tensors[n].shape if n else () for n in outputs]
        if twin or option.way != "replicated":
            for name in filter(None, outputs):
                self.tensors[name] = replace(self.tensors[name], base="")
        substituted = iter(names)
        args = tuple(_substitute(a, substituted) for a in op.args)
        kwargs = tuple((k, _substitute(v, substituted)) for k, v in op.kwargs)
        flops = round(op.flops * option.share(self.rank))
        made = replace(op, args=args, kwargs=kwargs, outputs=tuple(outputs), flops=flops)
        if option.way != "replicated":
            steps, tensors = local_call(self.graph, op, made, option, local[0], local[1], self.rank)
            for tensor in tensors:
                self.tensors[tensor.name] = tensor
                self.of[tensor.name] = self.layouts.of[op.outputs[0]]
            for step in steps:
                self.enter(step, op, new=step.name != op.name)
        else:
            self.ops.append(made)
        for name, own in zip(op.outputs, outputs, strict=True):
            if name and own != name:
                self.whole(name, own, op, part)

    def twin(self, op: Op, option: Option, moved: Sequence[bool]) -> bool:
        """Whether an op that works in place runs as the one that makes a new tensor: where it would change something
        else than the model's own tensor. Where that is read again (``still``) it must be changed; there every member
        holds it whole, whatever has to be moved for the other operands."""
        if not functional(self.graph, op):
            return False
        return moved[0] if op.name in self.still else option.way != "replicated" or any(moved)

    def output(self, name: str, placement: Placement, op: Op) -> str:
        """The name under which an op's result comes, and what is known of it."""
        self.held[name] = placement
        tensor = self.graph.tensor(name)
        shape = local_shape(tensor.shape, placement, self.rank)
        if isinstance(placement, Replicate) or name not in self.outside:
            self.tensors[name] = replace(self.tensors[name], shape=shape)
            return name
        own = f"{name}@{placement}"
        self.natural[name] = own
        self.numbers[name] = 1
        self.tensors[own] = replace(tensor, name=own, shape=shape, base="")
        self.of[own] = self.layouts.of[name]
        return own

    def whole(self, name: str, own: str, op: Op, part: Part) -> None:
        """After an op whose divided result others need whole: make it so, under its own name."""
        self.tensors[name] = replace(self.graph.tensor(name), base="")
        held = self.held[name]
        self.convert(own, name, held, REPLICATE, op, part.members, self.layouts.of[name])
        self.versions[name, REPLICATE, op.grad, None, self.segment_of[op.name]] = name

    # -- placements of one tensor ----------------------------------------------------------------------------------

    def version(self, name: str, wanted: Placement, op: Op, part: Part) -> str:
        """The name of the tensor in the placement the op wants it in; made here where it is not there yet."""
        held, own, tensor = self.held.get(name, REPLICATE), self.natural.get(name, name), self.graph.tensor(name)
        producer, segment = self.graph.producer(name), self.segment_of[op.name]
        if producer is not None and self.segment_of[self.graph.ops[producer].name] != segment:
            held, own = REPLICATE, name  # what comes from elsewhere comes whole
        if held == wanted or isinstance(wanted, Copied) and isinstance(held, Replicate) and not tensor.needs_grad:
            return own
        if isinstance(held, Copied) and isinstance(wanted, Replicate):
            raise AssertionError(f"{name} is used whole by an undivided op, but its gradient is partial")
        take = self.layouts.takes.get((op.name, name))
        self.takes.pop((op.name, name), None)
        key = (name, wanted, op.grad, take, segment)
        found = self.versions.get(key) or (
            self.versions.get((name, REPLICATE, op.grad, None, segment)) if isinstance(wanted, Replicate) else None
        )
        if found is not None:
            return found
        between = self._between(held, wanted)
        if isinstance(wanted, Shard) and between is None and isinstance(held, Shard):
            whole = self.versions.get((name, REPLICATE, op.grad, None, segment))
            if take is not None or whole is not None:  # it is there whole, or comes whole for its rows of the batch
                between = REPLICATE
        if between is not None:
            own = self.version(name, between, op, part)
            held = between
        number = self.numbers.get(name, 0)
        self.numbers[name] = number + 1
        made = f"{name}@{wanted}" + (f".{number}" if number else "")
        self.tensors[made] = replace(
            tensor, name=made, role="op", path="", base="", shape=local_shape(tensor.shape, wanted, self.rank)
        )
        layout: Layout = take if isinstance(take, Split) else self.layouts.of[name]
        new = self.convert(own, made, held, wanted, op, part.members, layout)
        if take is not None:
            self.takes[new, own] = take
        if (tensor.base or name) not in self.changed:
            self.versions[key] = made
        return made

    @staticmethod
    def _between(held: Placement, wanted: Placement) -> Placement | None:
        """What stands between two placements where no one collective leads from one to the other."""
        if isinstance(held, Partial) and isinstance(wanted, Copied):
            return REPLICATE
        if isinstance(held, Shard) and isinstance(wanted, Shard) and held.dim == wanted.dim:
            return REPLICATE
        return None

    def convert(
        self, source: str, made: str, held: Placement, wanted: Placement, op: Op, members: int, layout: Layout
    ) -> str:
        """Enter the collective that leads from one placement to another."""
        args: tuple[Arg, ...] = (Ref(source),)
        if isinstance(held, Partial):
            kind, which = adding_up(wanted)
            args = (*args, *which)
        elif isinstance(held, Shard) and isinstance(wanted, Shard):
            kind, args = "exchange", (*args, held.dim, held.cut.rounds, wanted.dim, wanted.cut.rounds)
        elif isinstance(held, Shard):
            kind = "all_gather" if isinstance(wanted, Replicate) else "all_gather_copied"
            args = (*args, held.dim, held.cut.rounds)
        elif isinstance(wanted, Shard):
            kind, args = "take", (*args, wanted.dim, wanted.cut.rounds)
        else:
            kind = "copied"
        name = f"{op.name}+{made}"
        self.enter(Op(name, f"partita.{kind}", args, (), (made,), op.module, op.source, op.grad), op, new=True)
        self.of[made] = layout
        return name

    def enter(self, op: Op, origin: Op, *, new: bool) -> None:
        self.ops.append(op)
        if new:
            self.origin[op.name] = origin.name
            self.phase[op.name] = self.layouts.phase[origin.name]
            for name in op.outputs:
                if name and name not in self.tensors:
                    raise AssertionError(f"{name} is not described")

    # -- result ----------------------------------------------------------------------------------------------------

    def result(self) -> Local:
        made = {o for op in self.ops for o in op.outputs if o}
        tensors = tuple(t for t in self.tensors.values() if t.role != "op" or t.name in made)
        graph = replace(self.graph, tensors=tensors, ops=tuple(self.ops))
        layouts = replace(self.layouts, of=self.of, phase=self.phase, takes=self.takes)
        return Local(graph, layouts, self.shards, frozenset(self.partial), self.origin)


def _substitute(arg: Arg, names: object) -> Arg:
    """The argument with its tensors renamed, in order."""
    if isinstance(arg, Ref):
        return Ref(next(names))  # type: ignore[call-overload]
    if isinstance(arg, tuple):
        return tuple(_substitute(a, names) for a in arg)
    return arg


__all__ = ["Dim", "Local", "Option", "Part", "Tensor", "localise"]
