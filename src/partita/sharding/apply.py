"""One op under the batch: from the layouts of its operands and its rule to phase and layouts of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod

from partita.errors import UsageError
from partita.graph import Arg, Dim, Graph, Op, Ref, Size, Tensor, refs
from partita.program import Fixed, Layout, Once, Partial, Split, Whole
from partita.sharding.call import Call, Refusal, Rewrite, Ruled
from partita.sharding.notation import Fitted, Rule, Term, fit, parse
from partita.sharding.registry import find, is_custom
from partita.sharding.sizes import has_size, sizes_are_true


@dataclass(frozen=True, slots=True)
class Decision:
    """``phase`` and the layouts of the results. ``coupling``: the first of its chain to need the whole batch."""

    phase: str
    outputs: tuple[Layout, ...]
    rewrite: Rewrite | None = None
    takes: tuple[tuple[str, Split], ...] = ()
    reason: str = ""
    coupling: bool = False

    @staticmethod
    def whole(op: Op, reason: str, *, coupling: bool = True) -> Decision:
        return Decision("whole", tuple(Whole() for _ in op.outputs), None, (), reason, coupling)


class _Coupled(Exception):
    """The op is not provably the same on parts of the batch; the text says why."""


def batch_dim(shape: Sequence[Dim]) -> int | None:
    """The only dim that follows the batch, where its size is a plain multiple of it; else None."""
    found = [i for i, d in enumerate(shape) if isinstance(d, Size) and d.per_sample]
    if len(found) != 1:
        return None
    size = shape[found[0]]
    return found[0] if isinstance(size, Size) and size.fixed == 0 and size.per_sample > 0 else None


def decide(
    graph: Graph, op: Op, of: Mapping[str, Layout], *, batch_norm: str = "exact", local: Set[str] = frozenset()
) -> Decision:
    """Phase and layouts of one op. ``local``: ops that are made anew for every microbatch though they could be once."""
    used = [of[name] for name in op.uses()]
    outputs = [graph.tensor(name) for name in op.outputs if name]
    if any(isinstance(layout, Whole) for layout in used):
        return Decision.whole(op, "it uses a value of the whole batch", coupling=False)
    try:
        if not any(isinstance(layout, Split | Partial) for layout in used) and op.name not in local:
            return _independent(graph, op, of, outputs)
        if op.random:
            raise _Coupled("it draws random numbers whose shape or place depends on the batch's data")
        return _dependent(Call(op, graph, batch_norm, local), of)
    except _Coupled as why:
        return Decision.whole(op, str(why))


def _independent(graph: Graph, op: Op, of: Mapping[str, Layout], outputs: list[Tensor]) -> Decision:
    """An op of values that no batch data went into."""
    made = [name for name in op.uses() if isinstance(of[name], Fixed) and graph.producer(name) is not None]
    if not made and not any(t.needs_grad for t in outputs):
        return Decision("once", tuple(Once() for _ in op.outputs))
    if op.random:
        raise _Coupled("it draws random numbers on the way of a gradient")
    if not any(t.follows_batch for t in outputs) and not any(graph.tensor(n).follows_batch for n in op.uses()):
        return Decision("split", tuple(Fixed() for _ in op.outputs))
    return _dependent(Call(op, graph), of)


def _dependent(call: Call, of: Mapping[str, Layout]) -> Decision:
    op, graph = call.op, call.graph
    terms, ruled, rule = _rule(call)
    operands = [graph.tensor(name) for name, _ in terms]
    results = [t for t in call.results() if t is not None]
    kept = [i for i, name in enumerate(op.outputs) if name]
    if len(rule.outputs) != len(op.outputs):
        raise _misfit(op, f"the rule '{rule}' names {len(rule.outputs)} results, the op has {len(op.outputs)}")
    shrunk = Rule(tuple(term for _, term in terms), tuple(rule.outputs[i] for i in kept), rule.mean, rule.linearity)
    try:
        fitted = fit(shrunk, [t.shape for t in operands], [t.shape for t in results])
    except UsageError as why:
        raise _misfit(op, str(why)) from None
    if any(isinstance(of[t.name], Partial) for t in operands):
        return _sums(op, operands, results, of, shrunk)
    extents = _extents(operands, results, fitted)
    batch = _batch_label(operands, results, of, fitted, extents)
    if batch is None:  # only dtypes were read from the batch: the same in every microbatch
        if any(t.follows_batch for t in results) or not results:
            raise _Coupled("its result follows the batch in a way its rule does not show")
        return Decision("split", tuple(Fixed() for _ in op.outputs))
    if batch.label in fitted.whole:
        raise _Coupled(_why_whole(batch.label, fitted))
    takes = _align(batch, operands, of, fitted, extents)
    layouts, averaged = _results(batch, results, fitted, _addends(op, shrunk), extents)
    rewrite = ruled.rewrite if ruled else None
    if averaged and rewrite is None:
        rewrite = Rewrite("weighted")
    if rewrite is not None and rewrite.kind == "sum_over_total" and not any(isinstance(x, Partial) for x in layouts):
        rewrite = None
    _check_sizes(op)
    by_name = dict(zip([op.outputs[i] for i in kept], layouts, strict=True))
    return Decision("split", tuple(by_name.get(name, Whole()) for name in op.outputs), rewrite, takes)


def _rule(call: Call) -> tuple[list[tuple[str, Term]], Ruled | None, Rule]:
    """The op's rule with its terms bound to tensors."""
    op = call.op
    entry = find(op.target)
    if entry is None:
        raise _Coupled(
            f"no sharding rule for {op.target}: if it treats samples alone, one line of partita.sharding_rule says so"
        )
    if isinstance(entry, Rule):
        return _bind(op, entry), None, entry
    answer = entry(call)
    if isinstance(answer, Refusal):
        raise _Coupled(answer.why)
    ruled = answer if isinstance(answer, Ruled) else Ruled(answer)
    rule = parse(ruled.text)
    names = [t.name for t in call.operands()]
    if len(names) != len(rule.inputs):
        raise _misfit(op, f"the rule '{rule}' names {len(rule.inputs)} tensors, the call has {len(names)}")
    bound = [(name, term) for name, term in zip(names, rule.inputs, strict=True) if term.kind == "tensor"]
    return bound, ruled, rule


