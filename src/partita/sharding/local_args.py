"""Local calls: an op's arguments on one member: sizes of its own rows, no bias before a sum, its part of a table.

view(x, (b, s, 3, 12, 64))   heads divided by two    ->   view(x, (b, s, 3, 6, 64))
linear(x, w, bias)           inputs divided          ->   linear(x, w) ─ all_reduce or reduce_scatter ─ add(bias)
"""

from __future__ import annotations

from dataclasses import replace

from partita.graph import Arg, Dim, Graph, Op, Ref, Size, Tensor
from partita.sharding.call import Call
from partita.sharding.options import Option
from partita.sharding.placements import Placement, Shard, local_shape
from partita.sharding.reading import short
from partita.sharding.registry import find

Shape = tuple[Dim, ...]
Steps = tuple[tuple[Op, ...], tuple[Tensor, ...]]

_RESULT_SIZES = {
    "view": 1, "reshape": 1, "_unsafe_view": 1, "view_copy": 1, "expand": 1, "expand_copy": 1, "broadcast_to": 1,
    "new_zeros": 1, "new_ones": 1, "new_full": 1, "new_empty": 1, "zeros": 0, "ones": 0, "full": 0, "empty": 0,
}  # fmt: skip


def local_call(
    graph: Graph, whole: Op, op: Op, option: Option, inputs: list[Shape], outputs: list[Shape], rank: int
) -> Steps:
    """What a member runs for ``whole``. ``op``: with its operands renamed; ``inputs``, ``outputs``: local shapes."""
    op = _sized(graph, whole, op, option, inputs, outputs, rank)
    if option.way == "table":
        return (_table(op, option, rank),), ()
    if option.way == "loss":
        return (_loss(op, option, rank),), ()
    if option.way == "mean":
        return _mean(graph, whole, op, option, rank)
    if option.way == "summed":
        return _summed(graph, whole, op, option.outputs[0], rank)
    return (op,), ()


def _sized(graph: Graph, whole: Op, op: Op, option: Option, inputs: list[Shape], outputs: list[Shape], rank: int) -> Op:
    kind, args = short(op.target), list(op.args)
    if kind == "_reshape_alias":  # its strides are those of the whole
        op, kind, args = replace(op, target="aten.reshape.default"), "reshape", args[:2]
    call = Call(whole, graph)
    out = outputs[0] if outputs else ()
    if kind in _RESULT_SIZES and len(args) > _RESULT_SIZES[kind]:
        args[_RESULT_SIZES[kind]] = out
    elif kind == "unflatten":
        dim = call.number(1, name="dim") % max(len(inputs[0]), 1)
        given = args[2] if len(args) > 2 else ()
        args[2] = out[dim : dim + (len(given) if isinstance(given, tuple) else 0)]
    elif kind in ("repeat", "tile"):
        args[1] = _times(call, args[1], inputs[0], out)
    elif kind == "repeat_interleave" and isinstance(args[1], int) and inputs[0]:
        dim = call.number(2, name="dim") % len(inputs[0])
        args[1] = _ratio(out[dim], inputs[0][dim]) or args[1]
        op = replace(op, kwargs=tuple((k, out[dim] if k == "output_size" else v) for k, v in op.kwargs))
    elif kind in ("split", "unsafe_split") and isinstance(args[1], int):
        args[1] = _along(call, outputs, 0)
    elif kind in ("split", "split_with_sizes", "unsafe_split_with_sizes") and isinstance(args[1], tuple):
        args[1] = tuple(
            _along(call, outputs, i) if s else size for i, (s, size) in enumerate(zip(outputs, args[1], strict=False))
        )
    elif kind == "chunk" and option.label.startswith("dim "):
        op = replace(op, target="aten.split_with_sizes.default")
        dim = call.number(2, name="dim") % len(inputs[0])
        args = [args[0], tuple(_along(call, outputs, i) for i in range(len(outputs))), dim]
        op = replace(op, kwargs=())
    elif kind == "affine_grid_generator" and isinstance(args[1], tuple):
        args[1] = (out[0], *args[1][1:])
    elif kind == "narrow" and len(args) > 3:
        args[3] = out[call.number(1) % len(out)]
    elif kind == "slice" and len(args) > 3 and isinstance(args[3], int | Size):
        dim = call.number(1, name="dim") % len(out)
        args[3] = inputs[0][dim] if args[3] == call.shape(0)[dim] else args[3]
    elif kind == "group_norm" and option.cut is not None and option.label == "g":
        args[1] = option.cut.mine(rank)
    elif kind.startswith("conv") and option.cut is not None and option.label == "g":
        at = 8 if kind == "convolution" else 6
        args[at] = option.cut.mine(rank)
    elif kind == "squeeze" and option.way in ("plain", "passed"):
        answer = find(whole.target)
        said = answer(call) if callable(answer) else None
        rewrite = getattr(said, "rewrite", None)
        if rewrite is not None:
            op, args = replace(op, target=rewrite.target_op, kwargs=()), [args[0], *rewrite.args[1:]]
    return replace(op, args=tuple(args))


