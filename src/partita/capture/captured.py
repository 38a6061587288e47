"""Captured: a Graph and everything torch that running it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from partita.capture.guards import Guard
from partita.capture.memory import Effect
from partita.capture.structure import Structure, put_together, same, take_apart
from partita.graph import Graph


@dataclass(frozen=True)
class Captured:
    """What ``capture`` found.

    ``live``: '' where ``graph`` holds the model's ops; otherwise the reason why the model must run as it is (``graph``
    is then without ops: names, shapes, ties only). ``opaques``: ``opaque:N`` -> ``f(*tensors, reads=[...])``, which
    gives a tuple of tensors. ``constants``: by Graph tensor name. ``inputs``: names of the tensor leaves of a call, in
    order. ``guards``: values the graph was made for. ``effects``: counters on modules that each call moves on.
    """

    graph: Graph
    opaques: Mapping[str, Callable[..., Any]]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[str, ...]
    in_structure: Structure
    out_structure: Structure | None
    live: str = ""
    guards: tuple[Guard, ...] = ()
    effects: tuple[Effect, ...] = ()

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[torch.Tensor] | None:
        """The tensors of a call in the order of ``inputs``; None where anything else differs from the captured call."""
        leaves, structure = take_apart((tuple(args), dict(kwargs or {})))
        return leaves if same(self.in_structure, structure) else None

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """The user's output around these tensors (those of ``graph.outputs``)."""
        assert self.out_structure is not None
        return put_together(self.out_structure, list(outputs))

    def guards_hold(self, leaves: list[torch.Tensor]) -> bool:
        """Whether every value the model read from these inputs is the one the graph was made for."""
        return all(guard.holds(leaves) for guard in self.guards)

    def after_call(self) -> None:
        """What the model's own forward does to its Python attributes in each call (``self.steps += 1``)."""
        for effect in self.effects:
            effect.apply()
