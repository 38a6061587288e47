"""Rules of matrix products and convolutions."""

from __future__ import annotations

import re

from partita.graph import Ref, Size
from partita.sharding.call import Call, Refusal, Ruled, Ruling, labels, term
from partita.sharding.registry import define, rule_for

define("linear", "b.. k, n k, +n? -> b.. n")
define("mm", "m k, k n -> m n ; bilinear")
define("bmm", "b m k, b k n -> b m n ; bilinear")
define("mv", "m k, k -> m ; bilinear")
define("dot vdot", "k, k -> () ; bilinear")
define("inner.default", "k, k -> () ; bilinear")
define("outer ger", "m, n -> m n ; bilinear")
define("cdist", "b.. p [m], b.. r [m] -> b.. p r")
define("bilinear", "b.. i, b.. j, o i j, +o? -> b.. o")


@rule_for("matmul")
def matmul(call: Call) -> Ruling:
    """As NumPy's: vectors lose their dim, leading dims broadcast."""
    a, b = len(call.shape(0)), len(call.shape(1))
    left = "k" if a == 1 else "m k" if a == 2 else "b.. m k"
    right = "k" if b == 1 else "k n" if b == 2 else "b.. k n"
    out = ("b.. " if max(a, b) > 2 else "") + ("m " if a > 1 else "") + ("n" if b > 1 else "")
    return f"{left}, {right} -> {out.strip() or '()'} ; bilinear"


@rule_for("addmm addmv addr baddbmm addbmm")
def add_product(call: Call) -> Ruling:
    """``input + product``; the input broadcasts."""
    kind = call.op.target.split(".")[1].rstrip("_")
    left, right, out = {
        "addmm": ("m k", "k n", "m n"),
        "addmv": ("m k", "k", "m"),
        "addr": ("m", "n", "m n"),
        "baddbmm": ("b m k", "b k n", "b m n"),
        "addbmm": ("b m k", "b k n", "m n"),
    }[kind]
    names, shape, full = out.split(), call.shape(0), call.out()
    kept = names[len(names) - len(shape) :]
    added = " ".join(
        "1" if size == 1 and full[len(full) - len(shape) + i] != 1 else name
        for i, (name, size) in enumerate(zip(kept, shape, strict=True))
    )
    return f"+{added or '()'}, {left}, {right} -> {out}"


@rule_for("einsum")
def einsum(call: Call) -> Ruling:
    """The equation is the rule."""
    equation = call.arg(0)
    if not isinstance(equation, str):
        return Refusal("its equation is not known")
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        counts = {c: left.count(c) for c in sorted(left) if c.isalpha()}
        right = ("..." if "..." in left else "") + "".join(c for c, n in counts.items() if n == 1)
    if any(len(set(re.sub(r"\.", "", t))) != len(re.sub(r"\.", "", t)) for t in [*terms, right]):
        return Refusal("its equation takes a diagonal")
    operands = call.operands()
    said = [_spell(t) for t in terms]
    for i, (text, tensor) in enumerate(zip(terms, operands, strict=True)):
        said[i] = _ones(text, said[i], tensor.shape, terms, [o.shape for o in operands])
    return f"{', '.join(said)} -> {_spell(right)} ; bilinear"


def _spell(text: str) -> str:
    return " ".join("run.." if c == "." else f"l{c}" for c in text.replace("...", ".")) or "()"


def _ones(
    text: str,
    said: str,
    shape: tuple[int | Size, ...],
    terms: list[str],
    shapes: list[tuple[int | Size, ...]],
) -> str:
    """A dim of size one broadcasts against a larger one of the same letter."""
    if "..." in text or any("..." in t for t in terms):
        return said
    words = said.split()
    for i, letter in enumerate(text):
        others = [s[t.index(letter)] for t, s in zip(terms, shapes, strict=True) if letter in t]
        if shape[i] == 1 and any(size != 1 for size in others):
            words[i] = "1"
    return " ".join(words) or "()"


_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}


@rule_for([*_CONVOLUTIONS, *_TRANSPOSED, "convolution", "_convolution"])
def convolution(call: Call) -> Ruling:
    """Batch and channels; groups are an outer part of the channels, whatever number they are."""
    kind = call.op.target.split(".")[1]
    spatial = _CONVOLUTIONS.get(kind) or _TRANSPOSED.get(kind) or len(call.shape(1)) - 2
    if kind in ("convolution", "_convolution"):
        transposed, groups = bool(call.number(6, name="transposed")), call.arg(8, 1, name="groups")
    elif kind in _CONVOLUTIONS:
        transposed, groups = False, call.arg(6, 1, name="groups")
    else:
        transposed, groups = True, call.arg(6, 1, name="groups")
    batched = len(call.shape(0)) == spatial + 2
    if not batched and len(call.shape(0)) != spatial + 1:
        return Refusal("its input has an unusual number of dims")
    space = " ".join(f"[s{i}]" for i in range(spatial))
    kernel = " ".join(f"[k{i}]" for i in range(spatial))
    out = " ".join(f"[o{i}]" for i in range(spatial))
    before = "b " if batched else ""
    bias = ", +co" if isinstance(call.arg(2, None, name="bias"), Ref) else ""
    if groups == 1:
        weight = "ci co" if transposed else "co ci"
        text = f"{before}ci {space}, {weight} {kernel}{bias} -> {before}co {out}"
        return text + ("" if bias else " ; bilinear")
    weight = "(g ci) [co]" if transposed else "(g co) [ci]"
    bias = ", +(g co)" if bias else ""
    return Ruled(f"{before}(g ci) {space}, {weight} {kernel}{bias} -> {before}(g co) {out}")


@rule_for("tensordot")
def tensordot(call: Call) -> Ruling:
    """Sums over the listed dims of both, keeps the others in order."""
    a, b = len(call.shape(0)), len(call.shape(1))
    first = [d % a for d in call.numbers(2) if isinstance(d, int)]
    second = [d % b for d in call.numbers(3) if isinstance(d, int)]
    left, right = labels(a, start="a"), labels(b, start="b")
    for i, j in zip(first, second, strict=True):
        right[j] = left[i]
    kept = [n for i, n in enumerate(left) if i not in first] + [n for j, n in enumerate(right) if j not in second]
    return f"{term(left)}, {term(right)} -> {term(kept)} ; bilinear"
