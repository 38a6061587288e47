"""Options: the ways in which the members of a group can run one op together, one per label that may be divided.

linear  b.. k, n k, +n? -> b.. n      n divided   Copied, Shard(0), Shard(0) -> Shard(-1)     (column parallel)
                                      k divided   Shard(-1), Shard(1) -> Partial              (row parallel)
                                      not         Replicate, Replicate -> Replicate
"""

from __future__ import annotations

from dataclasses import dataclass

from partita.graph import Dim, Graph, Op, Ref, Size
from partita.sharding.call import Call
from partita.sharding.placements import COPIED, PARTIAL, REPLICATE, Cut, Partial, Placement, Shard, apart, inside
from partita.sharding.reading import Reading, has_bias, pieces, reading, short
from partita.sharding.registry import find

_FLOAT = frozenset({"float64", "float32", "float16", "bfloat16", "complex64", "complex128"})
_BIASED = {"linear": 2, "conv1d": 2, "conv2d": 2, "conv3d": 2, "addmm": 0}


@dataclass(frozen=True, slots=True)
class Option:
    """``inputs``: how it wants each operand (``Call.operands``); ``outputs``: how its results come out.

    ``way``: 'replicated', 'plain' (the op on what each member holds), 'passed' (the same, on sums that are still to be
    added), 'summed' (a product whose sum is added up at once, before its bias: all of it, or to each member its rows),
    'mean' (weighted by each one's rows), 'table' (look up in own rows, zero elsewhere), 'loss' (cross entropy over
    divided classes). ``label``, ``cut``: what is divided.
    """

    way: str
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    label: str = ""
    cut: Cut | None = None

    def share(self, rank: int) -> float:
        """The part of the op's work that a member does."""
        return self.cut.mine(rank) / self.cut.total if self.cut is not None and self.way != "passed" else 1.0


