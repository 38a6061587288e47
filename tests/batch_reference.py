"""A plain interpreter of a Graph on parts of the batch, as its BatchLayouts say: what the tests compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from partita.graph import Graph, Op, Ref, Size, Symbol, Tensor
from partita.program import Fixed, Once, Partial, Split
from partita.sharding.batch import BatchLayouts

Resolve = Callable[[Op], Callable[..., Any]]


def aten(op: Op) -> Callable[..., Any]:
    namespace, name, overload = (op.target.split(".") + ["default"])[:3]
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def symbol(value: Symbol) -> Any:
    if value.text.startswith("device:"):
        return torch.device(value.text.removeprefix("device:"))
    return getattr(torch, value.text.removeprefix("torch."))


def run_op(op: Op, look: Callable[[str], Any], size: int, resolve: Resolve = aten) -> tuple[Any, ...]:
    """The op's results; every ``Size`` among its arguments taken at ``size``."""

    def value(arg: Any) -> Any:
        if isinstance(arg, Ref):
            return look(arg.name)
        if isinstance(arg, Size):
            return arg.at(size)
        if isinstance(arg, Symbol):
            return symbol(arg)
        if isinstance(arg, tuple):
            return [value(item) for item in arg]
        return arg

    kwargs = {key: value(item) for key, item in op.kwargs}
    if op.reads:
        kwargs["reads"] = [look(name) for name in op.reads]
    with torch.set_grad_enabled(op.grad):
        result = resolve(op)(*[value(arg) for arg in op.args], **kwargs)
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def run_whole(graph: Graph, leaves: dict[str, Any], size: int, resolve: Resolve = aten) -> dict[str, Any]:
    """Every tensor of the model, run on the whole batch."""
    values = dict(leaves)
    for op in graph.ops:
        values.update(zip(op.outputs, run_op(op, values.__getitem__, size, resolve), strict=True))
    return values


def run_parts(
    graph: Graph, layouts: BatchLayouts, leaves: dict[str, Any], parts: Sequence[int], resolve: Resolve = aten
) -> dict[str, Any]:
    """Every tensor of the model joined from its parts: once, then each part, then what needs the whole."""
    from dataclasses import replace

    size = sum(parts)
    whole = dict(leaves)
    for op in graph.ops:
        if layouts.phase[op.name] == "once":
            whole.update(zip(op.outputs, run_op(op, whole.__getitem__, size, resolve), strict=True))
    held: list[dict[str, Any]] = []
    done = 0
    for part in parts:
        mine: dict[str, Any] = {}

        def look(name: str, op: Op, start: int = done, count: int = part, mine: dict[str, Any] = mine) -> Any:
            if name in mine:
                return mine[name]
            take = layouts.take(op.name, name)
            if isinstance(take, Split):
                assert take.outer == 1
                return whole[name].narrow(take.dim, start * take.factor, count * take.factor)
            assert isinstance(take, Once | Fixed), (op.name, name, take)
            return whole[name]

        for op in graph.ops:
            if layouts.phase[op.name] != "split":
                continue
            rewrite = layouts.rewrites.get(op.name)
            run = op
            if rewrite is not None and rewrite.kind == "call":
                run = replace(op, target=rewrite.target_op, args=rewrite.args, kwargs=())
            if rewrite is not None and rewrite.kind == "sum_over_total":
                args = list(op.args) + [None, 1, -100][len(op.args) - 2 :] if len(op.args) < 5 else list(op.args)
                args[rewrite.reduction_arg] = 2
                run = replace(op, args=tuple(args))
            at = part if layouts.sizes_follow_microbatch(op) else size
            results = run_op(run, lambda name, op=op, look=look: look(name, op), at, resolve)
            if rewrite is not None and rewrite.kind == "weighted":
                results = tuple(result * (part / size) for result in results)
            if rewrite is not None and rewrite.kind == "sum_over_total":
                target = whole[rewrite.target]
                counted = target != rewrite.ignore_index
                weight = whole[rewrite.weight] if rewrite.weight else None
                total = counted.sum() if weight is None else weight[target[counted]].sum()
                results = tuple(result / total for result in results)
            mine.update(zip(op.outputs, results, strict=True))
        held.append(mine)
        done += part
    for name in dict.fromkeys(name for mine in held for name in mine):
        layout = layouts.of[name] if name else None
        values = [mine[name] for mine in held]
        if isinstance(layout, Split):
            whole[name] = torch.cat(values, layout.dim) if layout.outer == 1 else values
        elif isinstance(layout, Partial):
            whole[name] = sum(values[1:], values[0])
        else:
            whole[name] = values[0]
    for op in graph.ops:
        if layouts.phase[op.name] == "whole":
            whole.update(zip(op.outputs, run_op(op, whole.__getitem__, size, resolve), strict=True))
    return whole


def graph_of(
    target: str,
    make: Callable[[int], tuple[Any, ...]],
    keywords: Callable[[int], dict[str, Any]] | None = None,
    *,
    batch: int = 5,
) -> tuple[Graph, dict[str, Any]]:
    """A graph of one op, its sizes found by running it at two batch sizes, and the values of its tensors at one.

    A tensor that follows the batch is an input, another a parameter. Results count as carrying a gradient
    where there is any argument.
    """
    traces = []
    for size in (batch, batch + 2):
        torch.manual_seed(0)
        args, kwargs = make(size), keywords(size) if keywords else {}
        op = Op("op", target, (), (), ())
        result = aten(op)(*_copied(args), **_copied(kwargs))
        traces.append((args, kwargs, tuple(result) if isinstance(result, tuple | list) else (result,)))
    tensors: list[Tensor] = []
    leaves: dict[str, Any] = {}

    def dim(a: int, b: int) -> int | Size:
        slope, rest = divmod(b - a, 2)
        assert not rest
        return a if not slope else Size(a - slope * batch, slope)

    def shape(a: torch.Tensor, b: torch.Tensor) -> tuple[int | Size, ...]:
        return tuple(dim(i, j) for i, j in zip(a.shape, b.shape, strict=True))

    def dtype(value: torch.Tensor) -> str:
        return str(value.dtype).removeprefix("torch.")

    def encode(a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor):
            name, sizes = f"t{len(tensors)}", shape(a, b)
            follows = any(isinstance(s, Size) for s in sizes)
            role = "input" if follows else "parameter"
            tensors.append(Tensor(name, sizes, dtype(a), role, name, "", not follows and a.is_floating_point()))
            leaves[name] = a
            return Ref(name)
        if isinstance(a, list | tuple):
            return tuple(encode(i, j) for i, j in zip(a, b, strict=True))
        if isinstance(a, bool) or not isinstance(a, int):
            return Symbol(str(a)) if isinstance(a, torch.dtype | torch.layout | torch.memory_format) else a
        return dim(a, b)

    (args, kwargs, results), (args2, kwargs2, results2) = traces
    encoded = encode(args, args2)
    named = tuple((key, encode(value, kwargs2[key])) for key, value in kwargs.items())
    outputs = tuple(f"out{i}" for i in range(len(results)))
    for name, a, b in zip(outputs, results, results2, strict=True):
        tensors.append(Tensor(name, shape(a, b), dtype(a), needs_grad=bool(leaves)))
    op = Op("op", target, encoded, named, outputs, flops=1)
    return Graph("one", "", batch, tuple(tensors), (op,), outputs), leaves


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value