def _bind(op: Op, rule: Rule) -> list[tuple[str, Term]]:
    """Terms to arguments by position; what stands behind the last term must hold no tensor."""
    bound: list[tuple[str, Term]] = []
    arguments: list[Arg] = list(op.args) + [value for _, value in op.kwargs if any(refs(value))]
    for i, term in enumerate(rule.inputs):
        value = arguments[i] if i < len(arguments) else None
        names = tuple(refs(value))
        if term.kind == "like":
            continue
        if term.kind == "other":
            if names:
                raise _misfit(op, f"argument {i + 1} is a tensor, the rule '{rule}' has '_' there")
            continue
        if not names and not isinstance(value, int | float | complex | Size) and not term.optional:
            raise _misfit(op, f"argument {i + 1} is no tensor, the rule '{rule}' has '{term}' there")
        bound += [(name, term) for name in names]
    for i, value in enumerate(arguments[len(rule.inputs) :]):
        if any(refs(value)):
            raise _misfit(op, f"argument {len(rule.inputs) + i + 1} is a tensor, the rule '{rule}' has no term for it")
    return bound


def _misfit(op: Op, what: str) -> Exception:
    """A built-in rule that does not fit proves nothing; a user's is a mistake to be told."""
    if is_custom(op.target):
        where = f" ({op.source})" if op.source else ""
        return UsageError(f"{op.name} [{op.target}]{where}: {what}. Correct the text given to partita.sharding_rule")
    return _Coupled(what)


def _sums(op: Op, operands: list[Tensor], results: list[Tensor], of: Mapping[str, Layout], rule: Rule) -> Decision:
    """Sums over microbatches pass through linear ops as sums."""
    partial = [isinstance(of[t.name], Partial) for t in operands]
    others = [of[t.name] for t, p in zip(operands, partial, strict=True) if not p]
    linear = rule.linearity == "linear" and all(partial) and _no_addend(op)
    factor = rule.linearity == "bilinear" and sum(partial) == 1
    factor = factor and not any(isinstance(o, Split) for o in others)
    if factor and op.target.split(".")[1].rstrip("_") in ("div", "divide", "true_divide"):
        factor = partial[0] and isinstance(op.args[0], Ref) and len(op.args) == 2 and not op.kwargs
    if not (linear or factor):
        raise _Coupled("it is not linear in a value that is summed over the batch")
    if any(t.follows_batch for t in results) or any(t.follows_batch for t in operands):
        raise _Coupled("a value that is summed over the batch meets one that follows the batch")
    if any(t.dtype not in _EXACT_SUM for t in (*results, *operands)):
        raise _Coupled("a sum over the batch changes to a dtype in which sums differ")
    return Decision("split", tuple(Partial() for _ in op.outputs))


