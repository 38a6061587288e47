"""Tensor degrees: how a run of ops is best divided over ``parts`` equal devices, each op along one of its dims.

Every op either runs whole on each device or along one label of its sharding rule; between ops a value is whole,
divided along a dim, or a partial sum, and changes cost a collective forward, backward or both. The cheapest labelling
is found by dynamic programming over the ops in order, the state being how the values still needed are held (Alpa's
intra-op problem, Zheng et al., 2022, section 4, on one axis). On a transformer layer it finds Megatron's division
(Shoeybi et al., 2019), and, where values may stay divided along the sequence between products, that of Korthikanti et
al. (2022).

Exact where no more than ``BEAM`` states are alive at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from partita.cost.ops import short
from partita.cost.roofline import ALL, Seconds, Shapes, Share
from partita.graph import Graph, Op

BEAM = 96
WHOLE, SUMMED, PARTIAL = "whole", "summed", "partial"  # summed: held whole, its gradient comes in partial sums
Form = str | int  # or the dim along which it is divided


@dataclass(frozen=True, slots=True)
class Change:
    """A value made as ``made`` and needed as ``needed``: the collectives it takes forward and backward ('' : none)."""

    tensor: str
    made: Form
    needed: Form
    forward: str
    backward: str


@dataclass(frozen=True, slots=True)
class Division:
    """``labels``: of each op, '' for whole. ``parameters``: (name, dim or 'whole'). ``seconds``: of one sample."""

    parts: int
    labels: tuple[str, ...]
    changes: tuple[Change, ...]
    parameters: tuple[tuple[str, Form], ...]
    forms: tuple[tuple[str, Form], ...]
    seconds: float

    def form(self, tensor: str) -> Form:
        return dict(self.forms).get(tensor, WHOLE)


_MOVES: dict[tuple[str, str], tuple[str, str]] = {
    ("whole", "whole"): ("", ""),
    ("whole", "summed"): ("", "all_reduce"),
    ("whole", "dim"): ("", "all_gather"),
    ("partial", "whole"): ("all_reduce", ""),
    ("partial", "summed"): ("all_reduce", "all_reduce"),
    ("partial", "dim"): ("reduce_scatter", "all_gather"),
    ("dim", "whole"): ("all_gather", ""),
    ("dim", "summed"): ("all_gather", "reduce_scatter"),
    ("dim", "dim"): ("all_to_all", "all_to_all"),
}


def change(tensor: str, made: Form, needed: Form, *, gradient: bool) -> Change:
    """What it takes to hold a value otherwise."""
    if made == needed and made != PARTIAL:
        return Change(tensor, made, needed, "", "")
    kind = ("dim" if isinstance(made, int) else made, "dim" if isinstance(needed, int) else needed)
    forward, backward = _MOVES[kind]
    return Change(tensor, made, needed, forward, backward if gradient else "")


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run an op: forms its inputs are needed in and its results come in; ``extra``: collectives inside."""

    label: str
    inputs: tuple[tuple[str, Form], ...]
    outputs: tuple[tuple[str, Form], ...]
    extra: tuple[tuple[str, str], ...] = ()  # (tensor whose rows are exchanged, collective)


def choices(shapes: Shapes, op: Op, parts: int, wanted: Mapping[str, Form] | None = None) -> list[Choice]:
    """Whole, and along every label that divides evenly; an op with a matrix of weights divides it where it can.

    ``wanted``: parameters that a person wants divided so; the ops that use them have no other choice.
    """
    asked = {n: wanted[n] for n in op.uses() if wanted and n in wanted}
    if not asked:
        return _choices(shapes, op, parts)
    found = _choices(shapes, op, parts, every=True)
    return [c for c in found if all(_held(form) == asked.get(name, _held(form)) for name, form in c.inputs)]


def _held(form: Form) -> Form:
    """How a parameter is stored that an op needs in this form."""
    return form if isinstance(form, int) else WHOLE


