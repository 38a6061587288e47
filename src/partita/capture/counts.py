"""Floating-point operations of an op from its shapes: 2 per multiply-add, 1 per element elsewhere, 0 for views."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from partita.capture.records import Call, packet
from partita.graph import Ref

Shape = tuple[int, ...]
ShapeOf = Callable[[str], Shape]

_FREE = {
    "view", "reshape", "permute", "transpose", "t", "expand", "expand_as", "slice", "select", "split", "chunk",
    "unbind",
    "squeeze", "unsqueeze", "flatten", "unflatten", "detach", "alias", "as_strided", "empty", "empty_like", "narrow",
    "numpy_T", "view_as", "reshape_as", "split_with_sizes", "movedim", "diagonal", "swapaxes", "lift_fresh",
    "tensor_split",
    "broadcast_to", "view_as_real", "view_as_complex", "real", "imag", "contiguous", "unfold_view", "dropout",
}  # fmt: skip


def _shape(call: Call, position: int, shape: ShapeOf) -> Shape:
    arg = call.args[position]
    return shape(arg.name) if isinstance(arg, Ref) else ()


def _linear(call: Call, shape: ShapeOf, out: int) -> int:
    return 2 * out * _shape(call, 0, shape)[-1]


def _matmul(call: Call, shape: ShapeOf, out: int) -> int:
    return 2 * out * _shape(call, 0, shape)[-1]


def _addmm(call: Call, shape: ShapeOf, out: int) -> int:
    return 2 * out * _shape(call, 1, shape)[-1]


def _conv(call: Call, shape: ShapeOf, out: int) -> int:
    weight = _shape(call, 1, shape)
    return 2 * out * prod(weight[1:])


def _conv_transpose(call: Call, shape: ShapeOf, out: int) -> int:
    weight = _shape(call, 1, shape)
    return 2 * prod(_shape(call, 0, shape)) * prod(weight[1:])


def _convolution(call: Call, shape: ShapeOf, out: int) -> int:
    return (_conv_transpose if call.args[6] is True else _conv)(call, shape, out)


def _attention(call: Call, shape: ShapeOf, out: int) -> int:
    query, key, value = (_shape(call, i, shape) for i in range(3))
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(call: Call, shape: ShapeOf, out: int) -> int:
    equation, operands = call.args[0], call.args[1]
    if not isinstance(equation, str) or not isinstance(operands, tuple):
        return out
    sizes: dict[str, int] = {}
    rest = 1
    for term, operand in zip(equation.split("->")[0].replace(" ", "").split(","), operands, strict=False):
        dims = list(shape(operand.name)) if isinstance(operand, Ref) else []
        letters = term.replace("...", "")
        if "..." in term:
            start = term.index("...")
            hidden = len(dims) - len(letters)
            rest = max(rest, prod(dims[start : start + hidden]))
            dims = dims[:start] + dims[start + hidden :]
        sizes.update(zip(letters, dims, strict=False))
    return 2 * prod(sizes.values()) * rest


def _recurrent(call: Call, shape: ShapeOf, out: int) -> int:
    steps = prod(_shape(call, 0, shape)[:-1])
    weights = next((a for a in call.args if isinstance(a, tuple) and len(a) > 2), ())
    return 2 * steps * sum(prod(shape(a.name)) for a in weights if isinstance(a, Ref) and len(shape(a.name)) == 2)


def _cell(call: Call, shape: ShapeOf, out: int) -> int:
    rows = _shape(call, 0, shape)[0] if len(_shape(call, 0, shape)) > 1 else 1
    return 2 * rows * sum(prod(shape(a.name)) for a in call.args[2:4] if isinstance(a, Ref))


_FORMULAS: dict[str, Callable[[Call, ShapeOf, int], int]] = {
    "linear": _linear, "matmul": _matmul, "mm": _matmul, "bmm": _matmul, "mv": _matmul, "dot": _matmul,
    "addmm": _addmm, "baddbmm": _addmm, "addmv": _addmm, "einsum": _einsum, "convolution": _convolution,
    **{f"conv{n}d": _conv for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _conv_transpose for n in (1, 2, 3)},
    "scaled_dot_product_attention": _attention,
    "lstm": _recurrent, "gru": _recurrent, "rnn_tanh": _recurrent, "rnn_relu": _recurrent,
    "lstm_cell": _cell, "gru_cell": _cell, "rnn_tanh_cell": _cell, "rnn_relu_cell": _cell,
}  # fmt: skip


def flops(call: Call, shape: ShapeOf) -> int:
    """Floating-point operations of one forward call. Exact for products and convolutions, else the result's size."""
    name = packet(call.target).split(".", 1)[-1]
    if name in _FREE:
        return 0
    out = sum(prod(shape(o)) for o in call.outputs if o)
    formula = _FORMULAS.get(name)
    try:
        return int(formula(call, shape, out)) if formula else out
    except (IndexError, TypeError):
        return out
