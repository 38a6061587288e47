"""Dims of one op by label: which dims of its operands and results are one dim, as its sharding rule says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from partita.errors import UsageError
from partita.graph import Dim, Graph, Op, Tensor, refs
from partita.sharding import rules  # noqa: F401  (fills the table)
from partita.sharding.call import Call, Refusal, Ruled
from partita.sharding.notation import Rule, fit, parse
from partita.sharding.registry import find

Labels = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class OpDims:
    """``inputs``, ``outputs``: (tensor, labels of each dim, outermost first). ``sizes``: of labels that stand alone.

    ``whole``: labels that must not be divided. ``linear``: the op is linear in its tensors jointly.
    """

    inputs: tuple[tuple[str, Labels], ...]
    outputs: tuple[tuple[str, Labels], ...]
    sizes: Mapping[str, Dim]
    whole: frozenset[str]
    linear: bool = False


def op_dims(graph: Graph, op: Op) -> OpDims | None:
    """None where the op has no rule, or one that does not fit this call."""
    entry = find(op.target)
    if entry is None:
        return None
    results = [graph.tensor(o) for o in op.outputs if o]
    if isinstance(entry, Rule):
        bound = _bound(graph, op, entry)
        if bound is None:
            return None
        rule, operands = (
            Rule(tuple(entry.inputs[i] for i, _ in bound), entry.outputs, entry.mean),
            [t for _, t in bound],
        )
        linear = entry.linearity == "linear"
    else:
        call = Call(op, graph, batch_norm="per_microbatch")
        answer = entry(call)
        if isinstance(answer, Refusal):
            return None
        said = parse(answer.text if isinstance(answer, Ruled) else answer)
        pairs = [(t, term) for t, term in zip(call.operands(), said.inputs, strict=False) if term.kind == "tensor"]
        if len(call.operands()) != len(said.inputs):
            return None
        rule, operands = Rule(tuple(term for _, term in pairs), said.outputs, said.mean), [t for t, _ in pairs]
        linear = said.linearity == "linear"
    if len(rule.outputs) != len(op.outputs):
        return None
    kept = tuple(rule.outputs[i] for i, name in enumerate(op.outputs) if name)
    try:
        fitted = fit(Rule(rule.inputs, kept, rule.mean), [t.shape for t in operands], [t.shape for t in results])
    except UsageError:
        return None
    inputs = tuple((t.name, dims) for t, dims in zip(operands, fitted.inputs, strict=True) if dims is not None)
    outputs = tuple((t.name, dims) for t, dims in zip(results, fitted.outputs, strict=True))
    return OpDims(inputs, outputs, _sizes(graph, (*inputs, *outputs)), fitted.whole, linear)


def _bound(graph: Graph, op: Op, rule: Rule) -> list[tuple[int, Tensor]] | None:
    """(term's index, tensor) of a rule given by position; None where they do not pair up."""
    found: list[tuple[int, Tensor]] = []
    arguments = [*op.args, *(value for _, value in op.kwargs if any(refs(value)))]
    for i, value in enumerate(arguments):
        names = tuple(refs(value))
        if not names:
            continue
        if i >= len(rule.inputs) or rule.inputs[i].kind == "other":
            return None
        if rule.inputs[i].kind == "tensor":
            found += [(i, graph.tensor(name)) for name in names]
    return found


def _sizes(graph: Graph, terms: tuple[tuple[str, Labels], ...]) -> dict[str, Dim]:
    found: dict[str, Dim] = {}
    for name, dims in terms:
        for labels, size in zip(dims, graph.tensor(name).shape, strict=True):
            if len(labels) == 1:
                found.setdefault(labels[0], size)
    return found
