"""Rules of ops that look up, put and scatter by index tensors."""

from __future__ import annotations

import re

from partita.graph import Ref, Tensor
from partita.sharding.call import Call, Refusal, Ruling, labels, term, whole
from partita.sharding.early import is_row_count
from partita.sharding.registry import define, rule_for

define("one_hot", "x.. -> x.. [class]")
define("take", "[x..], y.. -> y..")


@rule_for("embedding")
def embedding(call: Call) -> Ruling:
    """Rows of a table; the table's first dim is looked up whole."""
    if call.arg(3, False, name="scale_grad_by_freq"):
        return Refusal("it scales gradients by how often an index occurs in the batch")
    return "[v] d, i.. -> i.. d"


@rule_for("index_select")
def index_select(call: Call) -> Ruling:
    """One dim looked up whole, the list of indices takes its place."""
    names = labels(len(call.shape(0)))
    dim = call.number(1) % max(len(names), 1)
    return f"{whole(names, {dim})}, i -> {term(['i' if d == dim else n for d, n in enumerate(names)])}"


@rule_for("gather take_along_dim")
def gather(call: Call) -> Ruling:
    """All dims but the looked-up one run together."""
    at = 1 if call.op.target.startswith("aten.gather") else 2
    dim = call.arg(at, None, name="dim")
    if not isinstance(dim, int):
        return Refusal("it looks up in all dims at once")
    names = labels(len(call.shape(0)))
    here = dim % max(len(names), 1)
    source = whole(names, {here})
    index = term([f"[{n}x]" if d == here else n for d, n in enumerate(names)])
    return f"{source}, {index} -> {index}"


@rule_for("scatter.src scatter.value scatter.reduce scatter.value_reduce scatter_add scatter_reduce.two")
def scatter(call: Call) -> Ruling:
    """All dims but the one written to run together."""
    names = labels(len(call.shape(0)))
    here = call.number(1) % max(len(names), 1)
    target = whole(names, {here})
    index = term([f"[{n}x]" if d == here else n for d, n in enumerate(names)])
    source = (
        ", " + term([f"[{n}y]" if d == here else n for d, n in enumerate(names)])
        if isinstance(call.arg(3), Ref)
        else ""
    )
    return f"{target}, {index}{source} -> {target}"


@rule_for("index_add index_copy index_fill.int_Scalar")
def index_add(call: Call) -> Ruling:
    """The written dim whole; the source's other dims run along."""
    names = labels(len(call.shape(0)))
    here = call.number(1) % max(len(names), 1)
    target = whole(names, {here})
    if not isinstance(call.arg(3), Ref):
        return f"{target}, [i] -> {target}"
    source = term(["[i]" if d == here else n for d, n in enumerate(names)])
    return f"{target}, [i], {source} -> {target}"


@rule_for("masked_scatter masked_select nonzero")
def by_mask(call: Call) -> Ruling:
    """How many elements are taken depends on the data."""
    return Refusal("how many elements it takes depends on the values")


@rule_for("index.Tensor _unsafe_index.Tensor")
def index(call: Call) -> Ruling:
    """Looked-up dims whole, the others as they are, the indices' common shape where NumPy puts it."""
    plan = _indexing(call)
    if isinstance(plan, Refusal):
        return plan
    source, indices, result = plan
    return f"{', '.join([source, *indices])} -> {result}"


@rule_for("index_put")
def index_put(call: Call) -> Ruling:
    """The values are laid out as looking up would lay them out."""
    plan = _indexing(call)
    if isinstance(plan, Refusal):
        return plan
    source, indices, result = plan
    value = call.tensor(2)
    names = result.split() if result != "()" else []
    if value is None or len(value.shape) > len(names):
        return Refusal("its values have an unusual shape")
    kept = names[len(names) - len(value.shape) :]
    written = term([n if size != 1 else "1" for n, size in zip(kept, value.shape, strict=True)])
    text = f"{', '.join([source, *indices, written])} -> {source}"
    lost = sorted(set(re.findall(r"\bi\d+\b", text)) - set(source.split()))  # many may write one place: not a sum
    return re.sub(rf"\b({'|'.join(lost)})\b", r"[\1]", text) if lost else text


def _indexing(call: Call) -> tuple[str, list[str], str] | Refusal:
    """Terms of source, of each index and of the result."""
    shape, listed = call.shape(0), call.arg(1)
    given: list[Tensor | None] = [
        call.graph.tensor(item.name) if isinstance(item, Ref) else None
        for item in (listed if isinstance(listed, tuple) else ())
    ]
    if any(t is not None and t.dtype in ("bool", "uint8") for t in given):
        return Refusal("it selects by a mask: how many elements it takes depends on the values")
    names = labels(len(shape))
    places = [i for i, t in enumerate(given) if t is not None]
    used = [t for t in given if t is not None]
    if not used:
        return Refusal("it has no index")
    rank = max(len(t.shape) for t in used)
    common = labels(rank, start="i")
    wide = [any(len(t.shape) >= rank - i and t.shape[len(t.shape) - rank + i] != 1 for t in used) for i in range(rank)]
    rows = [t for t in used if _counts_rows(call, t)]
    if len(rows) > 1 or any(sum(size != 1 for size in t.shape) != 1 for t in rows):
        return Refusal("it takes rows by number in an unusual way")
    terms, dims = [], set(places)
    for place, tensor in zip(places, used, strict=True):
        start = rank - len(tensor.shape)
        said = ["1" if size == 1 and wide[start + i] else common[start + i] for i, size in enumerate(tensor.shape)]
        if tensor in rows:
            batch = next(i for i, size in enumerate(tensor.shape) if size != 1)
            if shape[place] != tensor.shape[batch]:
                return Refusal("it takes rows by number from a tensor that does not follow the batch")
            names[place] = common[start + batch]
            dims.discard(place)
        terms.append(term(said))
    together = places == list(range(places[0], places[-1] + 1))
    rest = [n for i, n in enumerate(names) if i not in places]
    before = [n for i, n in enumerate(names) if i not in places and i < places[0]] if together else []
    result = before + common + rest[len(before) :]
    return whole(names, dims), terms, term(result)


def _counts_rows(call: Call, tensor: Tensor) -> bool:
    """Whether the index is ``arange(batch)``, counted in every microbatch: it takes each sample's own row."""
    at = call.graph.producer(tensor.name)
    while at is not None:
        op = call.graph.ops[at]
        if op.name not in call.local:
            return False
        if is_row_count(op):
            return True
        source = op.args[0]
        at = call.graph.producer(source.name) if isinstance(source, Ref) else None
    return False
