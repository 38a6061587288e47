"""Gradients that are sent at once, from where they lie, count as gradients when the marks are sent last."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from partita.graph import Graph, Tensor
from partita.runtime.distributed.reduce import Reducer, Shared, Sums, _buckets


@dataclass
class Landed:
    flat: torch.Tensor

    def push(self) -> bool:
        return True

    def land(self) -> torch.Tensor:
        return self.flat


class Alone:
    """A group of one: what it scatters is what it gets."""

    position = 0

    def scatter(self, flat: torch.Tensor, splits: list[int], what: str) -> Landed:
        return Landed(flat.clone())


def test_a_large_sharded_gradient_is_not_taken_for_none() -> None:
    rows = 1 << 14  # 4 MiB
    shapes = {"large": (rows, 64), "small": (3,), "idle": (2,)}
    tensors = tuple(Tensor(n, s, "float32", "parameter", n, n, True) for n, s in shapes.items())
    graph = Graph("G", "g", 1, tensors, (), ())
    names = tuple(shapes)
    shared = Shared((0,), True, names, _buckets(graph, names, 1 << 18))
    aliases = {n: torch.zeros(s, requires_grad=True) for n, s in shapes.items()}
    for name in ("large", "small"):
        aliases[name].grad = torch.ones(shapes[name])
    reducer = Reducer(
        graph, Sums((shared,), dict.fromkeys(names, 1)), aliases, lambda ranks: Alone(),  # type: ignore[arg-type,return-value]
        lambda name: (shapes[name][0],), torch.device("cpu"),
    )  # fmt: skip
    found = reducer.finish()
    assert set(found) == {"large", "small"}
    assert torch.equal(found["large"], torch.ones(rows, 64))
