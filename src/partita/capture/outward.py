"""Which modules and methods run as one op, and why: chosen at first sight, then outward from where a trace breaks."""

from __future__ import annotations

import torch
from torch import nn

from partita.capture.records import Break


class Pieces:
    """The modules and methods that run as one op, and why. Grows outward until a trace succeeds."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.reasons: dict[str, str] = {}
        for path, module in self.modules.items():
            if path and (module._backward_hooks or module._backward_pre_hooks):
                self.reasons[path] = "it has backward hooks"
            elif path and own_hooks(module):
                self.reasons[path] = "it has forward hooks of yours"
            elif path and isinstance(module, torch.jit.ScriptModule):
                self.reasons[path] = "it is a ScriptModule"

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self.reasons)

    def around(self, found: Break) -> str:
        """Make a piece around the spot: a method of the module, or the module. Returns why not, if neither can be."""
        for piece in found.methods:
            if piece not in self.reasons:
                self.reasons[piece] = str(found)
                return ""
        path = found.module
        while path and path in self.reasons:
            path = path.rpartition(".")[0]
        if not path:
            return str(found)
        for other, module in self.modules.items():  # modules of the user's same class will do the same
            if other == path or (other and type(module) is type(self.modules[path]) and not _stock(module)):
                self.reasons.setdefault(other, str(found))
        return ""

    def notes(self) -> list[str]:
        inside = [p for p in self.reasons if not any(p != q and p.startswith(f"{q}.") for q in self.reasons)]
        return [f"{path} runs as one piece: {self.reasons[path]}" for path in inside]


_PURE_HOOKS = frozenset({"torch", "transformers"})  # weight_norm; the recorders of hidden states and router logits


def own_hooks(module: nn.Module) -> bool:
    """Whether hooks run around its forward that may do more than compute: the user's, not a library's known ones."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    made_in = (getattr(hook, "__module__", None) or type(hook).__module__ for hook in hooks)
    return any(name.partition(".")[0] not in _PURE_HOOKS for name in made_in)


def _stock(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")
