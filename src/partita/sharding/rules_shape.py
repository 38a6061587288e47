"""Rules of ops that move, merge, part, repeat and join dims without touching the elements."""

from __future__ import annotations

from partita.graph import Dim, Size
from partita.sharding.call import Call, Refusal, Rewrite, Ruled, Ruling, dims_of, labels, term, whole
from partita.sharding.registry import define, rule_for

_BATCH = 1_000_003  # a prime no dim contains: with it for the batch, equal products mean equal sizes at every batch


def _number(dim: Dim) -> int:
    return dim.at(_BATCH) if isinstance(dim, Size) else dim


@rule_for("view.default reshape _unsafe_view _reshape_alias view_copy.default flatten unflatten.int view_as reshape_as")
def view(call: Call) -> Ruling:
    """Runs of dims with equal products; in a run the outermost dim of both sides is the same dim, cut by rows."""
    before, after = call.shape(0), call.out()
    text = merge(before, after)
    if text is None:
        return Refusal("its sizes do not pair up")
    if call.op.target.split(".")[1] in ("view_as", "reshape_as"):
        left, right = text.split(" -> ")
        return f"{left}, {right} -> {right}"
    return f"{text} ; linear"


def merge(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> str | None:
    """The rule of a reshape from one shape to another, or None where their sizes do not pair up."""
    a, b = [_number(d) for d in before], [_number(d) for d in after]
    if any(n <= 0 for n in a + b):
        return None
    left, right = ["1"] * len(a), ["1"] * len(b)
    i = j = run = 0
    while i < len(a) or j < len(b):
        mine, theirs = [i] if i < len(a) else [], [j] if j < len(b) else []
        if mine and a[i] == 1:
            i += 1
            continue
        if theirs and b[j] == 1:
            j += 1
            continue
        if not mine or not theirs:
            return None
        first, second = a[i], b[j]
        while first != second:
            if first < second:
                if mine[-1] + 1 >= len(a):
                    return None
                mine.append(mine[-1] + 1)
                first *= a[mine[-1]]
            else:
                if theirs[-1] + 1 >= len(b):
                    return None
                theirs.append(theirs[-1] + 1)
                second *= b[theirs[-1]]
        _name_run(left, right, a, b, mine, theirs, f"r{run}")
        run += 1
        i, j = mine[-1] + 1, theirs[-1] + 1
    return f"{term(left)} -> {term(right)}"


def _name_run(
    left: list[str], right: list[str], a: list[int], b: list[int], mine: list[int], theirs: list[int], name: str
) -> None:
    """One run: one dim against several is their merger; several against several share the outermost rows only."""
    mine, theirs = [i for i in mine if a[i] != 1], [j for j in theirs if b[j] != 1]
    if len(mine) == 1 or len(theirs) == 1:
        one, several = ((left, mine), (right, theirs)) if len(mine) == 1 else ((right, theirs), (left, mine))
        parts = [name if n == 0 else f"{name}i{n}" for n in range(len(several[1]))]
        one[0][one[1][0]] = f"({' '.join(parts)})" if len(parts) > 1 else name
        for place, part in zip(several[1], parts, strict=True):
            several[0][place] = part
        return
    for side, places, mark in ((left, mine, "i"), (right, theirs, "o")):
        for n, place in enumerate(places):
            side[place] = name if n == 0 else f"[{name}{mark}{n}]"


@rule_for("permute permute_copy")
def permute(call: Call) -> Ruling:
    """Dims in another order."""
    names = labels(len(call.shape(0)))
    order = [int(d) % len(names) for d in call.numbers(1, name="dims") if isinstance(d, int)]
    return f"{term(names)} -> {term([names[d] for d in order])} ; linear"


@rule_for("transpose.int swapaxes swapdims transpose_copy.int t t_copy numpy_T mT mH adjoint matrix_H")
def transpose(call: Call) -> Ruling:
    """Two dims change places."""
    names = labels(len(call.shape(0)))
    kind = call.op.target.split(".")[1].rstrip("_")
    if kind == "numpy_T":
        return f"{term(names)} -> {term(names[::-1])} ; linear"
    if len(names) < 2:
        return f"{term(names)} -> {term(names)} ; linear"
    one, two = (
        (-2, -1) if kind in ("t", "t_copy", "mT", "mH", "adjoint", "matrix_H") else (call.number(1), call.number(2))
    )
    after = list(names)
    one, two = one % len(names), two % len(names)
    after[one], after[two] = after[two], after[one]
    return f"{term(names)} -> {term(after)} ; linear"


@rule_for("movedim.intlist movedim.int moveaxis.intlist moveaxis.int")
def movedim(call: Call) -> Ruling:
    """Some dims go to given places, the others fill up in order."""
    names = labels(len(call.shape(0)))
    count = len(names)
    source = [int(d) % count for d in call.numbers(1) if isinstance(d, int)]
    target = [int(d) % count for d in call.numbers(2) if isinstance(d, int)]
    after: list[str] = [""] * count
    for a, b in zip(source, target, strict=True):
        after[b] = names[a]
    rest = iter(n for i, n in enumerate(names) if i not in source)
    return f"{term(names)} -> {term([n or next(rest) for n in after])} ; linear"


@rule_for("unsqueeze unsqueeze_copy")
def unsqueeze(call: Call) -> Ruling:
    """A new dim of size one."""
    names = labels(len(call.shape(0)))
    after = list(names)
    after.insert(call.number(1) % (len(names) + 1), "1")
    return f"{term(names)} -> {term(after)} ; linear"


@rule_for("squeeze.default squeeze.dim squeeze.dims squeeze_copy.dim")
def squeeze(call: Call) -> Ruling:
    """Takes dims of size one away; which ones is settled by the whole batch, also where a part holds one sample."""
    shape = call.shape(0)
    names = labels(len(shape))
    listed = range(len(names)) if call.op.target.endswith("default") else dims_of(call.numbers(1), len(names))
    gone = [d for d in listed if shape[d] == 1]
    spoken = [n if d not in gone else "1" for d, n in enumerate(names)]
    text = f"{term(spoken)} -> {term([n for d, n in enumerate(names) if d not in gone])} ; linear"
    if set(gone) == set(listed):
        return text
    if call.op.target.split(".")[1].endswith("_"):
        return Refusal("it takes away in place whatever dim is of size one, also the batch where one sample is left")
    source = call.op.args[0]
    return Ruled(text, Rewrite("call", target_op="aten.squeeze.dims", args=(source, tuple(gone))))


@rule_for("expand broadcast_to expand_copy")
def expand(call: Call) -> Ruling:
    """Dims of size one, and new ones in front, are repeated: any part of them can be made alone."""
    before, after = call.shape(0), call.out()
    names = labels(len(after))
    old = names[len(after) - len(before) :]
    pairs = zip(old, before, after[len(after) - len(before) :], strict=True)
    return f"{term(['1' if a == 1 and b != 1 else n for n, a, b in pairs])} -> {term(names)} ; linear"


@rule_for("repeat tile")
def repeat(call: Call) -> Ruling:
    """Copies stand outside the dim they repeat."""
    shape = call.shape(0)
    given_times = list(call.numbers(1, name="repeats"))
    times: list[Dim] = [*[1] * (len(call.out()) - len(given_times)), *given_times]
    old: list[Dim] = [*[1] * (len(times) - len(shape)), *shape]
    left, right = [], []
    for i, (size, count) in enumerate(zip(old, times, strict=True)):
        both = size != 1 and count != 1
        left.append(f"d{i}" if size != 1 or count == 1 else "1")
        right.append(f"(r{i} d{i})" if both else f"d{i}")
    spoken = left[len(times) - len(shape) :]
    given = [n for n in left[: len(times) - len(shape)] if n != "1"]
    after = " ".join("1" if n in given else n for n in right) or "()"
    return f"{term(spoken)} -> {after} ; linear"


@rule_for("repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Ruling:
    """Copies stand inside the dim they repeat."""
    names, shape = labels(len(call.shape(0))), call.shape(0)
    dim = call.arg(2, None, name="dim")
    count = call.arg(1)
    if not isinstance(dim, int) or not isinstance(count, int):
        return (
            Refusal("it repeats a number of times that follows the batch")
            if isinstance(dim, int)
            else (f"{whole(names, set(range(len(names))))} -> [r]")
        )
    at = dim % len(names)
    if shape[at] == 1:
        names[at] = "1"
        return f"{term(names)} -> {term(['[r]' if i == at else n for i, n in enumerate(names)])}"
    return f"{term(names)} -> {term([f'({n} r)' if i == at else n for i, n in enumerate(names)])} ; linear"


@rule_for("cat concat concatenate")
def cat(call: Call) -> Ruling:
    """Joined along one dim, which must stay whole."""
    tensors = call.operands()
    count = len(call.out())
    empty = [len(t.shape) == 1 != count and t.shape[0] == 0 for t in tensors]  # torch lets those pass for nothing
    if any(len(t.shape) != count and not none for t, none in zip(tensors, empty, strict=True)):
        return Refusal("it joins tensors of different numbers of dims")
    dim = call.number(1, name="dim") % max(count, 1)
    names = labels(count)
    sides = [
        f"[none{i}]" if none else term([f"[{n}x{i}]" if d == dim else n for d, n in enumerate(names)])
        for i, none in enumerate(empty)
    ]
    return f"{', '.join(sides)} -> {whole(names, {dim})} ; linear"


@rule_for("stack")
def stack(call: Call) -> Ruling:
    """Joined along a new dim."""
    tensors = call.operands()
    names = labels(len(call.out()) - 1)
    after = list(names)
    after.insert(call.number(1, name="dim") % len(call.out()), "[new]")
    return f"{', '.join([term(names)] * len(tensors))} -> {term(after)} ; linear"


@rule_for("split.Tensor split.sizes split_with_sizes chunk unsafe_split.Tensor unsafe_chunk unsafe_split_with_sizes "
          "tensor_split.sections tensor_split.indices")  # fmt: skip
def split(call: Call) -> Ruling:
    """Cut along one dim, which must be there whole."""
    names = labels(len(call.shape(0)))
    dims = {call.number(2, name="dim") % len(names)}
    return f"{whole(names, dims)} -> {', '.join([whole(names, dims)] * len(call.op.outputs))} ; linear"


@rule_for("unbind.int unbind_copy.int")
def unbind(call: Call) -> Ruling:
    """Cut along one dim, which goes away."""
    names = labels(len(call.shape(0)))
    dim = call.number(1, name="dim") % len(names)
    rest = term([n for i, n in enumerate(names) if i != dim])
    return f"{whole(names, {dim})} -> {', '.join([rest] * len(call.op.outputs))} ; linear"


@rule_for("slice.Tensor slice_copy.Tensor")
def slices(call: Call) -> Ruling:
    """One dim whole, unless all of it is taken."""
    names = labels(len(call.shape(0)))
    dim = call.number(1, name="dim") % len(names)
    start, end = call.arg(2, None, name="start"), call.arg(3, None, name="end")
    step = call.number(4, 1, name="step")
    size = call.shape(0)[dim]
    far = end is None or end == size or (isinstance(end, int) and end >= 1 << 31)
    if start in (None, 0) and far and step == 1:
        return f"{term(names)} -> {term(names)} ; linear"
    after = [f"[{n}x]" if i == dim else n for i, n in enumerate(names)]
    return f"{whole(names, {dim})} -> {term(after)} ; linear"


@rule_for("narrow narrow_copy")
def narrow(call: Call) -> Ruling:
    """As a slice."""
    names = labels(len(call.shape(0)))
    dim = call.number(1) % len(names)
    if call.arg(2) == 0 and call.arg(3) == call.shape(0)[dim]:
        return f"{term(names)} -> {term(names)} ; linear"
    after = [f"[{n}x]" if i == dim else n for i, n in enumerate(names)]
    return f"{whole(names, {dim})} -> {term(after)} ; linear"


@rule_for("select.int select_copy.int")
def select(call: Call) -> Ruling:
    """One index of one dim."""
    names = labels(len(call.shape(0)))
    dim = call.number(1, name="dim") % len(names)
    return f"{whole(names, {dim})} -> {term([n for i, n in enumerate(names) if i != dim])} ; linear"


@rule_for("slice_scatter select_scatter diagonal_scatter")
def scatter_back(call: Call) -> Ruling:
    """A copy with a slice replaced."""
    names = labels(len(call.shape(0)))
    if call.op.target.startswith("aten.diagonal"):
        return Refusal("it writes a diagonal")
    dim = call.number(2, name="dim") % len(names)
    if call.op.target.startswith("aten.select"):
        part = term([n for i, n in enumerate(names) if i != dim])
    else:
        part = term([f"[{n}x]" if i == dim else n for i, n in enumerate(names)])
    return f"{whole(names, {dim})}, {part} -> {whole(names, {dim})}"


@rule_for("meshgrid meshgrid.indexing")
def meshgrid(call: Call) -> Ruling:
    """Every vector gets a dim of its own."""
    tensors = call.operands()
    names = labels(len(tensors))
    order = list(names)
    if call.arg(1, "ij", name="indexing") == "xy" and len(names) > 1:
        order[0], order[1] = order[1], order[0]
    return f"{', '.join(names)} -> {', '.join([term(order)] * len(tensors))}"


@rule_for("broadcast_tensors")
def broadcast_tensors(call: Call) -> Ruling:
    """All to their common shape."""
    count = len(call.operands())
    return f"{', '.join(['x..'] * count)} -> {', '.join(['x..'] * count)}"


@rule_for("atleast_1d.default atleast_2d.default atleast_3d.default ravel")
def reshaped(call: Call) -> Ruling:
    """As a view."""
    text = merge(call.shape(0), call.out())
    return Refusal("its sizes do not pair up") if text is None else text


define("view_as_complex view_as_complex_copy", "x.. [c] -> x.. ; linear")
define("view_as_real view_as_real_copy", "x.. -> x.. [c] ; linear")
