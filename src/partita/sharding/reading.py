"""An op's rule as division in space reads it: labels of every operand and result, and what may be divided.

The lines are those of the batch; where a rule says less than holds for other dims (the batch of a batch norm is whole,
heads of a merged dim are a dim of their own), this module says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from partita.errors import UsageError
from partita.graph import Dim, Graph, Op, Ref, Size, Tensor, refs
from partita.sharding import rules  # noqa: F401  (fills the table)
from partita.sharding.call import Call, Refusal, Ruled, labels
from partita.sharding.notation import Rule, Term, fit, parse
from partita.sharding.placements import times
from partita.sharding.registry import find
from partita.sharding.rules_shape import merge

Labels = tuple[tuple[str, ...], ...]
VIEWS = frozenset("view reshape _unsafe_view _reshape_alias view_copy flatten unflatten ravel".split())  # noqa: SIM905
_BATCH = 1_000_003


@dataclass(frozen=True, slots=True)
class Reading:
    """``inputs``: labels of each operand's dims (``Call.operands``), None where only its dtype is read. ``outputs``:
    of each of ``op.outputs``. ``sizes``: of every label whose size is known. ``whole``: not to be divided. ``mean``:
    averaged away. ``added``: operands added after the sum. ``linear``: '', 'linear' or 'bilinear'.
    """

    inputs: tuple[Labels | None, ...]
    outputs: tuple[Labels, ...]
    sizes: Mapping[str, Dim]
    whole: frozenset[str]
    mean: frozenset[str]
    added: frozenset[int]
    linear: str = ""


def short(target: str) -> str:
    """``aten.add_.Tensor`` -> ``add``."""
    parts = target.split(".")
    return parts[1].rstrip("_") if parts[0] == "aten" and len(parts) > 1 else target


def reading(graph: Graph, op: Op) -> Reading | None:
    """None where the op has no rule, or one that does not fit this call: then it cannot be divided."""
    call = Call(op, graph)
    said = _said(call)
    if said is None:
        return None
    terms, rule, known = said
    operands = call.operands()
    results = call.results()
    if len(rule.outputs) != len(results):
        return None
    bound = [(t, term) for t, term in zip(operands, terms, strict=True) if term.kind == "tensor"]
    kept = [i for i, t in enumerate(results) if t is not None]
    shrunk = Rule(tuple(term for _, term in bound), tuple(rule.outputs[i] for i in kept), rule.mean)
    made = [t for t in results if t is not None]
    try:
        fitted = fit(shrunk, [t.shape for t, _ in bound], [t.shape for t in made])
    except UsageError:
        return None
    given = iter(fitted.inputs)
    inputs = tuple(next(given) if term.kind == "tensor" else None for term in terms)
    found = iter(fitted.outputs)
    outputs = tuple(next(found) if t is not None else () for t in results)
    whole = fitted.whole | {label[1:] for label in known if label.startswith("_")}
    told = [(t, d) for t, d in zip((*operands, *results), (*inputs, *outputs), strict=True) if t and d is not None]
    sizes = _sizes(told, known, whole)
    if sizes is None:
        return None
    added = frozenset(i for i, term in enumerate(terms) if term.added)
    return Reading(inputs, outputs, sizes, whole, fitted.mean, added, rule.linearity)


def _said(call: Call) -> tuple[list[Term], Rule, dict[str, Dim]] | None:
    """A term for each operand, the rule, and sizes of labels that its shapes do not show."""
    op = call.op
    own = _own(call)
    if own is not None:
        text, known = own
        rule = parse(text)
        return (list(rule.inputs), rule, known) if len(rule.inputs) == len(call.operands()) else None
    entry = find(op.target)
    if entry is None:
        return None
    if isinstance(entry, Rule):
        terms = _by_position(op, entry)
        return None if terms is None else (terms, entry, {})
    answer = entry(call)
    if isinstance(answer, Refusal):
        return None
    rule = parse(answer.text if isinstance(answer, Ruled) else answer)
    return (list(rule.inputs), rule, {}) if len(rule.inputs) == len(call.operands()) else None


def _by_position(op: Op, rule: Rule) -> list[Term] | None:
    found: list[Term] = []
    for i, value in enumerate([*op.args, *(v for _, v in op.kwargs if any(refs(v)))]):
        names = tuple(refs(value))
        if not names:
            continue
        if i >= len(rule.inputs) or rule.inputs[i].kind == "other":
            return None
        found += [rule.inputs[i]] * len(names)
    return found


def _own(call: Call) -> tuple[str, dict[str, Dim]] | None:
    """Rules that hold for dims other than the batch, with sizes of labels; ``_x`` among them: x is whole."""
    kind, shape = short(call.op.target), call.shape(0)
    if kind in VIEWS and len(call.operands()) == 1:
        text = refined(shape, call.out())
        return None if text is None else (f"{text} ; linear", {})
    if kind == "batch_norm" and len(shape) > 1:
        others = ", c" * (len(call.operands()) - 1)
        return f"[b] c [s..]{others} -> [b] c [s..]", {}
    if kind == "group_norm" and len(shape) > 1:
        groups = call.number(1, name="num_groups")
        if groups < 1:
            return None
        others = ", (g cx)" * (len(call.operands()) - 1)
        return f"b (g cx) [s..]{others} -> b (g cx) [s..]", {"g": groups, "_cx": 1}
    if kind.startswith("conv") and "norm" not in kind:
        at = 8 if kind == "convolution" else 6
        several = call.arg(at, 1, name="groups")
        entry = find(call.op.target)
        if isinstance(several, int) and several > 1 and callable(entry):
            answer = entry(call)
            if isinstance(answer, Ruled):
                return answer.text, {"g": several}
    return None


@lru_cache(maxsize=4096)
def refined(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> str | None:
    """The rule of a reshape, dims on both sides parted as finely as their products allow; None where they do not pair.

    ``(s, b, h*d) -> (s, b*h, d)``:   ``a b (c e) -> a (b c) e``
    """
    a = [d.at(_BATCH) if isinstance(d, Size) else d for d in before]
    b = [d.at(_BATCH) if isinstance(d, Size) else d for d in after]
    if prod(a) != prod(b) or any(n <= 0 for n in a + b):
        return None
    bounds = sorted({prod(x[:i]) for x in (a, b) for i in range(len(x) + 1)})
    if any(later % earlier for earlier, later in zip(bounds, bounds[1:], strict=False)):
        return merge(before, after)

    def side(shape: list[int]) -> str:
        spoken, done = [], 1
        for n in shape:
            inside = [f"r{k}" for k in range(len(bounds) - 1) if done <= bounds[k] and bounds[k + 1] <= done * n]
            done *= n
            spoken.append("1" if not inside else inside[0] if len(inside) == 1 else f"({' '.join(inside)})")
        return " ".join(spoken) or "()"

    return f"{side(a)} -> {side(b)}"


def _sizes(
    terms: list[tuple[Tensor, Labels]], known: Mapping[str, Dim], whole: frozenset[str]
) -> dict[str, Dim] | None:
    """Size of every label that stands alone, or follows from the others of a merged dim; None where labels that may be
    divided disagree."""
    found: dict[str, Dim] = {k: v for k, v in known.items() if not k.startswith("_")}
    merged: list[tuple[tuple[str, ...], Dim]] = []
    for tensor, dims in terms:
        for names, size in zip(dims, tensor.shape, strict=True):
            if len(names) == 1:
                if found.setdefault(names[0], size) != size and names[0] not in whole:
                    return None
            elif names:
                merged.append((names, size))
    for _ in range(2):
        for names, size in merged:
            missing = [n for n in names if n not in found]
            if len(missing) == 1:
                rest = divided(size, [found[n] for n in names if n in found])
                if rest is not None:
                    found[missing[0]] = rest
    return found


def divided(size: Dim, others: list[Dim]) -> Dim | None:
    """``size`` over the product of the others, where that is exact."""
    number = prod(d for d in others if isinstance(d, int))
    follows = [d for d in others if isinstance(d, Size)]
    if len(follows) > 1 or number <= 0:
        return None
    if follows:
        if not isinstance(size, Size) or follows[0].per_sample <= 0:
            return None
        whole = times(follows[0], number)
        assert isinstance(whole, Size)
        count = size.per_sample // whole.per_sample if whole.per_sample else 0
        return count if times(whole, count) == size else None
    if isinstance(size, Size):
        if size.fixed % number or size.per_sample % number:
            return None
        return Size(size.fixed // number, size.per_sample // number)
    return None if size % number else size // number


def pieces(call: Call) -> tuple[int, tuple[int, ...]] | None:
    """Of an op that cuts one dim apart or joins one: the dim, and the sizes of the parts. None for other ops."""
    kind, shape = short(call.op.target), call.shape(0)
    if kind in ("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"):
        dim = call.number(2, name="dim") % max(len(shape), 1)
        results = call.results()
        if any(t is None for t in results):
            return _all_pieces(call, dim)
        sizes = [t.shape[dim] for t in results if t is not None]
    elif kind in ("cat", "concat", "concatenate"):
        dim = call.number(1, name="dim") % max(len(call.out()), 1)
        if any(len(t.shape) != len(call.out()) for t in call.operands()):
            return None
        sizes = [t.shape[dim] for t in call.operands()]
    else:
        return None
    return (dim, tuple(s for s in sizes if isinstance(s, int))) if all(isinstance(s, int) for s in sizes) else None


def _all_pieces(call: Call, dim: int) -> tuple[int, tuple[int, ...]] | None:
    """Of a split of which not every part is used."""
    size, value, count = call.shape(0)[dim], call.arg(1), len(call.op.outputs)
    if not isinstance(size, int):
        return None
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return dim, tuple(v for v in value if isinstance(v, int))
    if not isinstance(value, int):
        return None
    step = -(-size // value) if "chunk" in call.op.target else value
    return dim, tuple(min(step, size - i * step) for i in range(count))


def has_bias(call: Call) -> bool:
    """Whether a product is given something to add."""
    return isinstance(call.arg(2, None, name="bias"), Ref)


__all__ = ["Reading", "divided", "has_bias", "labels", "pieces", "reading", "refined", "short"]
