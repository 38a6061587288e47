"""Randomness taken out of ops, so that it can be drawn once, in the unsplit model's order, whatever the plan.

``partita.dropout_noise(shape, dtype, p, order)`` is the noise that ``torch.dropout(x, p, train=True)`` multiplies ``x``
with, drawn from the default generator of the device exactly as eager PyTorch on CPU draws it::

    noise = torch.empty(shape, dtype).as_strided-in-memory-order(order).bernoulli_(1 - p).div_(1 - p)

``order`` lists the dims from the slowest to the fastest in memory: the tensor is allocated as
``torch.empty([shape[d] for d in order], dtype=dtype)`` and permuted back, ``.permute(inverse(order))``, which gives it
the strides of ``torch.empty_like(x)``, hence the same values. It runs without gradient and reads no tensor. ``dtype``
is a ``Symbol``; ``shape`` may hold ``Size``s, evaluated at the full batch. ``aten.mul.Tensor(x, noise)`` follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from partita import torch_compat as tc
from partita.capture.records import Call, Trace, Value, packet
from partita.graph import Arg, Ref, Symbol

# Ops that draw from a generator and cannot be taken apart: op -> whether these arguments make it draw.
_Draws = Callable[[Call], bool]


def _arg(call: Call, position: int, name: str, default: Arg) -> Arg:
    if position < len(call.args):
        return call.args[position]
    return dict(call.kwargs).get(name, default)


def _always(call: Call) -> bool:
    return True


def _recurrent(call: Call) -> bool:
    """lstm/gru/rnn: (..., has_biases, num_layers, dropout, train, ...): dropout between the layers in training."""
    flat = [a for a in call.args if isinstance(a, bool | int | float) and not isinstance(a, Ref)]
    floats = [a for a in flat if isinstance(a, float)]
    position = next((i for i, a in enumerate(flat) if isinstance(a, float)), None)
    return bool(floats and floats[0] > 0 and position is not None and flat[position + 1] is True)


def _training(position: int) -> _Draws:
    return lambda call: bool(_arg(call, position, "train", False)) and _arg(call, 1, "p", 0.0) != 0


_UNSEPARABLE: dict[str, _Draws] = {
    **{f"aten.{n}": _always for n in (
        "rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "normal", "normal_",
        "uniform", "uniform_", "exponential", "exponential_", "bernoulli", "bernoulli_", "random", "random_",
        "multinomial", "poisson", "binomial", "cauchy_", "log_normal_", "geometric_", "cauchy", "log_normal",
        "geometric", "_standard_gamma", "_sample_dirichlet", "normal_functional", "native_dropout",
        "_fused_dropout", "rrelu_with_noise", "rrelu_with_noise_",
    )},
    "aten.rrelu": lambda call: bool(_arg(call, 3, "training", False)),
    "aten.rrelu_": lambda call: bool(_arg(call, 3, "training", False)),
    "aten.alpha_dropout": _training(2), "aten.alpha_dropout_": _training(2),
    "aten.feature_alpha_dropout": _training(2), "aten.feature_alpha_dropout_": _training(2),
    "aten.lstm": _recurrent, "aten.gru": _recurrent, "aten.rnn_tanh": _recurrent, "aten.rnn_relu": _recurrent,
    "aten.fractional_max_pool2d": lambda call: False,
}  # fmt: skip


def draws(call: Call) -> bool:
    """Whether this call takes numbers from a generator."""
    test = _UNSEPARABLE.get(packet(call.target))
    return test is not None and test(call)


def may_draw(call: Call) -> bool:
    """As ``draws``, before dropout is taken apart."""
    if packet(call.target) in ("aten.dropout", "aten.dropout_", "aten.feature_dropout", "aten.feature_dropout_"):
        return _training(2)(call)
    return draws(call)


def inactive(bound: Mapping[str, Any]) -> bool:
    """Whether a dropout with these arguments gives its input itself, as ATen's does."""
    return bound["p"] == 0 or not bound["train"] or bound["input"].numel() == 0