def _choices(shapes: Shapes, op: Op, parts: int, *, every: bool = False) -> list[Choice]:
    graph = shapes.graph
    uses, outs = op.uses(), tuple(o for o in op.outputs if o)
    found = [Choice("", tuple((n, WHOLE) for n in uses), tuple((o, WHOLE) for o in outs))]
    dims = shapes.dims(op)
    if dims is None or op.target.startswith("opaque:"):
        return found
    found += _looked_up(graph, op, parts)
    every_label = {label for _, labelled in (*dims.inputs, *dims.outputs) for labels in labelled for label in labels}
    for label in sorted(every_label - dims.whole):
        size = dims.sizes.get(label)
        if not isinstance(size, int) or size < parts or size % parts:
            continue
        inputs, outputs, ok = {}, {}, True
        for name, labelled in dims.inputs:
            at = _place(labelled, label)
            ok &= at != -1
            inputs[name] = SUMMED if at is None else at
        for name, labelled in dims.outputs:
            at = _place(labelled, label)
            ok &= at != -1
            outputs[name] = PARTIAL if at is None else at
        if not ok or not any(isinstance(f, int) for f in inputs.values()):
            continue
        if PARTIAL in outputs.values() and not all(graph.tensor(o).dtype.startswith(("float", "bf")) for o in outputs):
            continue
        given = {n: inputs.get(n, SUMMED) for n in uses}
        found.append(Choice(label, tuple(given.items()), tuple((o, outputs.get(o, WHOLE)) for o in outs)))
    tables = {n for n in uses if graph.tensor(n).role == "parameter" and len(graph.tensor(n).shape) > 1}
    divided = [c for c in found if any(isinstance(f, int) for n, f in c.inputs if n in tables)]
    return found if every else divided or found


def _place(labelled: tuple[tuple[str, ...], ...], label: str) -> int | None:
    """The dim the label is the outermost of; None where it is in none, -1 where it is inside one."""
    for dim, labels in enumerate(labelled):
        if label in labels:
            return dim if labels[0] == label else -1
    return None


def _looked_up(graph: Graph, op: Op, parts: int) -> list[Choice]:
    """Tables divided by rows (Shoeybi et al., 2019, section 3): each looks up its own, losses exchange row sums."""
    name = short(op.target)
    if name == "embedding" and len(op.uses()) == 2:
        table, index = op.uses()
        rows = graph.tensor(table).shape[0]
        if isinstance(rows, int) and rows % parts == 0:
            return [Choice("rows", ((table, 0), (index, WHOLE)), ((op.outputs[0], PARTIAL),))]
    if name in ("cross_entropy_loss",) and len(op.uses()) == 2:
        scores, target = op.uses()
        shape = graph.tensor(scores).shape
        if len(shape) == 2 and isinstance(shape[1], int) and shape[1] % parts == 0:
            forms = ((scores, 1), (target, WHOLE))
            return [Choice("rows", forms, tuple((o, WHOLE) for o in op.outputs if o), ((target, "all_reduce"),) * 2)]
    return []


State = tuple[tuple[str, Form, frozenset[Form]], ...]


@dataclass(slots=True)
class _Step:
    cost: float
    before: State | None
    choice: Choice
    changes: tuple[Change, ...]


