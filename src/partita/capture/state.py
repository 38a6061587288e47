"""What a forward may change besides its result: random generators, module attributes, buffers; saved and put back."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from partita.torch_compat import version

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)
# Registries (compared by other means), and lists that recurrent layers rebuild from their parameters at will.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOOKS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_flat_weights", "_flat_weight_refs")


@dataclass(frozen=True, slots=True)
class Generators:
    """The states of all random generators a model may draw from."""

    torch_cpu: torch.Tensor
    cuda: tuple[torch.Tensor, ...]
    python: Any
    numpy: Any

    @classmethod
    def save(cls) -> Generators:
        started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = tuple(torch.cuda.get_rng_state_all()) if started else ()
        numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        return cls(torch.get_rng_state(), cuda, random.getstate(), numpy)

    def restore(self) -> None:
        torch.set_rng_state(self.torch_cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def same(self, other: Generators) -> bool:
        """Whether nothing was drawn between the two."""
        return (
            bool(torch.equal(self.torch_cpu, other.torch_cpu))
            and len(self.cuda) == len(other.cuda)
            and all(bool(torch.equal(a, b)) for a, b in zip(self.cuda, other.cuda, strict=True))
            and self.python == other.python
            and repr(self.numpy) == repr(other.numpy)
        )


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Draws inside leave no mark on the generators."""
    saved = Generators.save()
    try:
        yield
    finally:
        saved.restore()


def python_draws() -> tuple[Any, Any]:
    """A value that changes when Python's or NumPy's generator is drawn from."""
    numpy = None
    if "numpy" in sys.modules:
        _, keys, position, has_gauss, gauss = sys.modules["numpy"].random.get_state()
        numpy = (keys.tobytes(), position, has_gauss, gauss)
    return random.getstate(), numpy


def _digest(value: Any, depth: int, seen: frozenset[int]) -> Any:
    """A comparable picture of a value: contents of containers and plain objects, identity of the rest."""
    if isinstance(value, _PLAIN):
        return (type(value).__name__, "nan") if value != value else value
    if isinstance(value, torch.Tensor):
        return ("tensor", id(value), version(value) if not value.is_inference() else 0)
    if id(value) in seen or depth == 0 or isinstance(value, nn.Module):
        return ("object", id(value))
    inner = seen | {id(value)}
    if isinstance(value, dict):
        items = tuple((_digest(k, 1, inner), _digest(v, depth - 1, inner)) for k, v in value.items())
        return (type(value).__name__, id(value), items)
    if isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "deque":
        return (type(value).__name__, 0 if isinstance(value, tuple) else id(value),
                tuple(_digest(v, depth - 1, inner) for v in value))  # fmt: skip
    if hasattr(value, "__dict__") and not callable(value):
        return ("object", id(value), _digest(vars(value), depth - 1, inner))
    return ("object", id(value))


def _copy_container(value: Any, depth: int, memo: dict[int, Any]) -> None:
    """Remember the contents of every mutable container reachable from ``value``."""
    if depth == 0 or id(value) in memo or isinstance(value, (*_PLAIN, torch.Tensor, nn.Module)):
        return
    if isinstance(value, dict):
        memo[id(value)] = (value, dict(value))
        children: Any = list(value.values())
    elif isinstance(value, list):
        memo[id(value)] = (value, list(value))
        children = list(value)
    elif isinstance(value, set) or type(value).__name__ == "deque":
        memo[id(value)] = (value, list(value))
        children = []
    elif isinstance(value, tuple):
        children = value
    elif hasattr(value, "__dict__") and not callable(value):
        memo[id(value)] = (vars(value), dict(vars(value)))
        children = list(vars(value).values())
    else:
        return
    for child in children:
        _copy_container(child, depth - 1, memo)


def _put_back(container: Any, contents: Any) -> None:
    """The old contents, by the base class's own methods (a subclass may forbid changes)."""
    if isinstance(container, list):
        if not _same_items(container, contents):
            list.__setitem__(container, slice(None), contents)
    elif isinstance(container, dict):
        if list(container) != list(contents) or not _same_items(list(container.values()), list(contents.values())):
            base: Any = OrderedDict if isinstance(container, OrderedDict) else dict
            base.clear(container)
            base.update(container, contents)
    elif not _same_items(list(container), contents):
        container.clear()
        for item in contents:
            container.add(item) if isinstance(container, set) else container.append(item)


def _same_items(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


class ModuleState:
    """The attributes of every module of a model at one moment. Buffers' and parameters' values are not kept here."""

    DEPTH = 4

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.contents: dict[int, Any] = {}
        self.digests: dict[str, dict[str, Any]] = {}
        self.attributes: dict[str, dict[str, Any]] = {}
        self.registries: dict[str, tuple[dict[str, Any], ...]] = {}
        for path, module in self.modules.items():
            own = {k: v for k, v in vars(module).items() if k not in _REGISTRIES}
            self.attributes[path] = own
            self.registries[path] = (dict(module._parameters), dict(module._buffers), dict(module._modules))
            for value in own.values():
                _copy_container(value, self.DEPTH, self.contents)
            self.digests[path] = self._picture(module)

    def _picture(self, module: nn.Module) -> dict[str, Any]:
        return {k: _digest(v, self.DEPTH, frozenset()) for k, v in vars(module).items() if k not in _HOOKS}

    def changes(self) -> list[tuple[str, str]]:
        """(module path, attribute) of everything that is no longer what it was."""
        found: list[tuple[str, str]] = []
        for path, module in self.modules.items():
            now, then = self._picture(module), self.digests[path]
            both = dict.fromkeys([*then, *now])
            found.extend((path, k) for k in both if now.get(k, _MISSING) != then.get(k, _MISSING))
            if set(module._modules) != set(self.registries[path][2]):
                found.append((path, "_modules"))
        return found

    def value(self, path: str, attribute: str) -> Any:
        """The attribute as it was."""
        return self.attributes[path].get(attribute)

    def put_back(self, path: str, attribute: str) -> None:
        """Restore one attribute, with the contents of the containers in it."""
        memo: dict[int, Any] = {}
        if attribute in self.attributes[path]:
            self.modules[path].__dict__[attribute] = self.attributes[path][attribute]
            _copy_container(self.attributes[path][attribute], self.DEPTH, memo)
            for key in memo:
                if key in self.contents:
                    _put_back(*self.contents[key])
        else:
            self.modules[path].__dict__.pop(attribute, None)

    def restore(self) -> None:
        """Put every attribute and container back. Parameters and buffers: the same objects as before."""
        for path, module in self.modules.items():
            now = module.__dict__
            for key in [k for k in now if k not in _REGISTRIES and k not in self.attributes[path]]:
                del now[key]
            now.update(self.attributes[path])
            for registry, old in zip(
                (module._parameters, module._buffers, module._modules), self.registries[path], strict=True
            ):
                if dict(registry) != old if registry is module._modules else _differ(registry, old):
                    registry.clear()
                    registry.update(old)
        for container, contents in self.contents.values():
            _put_back(container, contents)


_MISSING = object()


def _differ(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) != list(b) or any(a[k] is not b[k] for k in a)
