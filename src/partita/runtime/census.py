"""Census: what a captured graph depends on in a model's Python, as it was; and whether it still is.

Modules, their plain attributes, modes and hooks, the looks of their tensors, and what containers, closures and
module-level names hold (``capture/contents.py``).
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from partita.capture.beside import Beside
from partita.capture.contents import PLAIN, Contents, contents_of, globals_of, of_class

_OWN = frozenset(vars(nn.Module()))  # the base class's registries
CODE = 0  # the owner of what the modules' methods find by name
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Census:
    """What a graph depends on in the model, or in what its loss function reaches. ``modules`` are kept alive, so that
    no other takes their identity.

    ``tensors``: classes, modes, hooks, and of parameters and buffers all but the values. ``kept``: of each module the
    number of its attributes, those that are numbers or texts, and the others, which must be the very same objects.
    ``contents``: the containers, arrays and configuration objects reached from it, as they were. ``hidden``: modules
    that these hold and the model does not (a frozen teacher in a list), each with its mode and its very tensors.
    """

    modules: tuple[nn.Module, ...]
    tensors: tuple[object, ...]
    kept: tuple[tuple[int, dict[str, Any], tuple[tuple[str, Any], ...]], ...]
    contents: tuple[tuple[int, Contents], ...]
    hidden: tuple[tuple[nn.Module, bool, tuple[torch.Tensor | None, ...]], ...] = ()

    def holds(self, ignored: frozenset[object], *roots: nn.Module) -> bool:
        """Whether nothing differs now, but for the attributes that are ``ignored``: (module's identity, name), or the
        identity alone for all of a module's."""
        modules = modules_of(*roots)
        if len(modules) != len(self.modules) or any(a is not b for a, b in zip(modules, self.modules, strict=True)):
            return False
        if _tensors(modules) != self.tensors:
            return False
        for module, (count, kept, bound) in zip(modules, self.kept, strict=True):
            own = vars(module)
            as_before = len(own) == count and _within(kept, own) and all(own.get(n) is v for n, v in bound)
            if not as_before and not _excused(module, kept, bound, own, ignored):
                return False
        for module, training, tensors in self.hidden:
            now = _own(module)
            if module.training is not training or len(now) != len(tensors):
                return False
            if any(a is not b for a, b in zip(now, tensors, strict=True)):
                return False
        return all(owner in ignored or contents.hold() for owner, contents in self.contents)

    def difference(self, names: dict[int, str]) -> str:
        """What differs now, for a person; ``names``: the modules' by identity."""
        for module, (_, kept, bound) in zip(self.modules, self.kept, strict=True):
            own = vars(module)
            changed = _changed(kept, bound, own)
            if changed:
                return f"the attribute {names.get(id(module), '')}.{changed[0]}".replace(" .", " ")
        for owner, contents in self.contents:
            if not contents.hold():
                where = f"reached from {names.get(owner) or 'the model'}" if owner else "found by name"
                return f"{contents}, {where}"
        return "its modules, modes, hooks or tensors"


def _within(kept: dict[str, Any], own: dict[str, Any]) -> bool:
    try:
        return kept.items() <= own.items()
    except Exception:  # another kind of value, which does not compare
        return False


def _changed(kept: dict[str, Any], bound: tuple[tuple[str, Any], ...], own: dict[str, Any]) -> list[str]:
    """The attributes that are not what they were."""
    plain = [n for n, v in kept.items() if not _within({n: v}, own)]
    return plain + [n for n, v in bound if own.get(n) is not v]


def _excused(
    module: nn.Module, kept: dict[str, Any], bound: tuple[tuple[str, Any], ...], own: dict[str, Any],
    ignored: frozenset[object],
) -> bool:  # fmt: skip
    if id(module) in ignored:
        return True
    changed = _changed(kept, bound, own)
    changed += own.keys() - kept.keys() - {n for n, _ in bound} - _OWN
    return bool(changed) and all((id(module), name) in ignored for name in changed)


def modules_of(*roots: nn.Module) -> list[nn.Module]:
    """Every module once, in a fixed order; faster than ``model.modules()``."""
    found: dict[int, nn.Module] = {}
    stack = list(roots)
    while stack:
        module = stack.pop()
        if id(module) not in found:
            found[id(module)] = module
            children = module._modules
            if children:
                stack.extend([child for child in children.values() if child is not None])
    return list(found.values())


def _tensors(modules: list[nn.Module]) -> tuple[object, ...]:
    facts: list[object] = []
    number: dict[int, int] = {}
    for module in modules:
        own = vars(module)
        facts.append((type(module), getattr(type(module), "forward", None), module.training))
        for registry in (module._parameters, module._buffers):
            for tensor in registry.values():
                if tensor is None:
                    facts.append(None)
                    continue
                first = number.setdefault(id(tensor), len(number))
                facts.append((first, tensor.shape, tensor.dtype, tensor.requires_grad, tensor.device))
        for name in _HOOKS:
            if own.get(name):
                facts.append((name, *own[name]))
    return tuple(facts)


def census(*roots: nn.Module, reached: Beside | None = None) -> Census:
    """The model as it is now; with ``reached``, what a loss function reaches besides modules."""
    modules = modules_of(*roots)
    kept, seen, classes = [], set[int](), dict[type, None]()
    contents: list[tuple[int, Contents]] = []
    for module in modules:
        own = {n: v for n, v in vars(module).items() if n not in _OWN}
        plain = {n: v for n, v in own.items() if isinstance(v, PLAIN)}
        bound = tuple((n, v) for n, v in own.items() if n not in plain)
        kept.append((len(vars(module)), plain, bound))
        contents.extend((id(module), c) for c in contents_of((v for _, v in bound), seen))
        classes.update(dict.fromkeys(c for c in type(module).__mro__ if not c.__module__.startswith("torch.")))
    functions = [f for cls in classes for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    if reached is not None:
        functions += reached.functions
        contents.extend((CODE, c) for c in contents_of([reached.root, *reached.functions, *reached.objects], seen))
    contents.extend((CODE, c) for c in (*map(of_class, classes), *globals_of(functions, seen)))
    known = {id(m) for m in modules}
    beyond = [v for _, c in contents for _, v in c.bound if isinstance(v, nn.Module) and id(v) not in known]
    hidden = tuple((m, m.training, _own(m)) for m in modules_of(*beyond) if id(m) not in known)
    return Census(tuple(modules), _tensors(modules), tuple(kept), tuple(contents), hidden)


def _own(module: nn.Module) -> tuple[torch.Tensor | None, ...]:
    """The module's own parameters and buffers."""
    return (*module._parameters.values(), *module._buffers.values())
