"""Captured: a Graph and everything torch that running it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from partita.capture.contents import Contents
from partita.capture.guards import Guard
from partita.capture.memory import Effect
from partita.capture.structure import Structure, fill, put_together, same, take_apart
from partita.graph import Graph


@dataclass(frozen=True)
class Captured:
    """What ``capture`` found.

    ``live``: '' where ``graph`` holds the model's ops; otherwise the reason why the model must run as it is (``graph``
    is then without ops: names, shapes, ties only). ``opaques``: ``opaque:N`` -> ``f(*tensors, reads=[...])``, which
    gives a tuple of tensors. ``constants``: by Graph tensor name. ``inputs``: names of the tensor leaves of a call, in
    order. ``guards``: values the graph was made for. ``effects``: counters on modules that each call moves on.
    ``left``: attributes of modules in which forward leaves tensors (a loss, an attention map); their tensors are the
    graph's last outputs, after the first ``returned``. ``filled``: lists, dicts and objects among the arguments (by
    node) that forward changes, likewise. ``same``: nodes of the answer that are such arguments themselves.
    ``in_contents``: what the call's other arguments held.
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
    left: tuple[tuple[nn.Module, str], ...] = ()
    filled: tuple[int, ...] = ()
    same: tuple[tuple[int, int], ...] = ()
    returned: int = -1
    in_contents: tuple[Contents, ...] = ()

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[torch.Tensor] | None:
        """The tensors of a call in the order of ``inputs``; None where anything else differs from the captured call."""
        leaves, structure = take_apart((tuple(args), dict(kwargs or {})))
        fits = same(self.in_structure, structure) and all(contents.hold() for contents in self.in_contents)
        return leaves if fits else None

    def unflatten(self, outputs: list[torch.Tensor], arguments: Any = None) -> Any:
        """The user's output around these tensors (of ``graph.outputs``).

        What forward leaves on modules is set, and what it puts into ``arguments``, the call's (args, kwargs).
        """
        assert self.out_structure is not None
        given: dict[int, Any] = {}
        if arguments is not None and (self.filled or self.same):
            take_apart(arguments, given)
        kept = {n: given[number] for n, number in self.same if number in given}
        value, left = put_together(self.out_structure, list(outputs), kept)
        for (module, attribute), item in zip(self.left, left, strict=False):
            vars(module)[attribute] = item
        for number, held in zip(self.filled, left[len(self.left) :], strict=True):
            if number in given:
                fill(given[number], held)
        return value

    def guards_hold(self, leaves: list[torch.Tensor]) -> bool:
        """Whether every value the model read from these inputs is the one the graph was made for."""
        return all(guard.holds(leaves) for guard in self.guards)

    def after_call(self) -> None:
        """What the model's own forward does to its Python attributes in each call (``self.steps += 1``)."""
        for effect in self.effects:
            effect.apply()