def divide(
    shapes: Shapes,
    ops: range,
    parts: int,
    *,
    seconds: Callable[[Op, Share], Seconds],
    exchange: Callable[[str, str], float],
    entering: Callable[[str], Form],
    leaving: Callable[[str], Form | None],
    sequence: bool,
    wanted: Mapping[str, Form] | None = None,
) -> Division | None:
    """The cheapest division of the run. ``exchange(collective, tensor)``: seconds of one. ``entering``: how a value
    made before the run arrives; ``leaving``: how one used after it must be left (None: as it comes). ``wanted``: forms
    of parameters that are fixed. None: there is none.
    """
    graph = shapes.graph
    last: dict[str, int] = {}
    made = {o for i in ops for o in graph.ops[i].outputs if o}
    for i in ops:
        for name in graph.ops[i].uses():
            last[name] = i
    finals = {name for name in made if _used_after(shapes, name, ops)}
    fixed = {"parameter", "buffer", "constant"}
    known: dict[tuple[str, Form, Form], tuple[Change, float]] = {}

    def turned(name: str, form: Form, needed: Form) -> tuple[Change, float]:
        if (name, form, needed) not in known:
            turn = change(name, form, needed, gradient=graph.tensor(name).needs_grad)
            price = sum(exchange(kind, name) for kind in (turn.forward, turn.backward) if kind)
            known[name, form, needed] = turn, price
        return known[name, form, needed]

    layer: dict[State, _Step] = {(): _Step(0.0, None, Choice("", (), ()), ())}
    trail: list[dict[State, _Step]] = []
    for i in ops:
        op = graph.ops[i]
        options = [
            (c, seconds(op, Share(c.label, parts) if c.label else ALL)) for c in choices(shapes, op, parts, wanted)
        ]
        following: dict[State, _Step] = {}
        for state, step in layer.items():
            held = {name: (form, paid) for name, form, paid in state}
            for choice, took in options:
                cost = step.cost + took.forward + took.backward + sum(exchange(k, t) for t, k in choice.extra)
                changes: list[Change] = []
                now = dict(held)
                ok = True
                for name, needed in choice.inputs:
                    tensor = graph.tensor(name)
                    if tensor.role in fixed:
                        continue
                    form, paid = now.get(name) or (entering(name), frozenset())
                    if needed == SUMMED and not tensor.needs_grad:
                        needed = WHOLE
                    if needed not in paid:
                        if form == PARTIAL and isinstance(needed, int) and not sequence:
                            ok = False
                            break
                        turn, price = turned(name, form, needed)
                        cost += price
                        changes.append(turn)
                        paid = paid | {needed}
                    now[name] = (form, paid)
                if not ok:
                    continue
                for name, form in choice.outputs:
                    now[name] = (form, frozenset())
                    if name in finals and (left := leaving(name)) is not None and left != form:
                        if form == PARTIAL and isinstance(left, int) and not sequence:
                            ok = False
                            break
                        turn, price = turned(name, form, left)
                        cost += price
                        changes.append(turn)
                        now[name] = (left, frozenset())
                if not ok:
                    continue
                key: State = tuple(
                    sorted(((n, f, p) for n, (f, p) in now.items() if last.get(n, -1) > i), key=lambda x: x[0])
                )
                best = following.get(key)
                if best is None or cost < best.cost:
                    following[key] = _Step(cost, state, choice, tuple(changes))
        if len(following) > BEAM:
            following = dict(sorted(following.items(), key=lambda kv: kv[1].cost)[:BEAM])
        trail.append(following)
        layer = following
    if not layer:
        return None
    state = min(layer, key=lambda s: layer[s].cost)
    total = layer[state].cost
    steps: list[_Step] = []
    here: State | None = state
    for following in reversed(trail):
        assert here is not None
        steps.append(following[here])
        here = following[here].before
    steps.reverse()
    return _division(graph, parts, steps, total)


def _division(graph: Graph, parts: int, steps: Iterable[_Step], total: float) -> Division:
    labels: list[str] = []
    changes: list[Change] = []
    parameters: dict[str, Form] = {}
    forms: dict[str, Form] = {}
    for step in steps:
        labels.append(step.choice.label)
        changes += step.changes
        for name, needed in step.choice.inputs:
            if graph.tensor(name).role == "parameter":
                form: Form = needed if isinstance(needed, int) else WHOLE
                if parameters.get(name, form) != form:
                    form = WHOLE
                parameters[name] = form
        forms.update(step.choice.outputs)
        forms.update({c.tensor: c.needed for c in step.changes if c.tensor in dict(step.choice.outputs)})
        for tensor, kind in step.choice.extra:
            changes.append(Change(tensor, WHOLE, WHOLE, kind, ""))
    return Division(parts, tuple(labels), tuple(changes), tuple(parameters.items()), tuple(forms.items()), total)


def _used_after(shapes: Shapes, name: str, ops: range) -> bool:
    if name in shapes.last:
        return True
    return any(shapes.position(op) >= ops.stop for op in shapes.users.get(name, ()))
