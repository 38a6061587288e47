"""The one-line language of sharding rules: which dims of an op's operands and results are the same dim.

    b.. k, n k, +n? -> b.. n        linear: b.. any number of leading dims, k is summed, n comes from the weight

Terms stand for the op's arguments in order, separated by commas; after ``->`` for its results.

    k          a dim; the same label elsewhere is the same dim and may be divided together with it
    b..        any number of dims (also none), aligned from the right; size 1 broadcasts as in NumPy
    [d]        a dim the op needs whole (softmax's dim, normalised dims); dividing it is refused
    (b s)      one dim that merges several, the first outermost (its rows lie farthest apart)
    1          a dim of size one
    ()         a tensor without dims
    n?         the argument may be absent (None)        +n   added after the reduction (a bias)
    _          an argument that is no tensor            #    a tensor of which only dtype and device are read
    ; mean k   k is averaged, not summed                ; linear     linear in all tensors jointly (a + b)
                                                        ; bilinear   linear in each alone (a * b)

A label on the input side only is summed: divided, it leaves partial sums. A label on the output side only is made by
the op, uniformly (``expand``): any part of it can be made alone; write ``[d]`` where that is not so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from partita.errors import UsageError
from partita.graph import Dim

_TOKEN = re.compile(r"\s*([A-Za-z][A-Za-z0-9_]*(?:\.\.)?|\.\.|[\[\]()1+?,_#])")


@dataclass(frozen=True, slots=True)
class Axis:
    """One dim of a term. ``labels``: outermost first; none: size one. ``many``: any number of dims (``b..``)."""

    labels: tuple[str, ...] = ()
    whole: bool = False
    many: bool = False

    def __str__(self) -> str:
        if self.many:
            text = self.labels[0] + ".."
        elif not self.labels:
            text = "1"
        else:
            text = self.labels[0] if len(self.labels) == 1 else f"({' '.join(self.labels)})"
        return f"[{text}]" if self.whole else text


@dataclass(frozen=True, slots=True)
class Term:
    """One argument or result. ``kind``: 'tensor', 'other' (``_``: no tensor) or 'like' (``#``: only dtype read)."""

    axes: tuple[Axis, ...] = ()
    optional: bool = False
    added: bool = False
    kind: str = "tensor"

    def __str__(self) -> str:
        if self.kind != "tensor":
            return "_" if self.kind == "other" else "#"
        body = " ".join(str(axis) for axis in self.axes) or "()"
        return f"{'+' if self.added else ''}{body}{'?' if self.optional else ''}"


@dataclass(frozen=True, slots=True)
class Rule:
    """A parsed rule. ``mean``: labels averaged; ``linearity``: '', 'linear' or 'bilinear'."""

    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    mean: tuple[str, ...] = ()
    linearity: str = ""

    def __str__(self) -> str:
        text = f"{', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))}".strip()
        text += f" ; mean {' '.join(self.mean)}" if self.mean else ""
        return text + (f" ; {self.linearity}" if self.linearity else "")


@dataclass(frozen=True, slots=True)
class Fitted:
    """A rule fitted to one call: per operand and result, per dim, the labels (outermost first).

    ``whole``: labels that must not be divided; ``mean``: labels averaged away. An operand that is absent is None.
    """

    inputs: tuple[tuple[tuple[str, ...], ...] | None, ...]
    outputs: tuple[tuple[tuple[str, ...], ...], ...]
    whole: frozenset[str]
    mean: frozenset[str]


@lru_cache(maxsize=4096)
def parse(text: str) -> Rule:
    """The rule a line stands for; ``UsageError`` shows the spot where it cannot be read."""
    head, *clauses = text.split(";")
    if head.count("->") != 1:
        raise _malformed(text, "needs exactly one '->' between arguments and results", "write e.g. 'b k, k n -> b n'")
    left, right = head.split("->")
    inputs, outputs = _terms(left, text), _terms(right, text)
    if not outputs:
        raise _malformed(text, "names no result after '->'", "a result without dims is written ()")
    for term in outputs:
        if term.optional or term.added or term.kind != "tensor":
            raise _malformed(text, f"has the result '{term}'", "results are plain dims, without ? + _ #")
    mean: tuple[str, ...] = ()
    linearity = ""
    for clause in clauses:
        words = clause.split()
        if len(words) > 1 and words[0] == "mean":
            mean = tuple(word.removesuffix("..") for word in words[1:])
        elif words in (["linear"], ["bilinear"]):
            linearity = words[0]
        else:
            raise _malformed(
                text, f"ends in '{clause.strip()}'", "after ';' stand 'mean LABELS', 'linear' or 'bilinear'"
            )
    rule = Rule(inputs, outputs, mean, linearity)
    _check_labels(rule, text)
    return rule


def _terms(side: str, text: str) -> tuple[Term, ...]:
    tokens, at = [], 0
    side = side.rstrip()
    while at < len(side):
        found = _TOKEN.match(side, at)
        if not found:
            raise _malformed(
                text, f"cannot be read at '{side[at:].strip()}'", "labels are words; see partita.sharding.notation"
            )
        tokens.append(found.group(1))
        at = found.end()
    if not tokens:
        return ()
    groups: list[list[str]] = [[]]
    for token in tokens:
        groups.append([]) if token == "," else groups[-1].append(token)
    return tuple(_term(group, text) for group in groups)


def _term(tokens: list[str], text: str) -> Term:
    if not tokens:
        raise _malformed(
            text, "has an empty term between commas", "a tensor without dims is (), a non-tensor argument _"
        )
    if tokens in (["_"], ["#"]):
        return Term(kind="other" if tokens == ["_"] else "like")
    added, optional = tokens[0] == "+", tokens[-1] == "?"
    body = tokens[added : len(tokens) - optional]
    axes: list[Axis] = []
    at = 0
    while at < len(body):
        axis, at = _axis(body, at, text)
        if axis is not None:
            axes.append(axis)
    if not body:
        raise _malformed(text, f"has the term '{''.join(tokens)}' without dims", "a tensor without dims is ()")
    return Term(tuple(axes), optional, added)


def _axis(body: list[str], at: int, text: str) -> tuple[Axis | None, int]:
    token = body[at]
    if token in "[(":
        closing = "]" if token == "[" else ")"
        if closing not in body[at:]:
            raise _malformed(text, f"opens '{token}' without '{closing}'", f"close it: {token}d{closing}")
        end = body.index(closing, at)
        inner = body[at + 1 : end]
        if token == "[":
            if len(inner) != 1 and inner[:1] != ["("]:
                raise _malformed(text, f"has [{' '.join(inner)}]", "brackets hold one dim each: [h] [w]")
            if inner == ["1"]:
                return Axis(), end + 1
            axis, _ = _axis(inner, 0, text)
            return Axis(axis.labels, True, axis.many) if axis else Axis(), end + 1
        if any(not _plain(name) for name in inner):
            raise _malformed(text, f"merges ({' '.join(inner)})", "a merged dim lists plain labels: (b s)")
        return (Axis(tuple(inner)) if inner else None), end + 1
    if token == "1":
        return Axis(), at + 1
    if token.endswith(".."):
        return Axis((token[:-2],), many=True), at + 1
    if not _plain(token):
        raise _malformed(
            text, f"has '{token}' where a dim is expected", "'+' begins a term, '?' ends one, _ and # stand alone"
        )
    return Axis((token,)), at + 1


def _plain(token: str) -> bool:
    return token[0].isalpha() and not token.endswith("..")


def _check_labels(rule: Rule, text: str) -> None:
    single: set[str] = set()
    many: set[str] = set()
    for term in rule.inputs + rule.outputs:
        labels = [label for axis in term.axes for label in axis.labels]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise _malformed(text, f"has '{twice[0]}' twice in the term '{term}'", "give the two dims different labels")
        if sum(axis.many for axis in term.axes) > 1:
            raise _malformed(text, f"has two '..' in the term '{term}'", "one open run of dims a term")
        for axis in term.axes:
            (many if axis.many else single).update(axis.labels)
    if both := sorted(single & many):
        raise _malformed(
            text, f"uses '{both[0]}' both as one dim and as '{both[0]}..'", "use another label for one of them"
        )
    inside = {label for term in rule.inputs for axis in term.axes for label in axis.labels}
    outside = {label for term in rule.outputs for axis in term.axes for label in axis.labels}
    for label in rule.mean:
        if label not in inside or label in outside:
            raise _malformed(text, f"averages '{label}'", "'mean' names labels that stand on the input side only")
    for label in sorted(many & outside - inside):
        raise _malformed(
            text, f"makes '{label}..' out of nothing", "an open run of results must stand in an argument too"
        )


def _malformed(text: str, what: str, remedy: str) -> UsageError:
    return UsageError(f"sharding rule '{text.strip()}' {what}: {remedy}")


def fit(rule: Rule, operands: Sequence[tuple[Dim, ...] | None], results: Sequence[tuple[Dim, ...]]) -> Fitted:
    """The rule over these shapes, one per term; ``UsageError`` where the numbers of dims do not agree.

    A dim of size one under ``b..`` carries no label where another operand is larger: it broadcasts.
    """
    if len(operands) != len(rule.inputs) or len(results) != len(rule.outputs):
        raise UsageError(
            f"sharding rule '{rule}' names {len(rule.inputs)} arguments and {len(rule.outputs)} results, "
            f"the call has {len(operands)} and {len(results)}: give a term for each (_ for no tensor, n? where it "
            f"may be None)"
        )
    runs: dict[str, int] = {}
    wide: set[str] = set()
    inputs = [_label(rule, term, shape, runs, wide) for term, shape in zip(rule.inputs, operands, strict=True)]
    for term, shape in zip(rule.outputs, results, strict=True):
        need = sum(runs.get(axis.labels[0], 0) if axis.many else 1 for axis in term.axes)
        if need != len(shape):
            raise UsageError(
                f"sharding rule '{rule}': the result '{term}' has {len(shape)} dims, the rule gives {need}"
            )
    outputs = tuple(tuple(name for name, _ in _spread(term, runs)) for term in rule.outputs)
    whole = frozenset(
        label
        for term in rule.inputs + rule.outputs
        for labels, needed in _spread(term, runs)
        if needed
        for label in labels
    )
    mean = frozenset(name for label in rule.mean for name in _names(label, runs))
    labelled = tuple(
        None
        if dims is None
        else tuple(
            () if shape is not None and shape[i] == 1 and labels and labels[0] in wide else labels
            for i, labels in enumerate(dims)
        )
        for dims, shape in zip(inputs, operands, strict=True)
    )
    return Fitted(labelled, outputs, whole, mean)


def _label(
    rule: Rule, term: Term, shape: tuple[Dim, ...] | None, runs: dict[str, int], wide: set[str]
) -> tuple[tuple[str, ...], ...] | None:
    """Labels of one operand's dims; notes how long each ``b..`` is and which of its dims are larger than one."""
    if shape is None or term.kind != "tensor":
        return None
    open_run = next((axis.labels[0] for axis in term.axes if axis.many), None)
    length = len(shape) - sum(not axis.many for axis in term.axes)
    if length < 0 or (open_run is None and length):
        raise UsageError(f"sharding rule '{rule}': the argument '{term}' has {len(shape)} dims")
    dims = tuple(labels for labels, _ in _spread(term, {} if open_run is None else {open_run: length}))
    if open_run is not None:
        runs[open_run] = max(runs.get(open_run, 0), length)
        mine = {f"{open_run}.{i}" for i in range(length)}
        wide.update(d[0] for d, size in zip(dims, shape, strict=True) if d and d[0] in mine and size != 1)
    return dims


def _spread(term: Term, runs: dict[str, int]) -> list[tuple[tuple[str, ...], bool]]:
    found: list[tuple[tuple[str, ...], bool]] = []
    for axis in term.axes:
        if axis.many:
            found += [((f"{axis.labels[0]}.{i}",), axis.whole) for i in reversed(range(runs.get(axis.labels[0], 0)))]
        else:
            found.append((axis.labels, axis.whole))
    return found


def _names(label: str, runs: dict[str, int]) -> list[str]:
    return [f"{label}.{i}" for i in range(runs[label])] if label in runs else [label]