def _ratio(out: Dim, inner: Dim) -> int:
    """How many rows there are for one; 0 where it is not told."""
    if isinstance(out, Size) and isinstance(inner, Size):
        return out.per_sample // inner.per_sample if inner.per_sample else 0
    return out // inner if isinstance(out, int) and isinstance(inner, int) and inner else 0


def _along(call: Call, outputs: list[Shape], index: int) -> Dim:
    shape = outputs[index]
    return shape[call.number(2, name="dim") % len(shape)]


def _times(call: Call, given: Arg, inner: Shape, out: Shape) -> Arg:
    """How often each dim is repeated, where a member repeats less often."""
    if not isinstance(given, tuple):
        return given
    whole_in, whole_out = call.shape(0), call.out()
    shift = len(given) - len(inner)
    found: list[Arg] = []
    for i, times in enumerate(given):
        same = out[i] == whole_out[i] or (i >= shift and inner[i - shift] != whole_in[i - shift])
        mine, old = out[i], inner[i - shift] if i >= shift else 1
        found.append(times if same or not isinstance(mine, int) or not isinstance(old, int) else mine // max(old, 1))
    return tuple(found)


def _table(op: Op, option: Option, rank: int) -> Op:
    assert isinstance(option.inputs[0], Shard)
    mine = option.inputs[0].cut.rounds[0]
    start = sum(mine[:rank])
    padding = op.args[2] if len(op.args) > 2 and isinstance(op.args[2], int) else -1
    return replace(op, target="partita.table_rows", args=(*op.args[:2], start, mine[rank], padding), kwargs=())


def _loss(op: Op, option: Option, rank: int) -> Op:
    """Arguments as those of ``aten.cross_entropy_loss``, so that what is said of its reduction holds."""
    assert isinstance(option.inputs[0], Shard)
    mine = option.inputs[0].cut.rounds[0]
    defaults: tuple[Arg, ...] = (None, None, None, 1, -100, 0.0)
    by_name = dict(op.kwargs)
    names = ("self", "target", "weight", "reduction", "ignore_index", "label_smoothing")
    given = tuple(op.args[i] if i < len(op.args) else by_name.get(name, defaults[i]) for i, name in enumerate(names))
    numbers = (("start", sum(mine[:rank])), ("classes", sum(mine)))
    return replace(op, target="partita.divided_cross_entropy", args=given, kwargs=numbers)


def _mean(graph: Graph, whole: Op, op: Op, option: Option, rank: int) -> Steps:
    """A mean of own rows counts as much as there are of them."""
    result = op.outputs[0]
    own = replace(graph.tensor(whole.outputs[0]), name=f"{result}@mean", base="")
    weigh = _extra(op, "mul.Tensor", (Ref(own.name), option.share(rank)), result)
    return (replace(op, outputs=(own.name,)), weigh), (own,)


def adding_up(wanted: Placement) -> tuple[str, tuple[Arg, ...]]:
    """The collective that makes the sum of what members have, and what it is told: all of it, or each one's rows."""
    return ("reduce_scatter", (wanted.dim, wanted.cut.rounds)) if isinstance(wanted, Shard) else ("all_reduce", ())


def _summed(graph: Graph, whole: Op, op: Op, wanted: Placement, rank: int) -> Steps:
    """A product over divided rows: added up, all of it or this member's rows, then the bias."""
    kind, result = short(op.target), op.outputs[0]
    if kind == "addmm":
        bias, product = op.args[0], replace(op, target="aten.mm.default", args=op.args[1:])
    else:
        bias, product = op.args[2], replace(op, args=(*op.args[:2], None, *op.args[3:]))
    assert isinstance(bias, Ref)
    tensor = graph.tensor(whole.outputs[0])
    own, total = (replace(tensor, name=f"{result}@{what}", base="") for what in ("product", "sum"))
    total = replace(total, shape=local_shape(tensor.shape, wanted, rank))
    how, which = adding_up(wanted)
    steps = [replace(product, outputs=(own.name,)), _extra(op, how, (Ref(own.name), *which), total.name)]
    tensors = [own, total]
    if kind.startswith("conv"):  # the bias is one number a channel, dim 1
        held = graph.tensor(bias.name)
        shape = (*held.shape, *(1 for _ in tensor.shape[2:]))
        shaped = replace(held, name=f"{result}@bias", shape=shape, role="op", path="", base=bias.name)
        steps.append(_extra(op, "view.default", (bias, shape), shaped.name))
        tensors.append(shaped)
        bias = Ref(shaped.name)
    steps.append(_extra(op, "add.Tensor", (Ref(total.name), bias), result))
    return tuple(steps), tuple(tensors)


def _extra(op: Op, kind: str, args: tuple[Arg, ...], result: str) -> Op:
    target = f"aten.{kind}" if "." in kind else f"partita.{kind}"
    return Op(f"{op.name}+{result}", target, args, (), (result,), op.module, op.source, op.grad)
