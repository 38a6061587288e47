"""The plainest way to run a captured graph: op after op on the model's own parameters. What tests compare with."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from partita.capture import Captured, capture, resolve
from partita.capture.encode import decode
from partita.capture.structure import take_apart


def dropout_noise(shape: list[int], dtype: torch.dtype, p: float, order: list[int]) -> torch.Tensor:
    """``partita.dropout_noise`` by its definition."""
    back = [order.index(d) for d in range(len(order))]
    noise = torch.empty([shape[d] for d in order], dtype=dtype).permute(back)
    return noise.bernoulli_(1 - p).div_(1 - p)


def interpret(captured: Captured, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's output by the graph."""
    graph = captured.graph
    leaves = captured.flatten(args, kwargs)
    assert leaves is not None, "the call's structure differs from the captured one"
    assert captured.guards_hold(leaves), "a guard does not hold"
    values: dict[str, Any] = dict(captured.constants)
    values.update(model.named_parameters(remove_duplicate=False))
    values.update(model.named_buffers(remove_duplicate=False))
    values.update(zip(captured.inputs, leaves, strict=True))
    for op in graph.ops:
        function: Callable[..., Any]
        if op.target == "partita.dropout_noise":
            function = dropout_noise
        elif op.target.startswith("opaque:"):
            function = captured.opaques[op.target]
        else:
            function = resolve(op.target)
        named = {k: decode(v, values, graph.batch) for k, v in op.kwargs}
        if op.reads:
            named["reads"] = [values[r] for r in op.reads]
        with torch.set_grad_enabled(op.grad and torch.is_grad_enabled()):
            out = function(*[decode(a, values, graph.batch) for a in op.args], **named)
        results = list(out) if isinstance(out, list | tuple) else [out] if op.outputs else []
        assert len(results) == len(op.outputs), op
        for name, result in zip(op.outputs, results, strict=True):
            if name:
                values[name] = result
    output = captured.unflatten([values[n] for n in graph.outputs])
    captured.after_call()
    return output


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def loss_of(output: Any) -> torch.Tensor | None:
    """A weighted mean of every differentiable float output: distinct weights, so that misplaced rows show."""
    total: torch.Tensor | None = None
    for index, tensor in enumerate(t for t in take_apart(output)[0] if t.is_floating_point() or t.is_complex()):
        if tensor.requires_grad and tensor.numel():
            tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            weight = torch.cos(torch.arange(tensor.numel(), dtype=torch.float32) + index).reshape(tensor.shape)
            finite = torch.where(torch.isfinite(tensor.detach()), tensor, torch.zeros_like(tensor))
            term = (finite.float() * weight).mean()
            total = term if total is None else total + term
    return total


def step(run: Callable[[], Any], model: nn.Module, number: int) -> dict[str, Any]:
    """Outputs, gradients by name and buffers by name of one forward and backward; and the next random numbers."""
    seed(number)
    model.zero_grad(set_to_none=True)
    output = run()
    loss = loss_of(output)
    if loss is not None:
        loss.backward()
    found: dict[str, Any] = {f"output {i}": t.detach().clone() for i, t in enumerate(take_apart(output)[0])}
    found.update({f"gradient {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    found.update({f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()})
    found["next random numbers"] = torch.tensor([float(torch.rand(())), random.random(), np.random.rand()])
    return found


def assert_same_bits(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Equal names, shapes, types and bits (NaN equals NaN)."""
    assert expected.keys() == found.keys(), set(expected) ^ set(found)
    wrong = [
        name for name, x in expected.items()
        if x.shape != found[name].shape or x.dtype != found[name].dtype
        or not torch.equal(torch.nan_to_num(x), torch.nan_to_num(found[name]))
    ]  # fmt: skip
    assert not wrong, f"{len(wrong)} of {len(expected)} differ: {wrong[:5]}"


def clone(value: Any) -> Any:
    """Tensors cloned, everything else copied deeply."""
    return copy.deepcopy(value)


def check(
    build: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]], *, train: bool = True, steps: int = 2
) -> Captured:
    """Capture on one set of inputs, compare on fresh ones, several steps in a row. Returns what was captured."""
    seed(0)
    model, args, kwargs = build()
    model.train(train)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = torch.get_rng_state()
    captured = capture(model, args, kwargs)
    assert torch.equal(before, torch.get_rng_state()), "capture draws random numbers"
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), f"capture changes {name}"
    if captured.live:
        return captured
    seed(0)
    twin, _, _ = build()
    twin.load_state_dict(model.state_dict())
    twin.train(train)
    for number in range(1, steps + 1):
        seed(100 + number)
        _, args, kwargs = build()
        leaves = captured.flatten(args, kwargs)
        if leaves is None or not captured.guards_hold(leaves):
            captured = capture(model, args, kwargs)
        expected = step(lambda: twin(*clone(args), **clone(kwargs)), twin, number)  # noqa: B023
        found = step(lambda: interpret(captured, model, clone(args), clone(kwargs)), model, number)  # noqa: B023
        assert_same_bits(expected, found)
    return captured