class Ways:
    """What can be done with one op of a graph."""

    def __init__(self, graph: Graph, op: Op, members: int) -> None:
        self.graph, self.op, self.members = graph, op, members
        self.call = Call(op, graph)
        self.operands = self.call.operands()
        sparse = short(op.target) == "embedding" and bool(self.call.arg(4, False, name="sparse"))
        self.fixed = op.random or bool(op.reads) or not self.operands or sparse  # sparse gradients have no rows to part
        self.writes = () if functional(graph, op) else op.writes
        self.reading: Reading | None = None if self.fixed else reading(graph, op)
        self.parts = None if self.fixed else pieces(self.call)

    def replicated(self) -> Option:
        return Option("replicated", (REPLICATE,) * len(self.operands), (REPLICATE,) * len(self.op.outputs))

    def _whole(self, index: int) -> Placement:
        """What a divided op asks of an operand without the divided label."""
        return COPIED if self.op.grad and self.operands[index].needs_grad else REPLICATE

    # -- from a placement of one operand or result -----------------------------------------------------------------

    def from_input(self, index: int, placement: Placement) -> tuple[Option, ...]:
        """The options under which operand ``index`` is wanted so."""
        if self.fixed:
            return ()
        if isinstance(placement, Partial):
            found = self._passed(index)
            return (found,) if found is not None else ()
        if not isinstance(placement, Shard):
            return ()
        return self._from(self.reading.inputs[index] if self.reading else None, placement, index)

    def from_output(self, index: int, placement: Placement) -> tuple[Option, ...]:
        if self.fixed or not isinstance(placement, Shard):
            return ()
        return self._from(self.reading.outputs[index] if self.reading else None, placement, -1 - index)

    def _from(self, dims: tuple[tuple[str, ...], ...] | None, placement: Shard, side: int) -> tuple[Option, ...]:
        if self.parts is not None and placement.dim == self.parts[0]:
            joined = self._joined(side, placement.cut)
            return (joined,) if joined is not None else ()
        if self.reading is None or dims is None or placement.dim >= len(dims):
            return ()
        special = self._table_or_loss(side, placement) if side >= 0 else None
        if special is not None:
            return (special,)
        names = dims[placement.dim]
        sizes = [self.reading.sizes.get(n) for n in names]
        if any(s is None for s in sizes):
            return ()
        found = apart(placement.cut, [s for s in sizes if s is not None])
        if found is None:
            return ()
        option = self.divided(names[found[0]], found[1])
        return (option,) if option is not None else ()

    # -- from a label ----------------------------------------------------------------------------------------------

    def divided(self, label: str, cut: Cut) -> Option | None:
        """The op with this label cut so; None where that cannot be."""
        read = self.reading
        if read is None or label in read.whole or label not in read.sizes:
            return None
        if isinstance(read.sizes[label], Size) and cut.outer == 1:
            return None
        inputs: list[Placement] = []
        for i, dims in enumerate(read.inputs):
            held = self._held(dims, label, cut)
            if held is None:
                return None
            inputs.append(self._whole(i) if held is REPLICATE else held)
        if not any(isinstance(p, Shard) for p in inputs) and any(
            self._held(dims, label, cut) is REPLICATE for dims in read.outputs
        ):
            return None
        outputs: list[Placement] = []
        for dims in read.outputs:
            held = self._held(dims, label, cut)
            if held is None:
                return None
            outputs.append(PARTIAL if held is REPLICATE else held)
        summed = any(isinstance(p, Partial) for p in outputs)
        way = "plain"
        if summed:
            if len(outputs) != 1 or not self._sums():
                return None
            if label in read.mean:
                way = "mean"
                if self._rewritten():
                    return None
            elif any(not isinstance(inputs[i], Shard) for i in read.added):
                if not self._bias_apart():
                    return None
                way, outputs = "summed", [REPLICATE]
                inputs = [REPLICATE if i in read.added else p for i, p in enumerate(inputs)]
        if self.writes and not self._writes_stay(inputs, outputs):
            return None
        return Option(way, tuple(inputs), tuple(outputs), label, cut)

    def scattered(self, summed: Option, placement: Placement) -> Option | None:
        """A ``summed`` option of which each member gets its rows of the sum, and adds the bias to those; None where the
        bias has these rows too."""
        read = self.reading
        if read is None or read.outputs[0] is None or not isinstance(placement, Shard) or summed.way != "summed":
            return None
        if placement.dim >= len(read.outputs[0]) or summed.outputs != (REPLICATE,):
            return None
        rows = set(read.outputs[0][placement.dim])
        if any(rows & {name for dim in read.inputs[i] or () for name in dim} for i in read.added):
            return None
        inputs = tuple(self._whole(i) if i in read.added else p for i, p in enumerate(summed.inputs))
        return Option("summed", inputs, (placement,), summed.label, summed.cut)

    def _held(self, dims: tuple[tuple[str, ...], ...] | None, label: str, cut: Cut) -> Placement | None:
        """The placement of a tensor with these labels, Replicate where it has not this one; None: cannot be said."""
        for dim, names in enumerate(dims or ()):
            if label in names:
                assert self.reading is not None
                sizes = [self.reading.sizes.get(n) for n in names]
                if any(s is None for s in sizes):
                    return None
                found = inside(cut, [s for s in sizes if s is not None], names.index(label))
                return None if found is None else Shard(dim, found)
        return REPLICATE

    def _sums(self) -> bool:
        return all(t is None or t.dtype in _FLOAT or t.dtype in ("int64", "int32") for t in self.call.results())

    def _rewritten(self) -> bool:
        """A mean that is not over all elements alike (targets that are ignored)."""
        return short(self.op.target) in ("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", "nanmean")

    def _bias_apart(self) -> bool:
        """Whether what is added can be added after the sum over the members."""
        kind = short(self.op.target)
        if kind == "addmm":
            return not self.op.kwargs and len(self.op.args) == 3 and len(self.operands[0].shape) == 1
        return kind in _BIASED and has_bias(self.call) and len(self.operands) == 3 and not self.op.kwargs

    def _writes_stay(self, inputs: list[Placement], outputs: list[Placement]) -> bool:
        """Whether what the op changes is each member's own rows of a buffer."""
        for base in self.writes:
            if self.graph.tensor(base).role != "buffer":
                return False
            at = next((i for i, t in enumerate(self.operands) if t.name == base), None)
            held = inputs[at] if at is not None else None
            if not isinstance(held, Shard) or len(held.cut.rounds) > 1:
                return False
        return True

    # -- sums that are still to be added ---------------------------------------------------------------------------

    def _passed(self, index: int) -> Option | None:
        read = self.reading
        if read is None or not read.linear or self.writes:
            return None
        dtypes = {t.dtype for t in self.operands} | {t.dtype for t in self.call.results() if t is not None}
        kind = short(self.op.target)
        if len(dtypes) != 1 or dtypes & {"float16", "bfloat16"}:
            return None
        if kind in ("add", "sub", "rsub") and not all(isinstance(a, Ref) for a in self.op.args[:2]):
            return None
        inputs: list[Placement]
        if read.linear == "linear":
            inputs = [PARTIAL] * len(self.operands)
        else:
            if kind in ("div", "divide", "true_divide") and (index or len(self.op.args) > 2 or self.op.kwargs):
                return None
            inputs = [PARTIAL if i == index else self._whole(i) for i in range(len(self.operands))]
        return Option("passed", tuple(inputs), (PARTIAL,) * len(self.op.outputs))

    # -- parts of a dim --------------------------------------------------------------------------------------------

    def _joined(self, side: int, cut: Cut) -> Option | None:
        """A dim cut apart, or joined: each part is divided. ``side``: operand, or -1 - result, that is cut so."""
        assert self.parts is not None
        dim, sizes = self.parts
        if cut.outer != 1 or self.writes or not sizes or any(s < 1 for s in sizes):
            return None
        joins = short(self.op.target).startswith(("cat", "concat"))
        one = (side < 0) if joins else (side >= 0)
        cuts = _cuts(cut, sizes) if one else _alike(cut, sizes, side if joins else -1 - side)
        if cuts is None:
            return None
        whole = Shard(dim, Cut(tuple(r for c in cuts for r in c.rounds)))
        parts: tuple[Placement, ...] = tuple(Shard(dim, c) for c in cuts)
        if joins:
            return Option("plain", parts, (whole,), f"dim {dim}", whole.cut)
        return Option("plain", (whole,), parts, f"dim {dim}", whole.cut)

    # -- tables and losses over divided classes --------------------------------------------------------------------

    def _table_or_loss(self, side: int, placement: Shard) -> Option | None:
        kind, cut = short(self.op.target), placement.cut
        if side or len(cut.rounds) > 1 or cut.outer != 1:
            return None
        if kind == "embedding" and placement.dim == 0 and len(self.operands) == 2:
            if any(self.call.arg(i, False) for i in (3, 4)):
                return None
            return Option("table", (placement, REPLICATE), (PARTIAL,), "v", cut)
        if kind == "cross_entropy_loss" and placement.dim == 1 and len(self.operands) == 2:
            if self.operands[1].dtype in _FLOAT or find(self.op.target) is None:
                return None
            return Option("loss", (placement, REPLICATE), (REPLICATE,), "c", cut)
        return None

    # -- what to begin with ----------------------------------------------------------------------------------------

    def labels_of(self, index: int) -> tuple[tuple[str, Dim], ...]:
        """Labels of an operand that may be divided, with their sizes."""
        read = self.reading
        dims = read.inputs[index] if read is not None else None
        if read is None or dims is None:
            return ()
        names = [n for labels in dims for n in labels]
        return tuple((n, read.sizes[n]) for n in names if n in read.sizes and n not in read.whole)


