"""Rules of ops that move elements inside dims, which are then whole: diagonals, flips, windows, padding, shuffles."""

from __future__ import annotations

from partita.graph import Ref, Size
from partita.sharding.call import Call, Refusal, Ruling, dims_of, labels, term, whole
from partita.sharding.registry import define, rule_for


@rule_for("diagonal diagonal_copy")
def diagonal(call: Call) -> Ruling:
    """Two dims become one, at the end."""
    names = labels(len(call.shape(0)))
    dims = {call.number(2, 0, name="dim1") % len(names), call.number(3, 1, name="dim2") % len(names)}
    return f"{whole(names, dims)} -> {term([n for i, n in enumerate(names) if i not in dims] + ['[diagonal]'])}"


@rule_for("diag_embed")
def diag_embed(call: Call) -> Ruling:
    """The last dim becomes two."""
    count = len(call.out())
    names = labels(count - 2)
    dims = sorted({call.number(2, -2, name="dim1") % count, call.number(3, -1, name="dim2") % count})
    after = list(names)
    for d in dims:
        after.insert(d, f"[e{d}]")
    return f"{term([*names, '[last]'])} -> {term(after)}"


@rule_for("flip roll rot90 fliplr flipud")
def moved(call: Call) -> Ruling:
    """The moved dims whole."""
    kind = call.op.target.split(".")[1]
    names = labels(len(call.shape(0)))
    listed = call.numbers({"roll": 2, "rot90": 2}.get(kind, 1), name="dims")
    if kind == "rot90":
        listed = listed or (0, 1)
        if any(d == s for d in dims_of(listed, len(names)) for s in _batch_dims(call)):
            return Refusal("it turns the batch")
        a, b = sorted(dims_of(listed, len(names)))
        after = [f"[{n}x]" if i in (a, b) else n for i, n in enumerate(names)]
        return f"{whole(names, {a, b})} -> {term(after)}"
    if kind in ("fliplr", "flipud"):
        listed = (1,) if kind == "fliplr" else (0,)
    dims = dims_of(listed, len(names)) if listed else set(range(len(names)))
    return f"{whole(names, dims)} -> {whole(names, dims)}"


def _batch_dims(call: Call) -> list[int]:
    return [i for i, d in enumerate(call.shape(0)) if isinstance(d, Size)]


@rule_for("unfold")
def unfold(call: Call) -> Ruling:
    """Windows along one dim, their contents in a new last one."""
    names = labels(len(call.shape(0)))
    dim = call.number(1) % len(names)
    after = [f"[{n}x]" if i == dim else n for i, n in enumerate(names)]
    return f"{whole(names, {dim})} -> {term([*after, '[window]'])}"


@rule_for("constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d "
          "replication_pad1d replication_pad2d replication_pad3d")  # fmt: skip
def pad(call: Call) -> Ruling:
    """Padded dims whole; the list runs from the last dim in pairs."""
    names = labels(len(call.shape(0)))
    amounts = call.numbers(1, name="pad")
    dims = {len(names) - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
    after = [f"[{n}x]" if i in dims else n for i, n in enumerate(names)]
    return f"{whole(names, dims)} -> {term(after)}"


@rule_for("tril triu")
def triangle(call: Call) -> Ruling:
    """The last two dims whole."""
    names = labels(len(call.shape(0)))
    dims = {len(names) - 2, len(names) - 1}
    return f"{whole(names, dims)} -> {whole(names, dims)} ; linear"


define("pixel_shuffle pixel_unshuffle", "x.. [c] [h] [w] -> x.. [d] [i] [j]")
define("im2col", "x.. [c] [h] [w] -> x.. [k] [l]")
define("col2im", "x.. [k] [l] -> x.. [c] [h] [w]")


@rule_for("channel_shuffle native_channel_shuffle")
def channel_shuffle(call: Call) -> Ruling:
    """Channels (dim 1) whole."""
    names = labels(len(call.shape(0)))
    return f"{whole(names, {1})} -> {whole(names, {1})}"


@rule_for("cross linalg_cross")
def cross(call: Call) -> Ruling:
    """One dim of three elements whole."""
    names = labels(len(call.shape(0)))
    default = None if call.op.target.startswith("aten.cross") else -1
    dim = call.arg(2, default, name="dim")
    if not isinstance(dim, int) or call.shape(0) != call.shape(1) or not isinstance(call.arg(1), Ref):
        return Refusal("its dim or its broadcasting is not said")
    side = whole(names, {dim % len(names)})
    return f"{side}, {side} -> {side}"
