"""The trace so far, carried out on the real example inputs: what a value read from Python would be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from partita import torch_compat as tc
from partita.capture.encode import decode, resolve
from partita.capture.records import Break, Trace, flat
from partita.graph import Arg, refs


class Shadow:
    """Real tensors by name. Runs each recorded call once, when first asked for something behind it.

    It works on copies of ``tensors``, made when first needed (few models read values), but for those in ``borrowed``,
    which are the user's own memory and must not be written.
    """

    def __init__(self, trace: Trace, tensors: Mapping[str, torch.Tensor], borrowed: frozenset[str]) -> None:
        self.trace, self.position = trace, 0
        self.values: dict[str, Any] = {}
        self.real = all(t.device.type != "meta" for t in tensors.values())
        self.borrowed, self.done = borrowed, set[str]()
        self._originals = dict(tensors)

    def _copy(self) -> None:
        with tc.no_function_modes(), torch.inference_mode(False):
            for name, tensor in self._originals.items():
                own = tensor.detach() if name in self.borrowed else tensor.detach().clone()
                self.values[name] = own.requires_grad_(tensor.requires_grad)
        self._originals = {}

    def catch_up(self) -> None:
        """Carry out what was recorded since."""
        if self._originals:
            self._copy()
        for name, constant in self.trace.constants.items():
            self.values.setdefault(name, constant)
        while self.position < len(self.trace.calls):
            call = self.trace.calls[self.position]
            self.position += 1
            if call.name in self.done:
                continue  # an opaque piece: its probe was the execution
            if self.borrowed.intersection(call.writes):
                raise Break("a parameter is changed in place", call.module, call.source)
            with torch.set_grad_enabled(call.grad):
                run = self.trace.opaques.get(call.target) or resolve(call.target)
                named = {k: decode(v, self.values, 0) for k, v in call.kwargs}
                if call.reads:
                    named["reads"] = [self.values[r] for r in call.reads]
                out = run(*[decode(a, self.values, 0) for a in call.args], **named)
            self.values.update((n, o) for n, o in zip(call.outputs, flat(out), strict=True) if n)

    def run(self, function: Callable[..., Any], args: tuple[Arg, ...]) -> Any:
        """``function`` on real values."""
        with tc.no_modes():
            self.catch_up()
            return function(*[decode(a, self.values, 0) for a in args])


def needed_calls(trace: Trace, names: set[str], position: int) -> set[int]:
    """Indices of the calls before ``position`` that these values depend on, writes through other views included."""
    values = trace.values
    bases = {values[n].base for n in names if n in values}
    found = set()
    for index in range(position - 1, -1, -1):
        call = trace.calls[index]
        if names.isdisjoint(call.outputs) and bases.isdisjoint(call.writes):
            continue
        found.add(index)
        more = {*refs(call.args), *(r for _, v in call.kwargs for r in refs(v)), *call.reads}
        names |= more
        bases |= {values[n].base for n in more if n in values}
    return found