def _cuts(cut: Cut, sizes: tuple[int, ...]) -> list[Cut] | None:
    """The cut of each part where the whole is cut so: no round may lie across two parts."""
    found, rounds = [], list(cut.rounds)
    for size in sizes:
        mine: list[tuple[int, ...]] = []
        while sum(map(sum, mine)) < size and rounds:
            mine.append(rounds.pop(0))
        if sum(map(sum, mine)) != size:
            return None
        found.append(Cut(tuple(mine)))
    return None if rounds else found


def _alike(cut: Cut, sizes: tuple[int, ...], at: int) -> list[Cut] | None:
    """All parts cut in the proportions in which one of them is."""
    if at >= len(sizes) or sizes[at] != cut.total:
        return None
    found = []
    for size in sizes:
        if any(n * size % sizes[at] for r in cut.rounds for n in r):
            return None
        found.append(Cut(tuple(tuple(n * size // sizes[at] for n in r) for r in cut.rounds)))
    return found


def functional(graph: Graph, op: Op) -> bool:
    """Whether the op, which changes its first operand in place, may as well make a new tensor: of its own results
    only, never of a buffer or an input."""
    parts = op.target.split(".")
    return (
        parts[0] == "aten" and len(parts) == 3 and parts[1].endswith("_") and not parts[1].endswith("__")
        and len(op.writes) == 1 and len(op.outputs) == 1 and parts[1] not in _NO_TWIN
        and graph.tensor(op.writes[0]).role == "op"
    )  # fmt: skip


_NO_TWIN = frozenset({"copy_", "zero_", "fill_", "bernoulli_", "uniform_", "normal_", "random_", "exponential_"})
