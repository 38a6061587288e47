"""One graph run by the members of a group on threads, every option of an op by turns, beside the graph run whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from batch_reference import aten, run_op

from partita.graph import Arg, Graph, Op, Size
from partita.runtime.collectives import LocalGroup
from partita.runtime.spmd_ops import IN_GROUP
from partita.runtime.waits import Waits
from partita.sharding.batch import layouts
from partita.sharding.choose import Choice
from partita.sharding.options import Option, Ways
from partita.sharding.placements import Cut, Shard, even
from partita.sharding.spmd import Local, Part, localise


def frozen(graph: Graph, size: int) -> Graph:
    """The graph at one batch size: no dim follows the batch, so that each may be divided."""

    def number(arg: Arg) -> Arg:
        if isinstance(arg, Size):
            return arg.at(size)
        return tuple(number(a) for a in arg) if isinstance(arg, tuple) else arg

    tensors = tuple(
        replace(t, shape=t.shape_at(size), role="op" if t.role == "op" else "input",
                needs_grad=t.dtype in ("float32", "float64"))
        for t in graph.tensors
    )  # fmt: skip
    ops = tuple(
        replace(op, args=tuple(map(number, op.args)), kwargs=tuple((k, number(v)) for k, v in op.kwargs))
        for op in graph.ops
    )
    return replace(graph, tensors=tensors, ops=ops, batch=0)


def cuts(size: int, members: int) -> Iterator[Cut]:
    """Near-equal, uneven, and in two rounds."""
    first = even(size, members)
    if first is not None:
        yield first
    if size > members:
        yield Cut(((1,) * (members - 1) + (size - members + 1,),))
    half = even(size // 2, members) if size % 2 == 0 else None
    if half is not None:
        yield Cut(half.rounds * 2)


def options(graph: Graph, op: Op, members: int) -> tuple[Option, ...]:
    """Every way to divide the op that follows from a dim of an operand or result."""
    ways, found = Ways(graph, op, members), {}
    sides = [(i, t, ways.from_input) for i, t in enumerate(ways.operands)]
    sides += [(i, t, ways.from_output) for i, t in enumerate(ways.call.results()) if t is not None]
    for index, tensor, derive in sides:
        for dim, size in enumerate(tensor.shape):
            for cut in cuts(int(size), members) if isinstance(size, int) else ():
                found.update(dict.fromkeys(derive(index, Shard(dim, cut))))
    return tuple(found)


def members_of(graph: Graph, chosen: dict[str, Option], members: int) -> tuple[Local, ...]:
    """The local graphs where these ops are divided so and all others run whole."""
    whole = {op.name: Ways(graph, op, members).replicated() for op in graph.ops}
    part = Part(members, frozenset(whole), Choice({**whole, **chosen}, {}))
    segment = dict.fromkeys(whole, 0)
    outside = frozenset(graph.outputs)
    return tuple(
        localise(graph, layouts(graph), [part], rank, segment_of=segment, outside=outside) for rank in range(members)
    )


def run_members(
    local: tuple[Local, ...], leaves: dict[str, Any], weights: dict[str, torch.Tensor], *, grad: bool
) -> list[tuple[dict[str, Any], dict[str, torch.Tensor | None]]]:
    """Of every member the results and the gradients of what came in."""
    failed: list[BaseException] = []
    waits = Waits()
    groups = LocalGroup.make(len(local), waits)
    found: list[Any] = [None] * len(local)

    def work(rank: int) -> None:
        try:
            group = groups[rank]

            def resolve(op: Op) -> Callable[..., Any]:
                if op.target in IN_GROUP:
                    return lambda *a, **k: IN_GROUP[op.target](*a, group=group, **k)
                return aten(op)

            found[rank] = run_graph(local[rank].graph, leaves, weights, resolve, grad=grad)
        except BaseException as error:
            failed.append(error)
            waits.stopped = True

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(local))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def run_graph(
    graph: Graph, leaves: dict[str, Any], weights: dict[str, torch.Tensor], resolve: Callable[[Op], Callable[..., Any]],
    *, grad: bool,
) -> tuple[dict[str, Any], dict[str, torch.Tensor | None]]:  # fmt: skip
    values = {k: v.clone().requires_grad_(grad and v.is_floating_point()) for k, v in leaves.items()}
    given = dict(values)
    for op in graph.ops:
        values.update(zip(op.outputs, run_op(op, values.__getitem__, 0, resolve), strict=True))
    results = {name: values[name] for name in graph.outputs}
    total = [(v * weights[n]).sum() for n, v in results.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    if total:
        torch.stack(total).sum().backward()
    return results, {k: v.grad for k, v in given.items()}


def check(graph: Graph, leaves: dict[str, Any], chosen: dict[str, Option], members: int, *, grad: bool = True) -> None:
    """Asserts that every member ends with the results and gradients of the graph run whole."""
    torch.manual_seed(1)
    weights = {n: torch.randn(graph.tensor(n).shape_at(0)) for n in graph.outputs}
    try:
        expected, expected_grads = run_graph(graph, leaves, weights, aten, grad=grad)
    except RuntimeError as why:
        if "implemented" not in str(why) and "differentiable" not in str(why):
            raise
        grad = False  # the op itself has no gradient for one of its arguments
        expected, expected_grads = run_graph(graph, leaves, weights, aten, grad=grad)
    for results, grads in run_members(members_of(graph, chosen, members), leaves, weights, grad=grad):
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert results[name].shape == value.shape and results[name].dtype == value.dtype
                torch.testing.assert_close(results[name], value, rtol=1e-4, atol=1e-5, equal_nan=True)
        for name, wanted in expected_grads.items():
            if wanted is not None and wanted.any():
                assert grads[name] is not None, f"no gradient of {name}"
                torch.testing.assert_close(grads[name], wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