_EXACT_SUM = frozenset({"float64", "float32", "complex64", "complex128", "int64", "int32"})


def _no_addend(op: Op) -> bool:
    """No number is added to the sum: it would be added once for every microbatch."""
    kind = op.target.split(".")[1].rstrip("_")
    if kind not in ("add", "sub", "rsub"):
        return True
    return all(isinstance(a, Ref) or a == 0 for a in op.args[:2])


@dataclass(frozen=True, slots=True)
class _Batch:
    """The label along which the batch runs, and its rows: ``outer`` rounds, ``factor`` a sample (None: unknown)."""

    label: str
    outer: int = 1
    factor: int | None = None


def _extents(operands: list[Tensor], results: list[Tensor], fitted: Fitted) -> dict[str, Dim]:
    """Size of every label that stands alone somewhere."""
    found: dict[str, Dim] = {}
    for tensors, terms in ((operands, fitted.inputs), (results, fitted.outputs)):
        for tensor, dims in zip(tensors, terms, strict=True):
            for labels, size in zip(dims or (), tensor.shape, strict=False):
                if len(labels) == 1:
                    found.setdefault(labels[0], size)
    return found


def _place(labels: tuple[str, ...], size: Dim, outer: int, extents: Mapping[str, Dim]) -> _Batch:
    """Which of the labels merged in a dim the batch runs along, given how often it comes round in that dim."""
    if not labels:
        raise _Coupled("the batch is broadcast or reduced away in a dim of size one")
    if len(labels) == 1:
        assert isinstance(size, Size)
        return _Batch(labels[0], outer, size.per_sample // outer)
    sizes = [extents.get(label) for label in labels]
    at = next((i for i, s in enumerate(sizes) if isinstance(s, Size)), None)
    if at is None or any(s is None for s in sizes):
        if outer != 1:
            raise _Coupled("it merges or parts dims among which the samples are not outermost")
        return _Batch(labels[0])
    before = _product(sizes[:at])
    own = sizes[at]
    assert isinstance(own, Size)
    if outer % before or own.per_sample % (outer // before):
        raise _Coupled("it parts a dim across samples")
    return _Batch(labels[at], outer // before, own.per_sample // (outer // before))


def _product(sizes: Sequence[Dim | None]) -> int:
    if not all(isinstance(s, int) for s in sizes):
        raise _Coupled("it merges or parts dims of sizes that are not known apart")
    return prod(s for s in sizes if isinstance(s, int))


def _batch_label(
    operands: list[Tensor], results: list[Tensor], of: Mapping[str, Layout], fitted: Fitted, extents: Mapping[str, Dim]
) -> _Batch | None:
    """Where the batch runs: as the divided operands say, else as what follows the batch at all."""
    found: dict[str, _Batch] = {}

    def note(batch: _Batch) -> None:
        known = found.setdefault(batch.label, batch)
        if batch.factor is not None:
            if known.factor is not None and known != batch:
                raise _Coupled("its arguments hold the samples in different orders or sizes")
            found[batch.label] = batch

    for tensor, dims in zip(operands, fitted.inputs, strict=True):
        layout = of[tensor.name]
        if isinstance(layout, Split) and dims is not None:
            note(_place(dims[layout.dim], tensor.shape[layout.dim], layout.outer, extents))
    if not found:
        for tensors, terms in ((operands, fitted.inputs), (results, fitted.outputs)):
            for tensor, dims in zip(tensors, terms, strict=True):
                if tensor.follows_batch and dims is not None:
                    at = batch_dim(tensor.shape)
                    if at is None:
                        raise _Coupled("a size follows the batch in more than one dim, or not as a plain multiple")
                    note(_place(dims[at], tensor.shape[at], 1, extents))
            if found:
                break
    if len(found) > 1:
        raise _Coupled("it pairs every sample with every other (the batch runs along two different dims)")
    return next(iter(found.values()), None)


def _why_whole(label: str, fitted: Fitted) -> str:
    for dims in fitted.inputs:
        for i, labels in enumerate(dims or ()):
            if label in labels:
                return f"it works across dim {i} of an argument, along which the batch runs"
    return "it works across the dim along which the batch runs"


def _align(
    batch: _Batch, operands: list[Tensor], of: Mapping[str, Layout], fitted: Fitted, extents: Mapping[str, Dim]
) -> tuple[tuple[str, Split], ...]:
    """Every operand must hold the batch exactly where the label stands; values made once are cut there."""
    takes: dict[str, Split] = {}
    untouched: set[str] = set()
    for tensor, dims in zip(operands, fitted.inputs, strict=True):
        places = [i for i, labels in enumerate(dims or ()) if batch.label in labels]
        layout = of[tensor.name]
        at = batch_dim(tensor.shape)
        if not places:
            if tensor.follows_batch:
                raise _Coupled("an argument follows the batch along another dim")
            untouched.add(tensor.name)
            continue
        if at != places[0]:
            raise _Coupled("an argument is of a fixed size where the batch runs")
        split = layout if isinstance(layout, Split) else Split(at, _rows(tensor.shape[at]))
        here = _place((dims or ())[at], tensor.shape[at], split.outer, extents)
        if split.dim != at or here.label != batch.label:
            raise _Coupled("an argument holds the batch elsewhere than the rule says")
        if None not in (here.factor, batch.factor) and here != batch:
            raise _Coupled("its arguments hold the samples in different orders or sizes")
        if isinstance(layout, Once):
            if takes.setdefault(tensor.name, split) != split:
                raise _Coupled("an argument is cut in two ways")
        elif not isinstance(layout, Split):
            raise _Coupled("an argument does not follow the batch")
    if untouched & set(takes):
        raise _Coupled("one argument is used both cut and whole")
    return tuple(takes.items())


def _rows(size: Dim) -> int:
    assert isinstance(size, Size)
    return size.per_sample


def _addends(op: Op, rule: Rule) -> tuple[int, ...]:
    """Positions of operands that may be added after a sum; a user's rule may have left the '+' out."""
    return tuple(i for i, term in enumerate(rule.inputs) if term.added or is_custom(op.target))


def _results(
    batch: _Batch, results: list[Tensor], fitted: Fitted, addends: tuple[int, ...], extents: Mapping[str, Dim]
) -> tuple[list[Layout], bool]:
    found: list[Layout] = []
    averaged = False
    for tensor, dims in zip(results, fitted.outputs, strict=True):
        places = [i for i, labels in enumerate(dims) if batch.label in labels]
        if places:
            at = batch_dim(tensor.shape)
            if at != places[0]:
                raise _Coupled("its result does not follow the batch where its rule says")
            labels = dims[at]
            before = _product([extents.get(label) for label in labels[: labels.index(batch.label)]])
            outer, rows = before * batch.outer, _rows(tensor.shape[at])
            if rows % outer:
                raise _Coupled("its result does not keep each sample's rows together")
            found.append(Split(at, rows // outer, outer))
            continue
        if tensor.follows_batch:
            raise _Coupled("its result follows the batch in a way its rule does not show")
        if not all(any(batch.label in labels for labels in fitted.inputs[i] or ()) for i in addends):
            raise _Coupled("it sums over the batch and adds what does not follow the batch")
        if tensor.dtype not in _EXACT_SUM:
            raise _Coupled(f"a sum over the batch in {tensor.dtype} depends on the grouping")
        found.append(Partial())
        averaged = averaged or batch.label in fitted.mean
    if averaged and len(found) > 1:
        raise _Coupled("it averages over the batch and returns more beside")
    return found, averaged


def _check_sizes(op: Op) -> None:
    """A ``Size`` of an op whose arguments are sizes must scale with the microbatch exactly."""
    if sizes_are_true(op) and any(s.fixed or s.per_sample < 0 for s in has_size(op)):
        raise _Coupled("a size among its arguments is not a plain multiple of the batch")
    value = _FILLED_WITH.get(op.target)
    if value is not None and value < len(op.args) and isinstance(op.args[value], Size):
        raise _Coupled("it is filled with a number that follows the batch")


_FILLED_WITH = {"aten.full.default": 1, "aten.new_full.default": 2}  # this argument is no size