def memory_order(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Dims of ``empty_like`` of such a tensor, slowest in memory first."""
    like: torch.Tensor = torch.empty_like(torch.empty_strided(shape, stride, device="meta"))
    return tuple(sorted(range(len(shape)), key=lambda d: (-int(like.stride()[d]), like.shape[d] == 1, d)))


# Made like another tensor: allocated in that one's memory order, then drawn along the memory.
_LIKE = {"aten.rand_like": "uniform_", "aten.randn_like": "normal_", "aten.randint_like": "random_",
         "aten.empty_like": ""}  # fmt: skip
_IN_PLACE = frozenset(f"aten.{n}_" for n in ("uniform", "normal", "exponential", "random", "cauchy", "log_normal",
                                             "geometric", "bernoulli"))  # fmt: skip


def along_memory(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The order of the dims in memory, where the op draws along the memory of a tensor that does not lie as it stands.

    Elsewhere (joined from parts of the batch, gathered from several devices) that tensor may lie in another order, and
    as many numbers drawn along that memory would stand elsewhere: ``drawn`` makes memory of the right order first.
    """
    if (op not in _LIKE and op not in _IN_PLACE) or any(isinstance(a, torch.Tensor) for a in args[1:]):
        return None
    if op in _LIKE and kwargs.get("memory_format") not in (None, torch.preserve_format):
        return None
    order = memory_order(tuple(args[0].shape), tuple(args[0].stride()))
    return None if order == tuple(range(len(order))) else order


def drawn(
    op: str, order: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any], ordered: dict[int, torch.Tensor]
) -> torch.Tensor:
    """What ``op`` gives, in memory of this order: bit for bit, for kernels tell by the strides how to draw.

    ``ordered`` keeps the tensors made here: what is drawn into them needs no care.
    """
    like, rest = args[0], args[1:]
    back = [order.index(d) for d in range(len(order))]
    options = {k: v for k, v in kwargs.items() if k in ("dtype", "layout", "device", "pin_memory")}
    fresh = torch.empty_like(like.permute(order), memory_format=torch.contiguous_format, **options).permute(back)
    ordered[id(fresh)] = fresh
    if op in _LIKE:
        draw, numbers = _LIKE[op], {k: v for k, v in kwargs.items() if k in ("low", "high")}
        if op == "aten.randint_like":
            bounds = [*rest, *numbers.values()]
            rest, numbers = (bounds[0], bounds[1]) if len(bounds) > 1 else (0, bounds[0]), {}
        return getattr(fresh, draw)(*rest, **numbers) if draw else fresh
    like.copy_(getattr(fresh, op.removeprefix("aten."))(*rest, **kwargs))
    return like  # type: ignore[no-any-return]


def separate(trace: Trace) -> list[Call]:
    """The trace's calls with each dropout as noise and a product. Adds the noise tensors to the trace."""
    calls: list[Call] = []
    for call in trace.calls:
        kind = packet(call.target).removeprefix("aten.")
        if kind not in ("dropout", "dropout_", "feature_dropout", "feature_dropout_"):
            calls.append(replace(call, random=True) if draws(call) else call)
            continue
        source, p, train = call.args[0], _arg(call, 1, "p", 0.5), _arg(call, 2, "train", False)
        assert isinstance(source, Ref) and isinstance(p, int | float)
        value = trace.values[source.name]
        if p == 0 or p == 1 or not train or math.prod(value.shape) == 0:  # as ATen: no number is drawn
            calls.append(call)
            continue
        calls.extend(_noise_and_product(trace, call, value, float(p), kind))
    return calls


def _noise_and_product(trace: Trace, call: Call, value: Value, p: float, kind: str) -> Iterable[Call]:
    shape = value.shape
    order = memory_order(shape, value.stride)
    if kind.startswith("feature"):
        shape = (*shape[:2], *(1 for _ in shape[2:]))
        order = tuple(range(len(shape)))
    name = f"{call.name}.noise"
    dense = _strides(shape, order)
    trace.values[name] = Value(name, shape, dense, value.dtype, "op", "", name, False)
    yield Call(name, "partita.dropout_noise", (shape, Symbol(f"torch.{value.dtype}"), p, order), (), (name,),
               call.module, call.source, grad=False, random=True)  # fmt: skip
    target = "aten.mul_.Tensor" if kind.endswith("_") else "aten.mul.Tensor"
    yield replace(call, target=target, args=(call.args[0], Ref(name)), kwargs=())


def _strides(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def sdpa_with_dropout(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """``scaled_dot_product_attention`` step by step, as ATen's ``_scaled_dot_product_attention_math`` computes it.

    Bitwise equal on CPU in float32 and float64; its dropout is a dropout op that can be taken apart.
    """
    factor = math.sqrt(1.0 / math.sqrt(query.shape[-1]) if scale is None else abs(scale))
    origin = query.dtype
    if origin in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    query = query * (-factor if scale is not None and scale < 0 else factor)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    weights = torch.matmul(query, key.transpose(-2, -1) * factor)
    if attn_mask is not None:
        weights = weights.add(attn_mask)
    weights = tc.safe_softmax(weights)
    weights = torch.dropout(weights, dropout_p, True)
    return torch.matmul(weights, value).to(origin)
