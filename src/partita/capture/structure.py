"""Nested Python values taken apart into their tensors, and put together again around other tensors.

Lists, tuples, dicts, dataclasses and plain objects that hold tensors are rebuilt; everything else stays the
object it was. Sharing (the same tensor or list twice) and cycles survive.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from partita.capture.contents import Contents, contents_of

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout,
          torch.memory_format, torch.Size, torch.Generator, torch.nn.Module, type, types.ModuleType,
          types.FunctionType, types.MethodType, types.BuiltinFunctionType)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Node:
    """``kind``: 'tensor' (``value``: its position), 'atom' (the value itself), 'sequence', 'dict' or 'object'
    (``value``: class and default factory). ``keys``/``children``: the parts, by node number; ``attributes``: those of a
    dict's or an object's ``__dict__``.
    """

    kind: str
    value: Any = None
    keys: tuple[Any, ...] = ()
    children: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    attributes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Structure:
    """A value without its tensors. ``paths``: where each tensor stands (``[0]['ids']``)."""

    nodes: tuple[Node, ...]
    paths: tuple[str, ...]
    root: int = 0

    def contents(self) -> tuple[Contents, ...]:
        """What the objects that stay as they are (configurations, arrays, functions) hold now."""
        return tuple(contents_of((n.value for n in self.nodes if n.kind == "atom"), set()))


def _slots(value: Any) -> list[str]:
    found: list[str] = []
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        found.extend([slots] if isinstance(slots, str) else slots)
    return [s for s in found if s not in ("__dict__", "__weakref__") and hasattr(value, s)]


def take_apart(value: Any, containers: dict[int, Any] | None = None) -> tuple[list[torch.Tensor], Structure]:
    """The tensors in a value, each once, in order of first appearance, and what is around them.

    ``containers``: gets the lists, dicts and objects that would be rebuilt, by node number.
    """
    nodes: list[Node | None] = []
    tensors: list[torch.Tensor] = []
    paths: list[str] = []
    seen: dict[int, int] = {}
    alive: list[Any] = []
    holds: set[int] = set()  # nodes with a tensor inside

    def visit(item: Any, path: str) -> int:
        if not isinstance(item, _ATOMS) and id(item) in seen:
            return seen[id(item)]
        number = len(nodes)
        nodes.append(None)
        if isinstance(item, torch.Tensor):
            seen[id(item)] = number
            alive.append(item)
            holds.add(number)
            nodes[number] = Node("tensor", len(tensors))
            tensors.append(item)
            paths.append(path)
            return number
        if isinstance(item, _ATOMS):
            nodes[number] = Node("atom", item)
            return number
        seen[id(item)] = number
        alive.append(item)
        holds.add(number)  # until known better: a cycle back here is rebuilt
        keys: tuple[Any, ...] = ()
        children: tuple[int, ...] = ()
        fields: dict[str, Any] = {}
        if isinstance(item, list | tuple):
            children = tuple(visit(v, f"{path}[{i}]") for i, v in enumerate(item))
        else:
            if isinstance(item, dict):
                keys = tuple(item)
                children = tuple(visit(dict.__getitem__(item, key), f"{path}[{key!r}]") for key in keys)
            fields = dict(vars(item)) if hasattr(item, "__dict__") else {}
            fields.update({s: getattr(item, s) for s in _slots(item)})
        attributes = tuple(visit(v, f"{path}.{k}") for k, v in fields.items())
        kind = "sequence" if isinstance(item, list | tuple) else "dict" if isinstance(item, dict) else "object"
        if holds.isdisjoint((*children, *attributes)):
            holds.discard(number)
        if kind == "object" and number not in holds:
            nodes[number] = Node("atom", item)
            del nodes[number + 1 :]  # its parts do not matter
            for key in [k for k, v in seen.items() if v > number]:
                del seen[key]
        else:
            if containers is not None:
                containers[number] = item
            factory = getattr(item, "default_factory", None) if kind == "dict" else None
            nodes[number] = Node(kind, (type(item), factory), keys, children, tuple(fields), attributes)
        return number

    root = visit(value, "")
    return tensors, Structure(tuple(n for n in nodes if n is not None), tuple(paths), root)


def put_together(structure: Structure, tensors: list[Any], containers: dict[int, Any] | None = None) -> Any:
    """The value again, with these tensors in their places. ``containers``: as above."""
    made: dict[int, Any] = {} if containers is None else containers

    def build(number: int) -> Any:
        if number in made:
            return made[number]
        node = structure.nodes[number]
        if node.kind == "tensor":
            return tensors[node.value]
        if node.kind == "atom":
            return node.value
        cls = node.value[0]
        if node.kind == "sequence":
            if issubclass(cls, tuple):
                parts = [build(c) for c in node.children]
                struct = hasattr(cls, "n_sequence_fields")  # torch.return_types: what max, sort, topk give
                made[number] = cls(parts) if struct else tuple.__new__(cls, parts)
            else:
                made[number] = filled = cls.__new__(cls)
                list.extend(filled, [build(c) for c in node.children])
            return made[number]
        made[number] = new = cls.__new__(cls)
        if node.kind == "dict":
            if node.value[1] is not None:
                new.default_factory = node.value[1]
            for key, child in zip(node.keys, node.children, strict=True):
                dict.__setitem__(new, key, build(child)) if cls is dict else _set_item(cls, new, key, build(child))
        for name, child in zip(node.names, node.attributes, strict=True):
            value = build(child)
            if hasattr(new, "__dict__"):
                new.__dict__[name] = value
            else:
                object.__setattr__(new, name, value)
        return new

    return build(structure.root)


def _set_item(cls: type, new: Any, key: Any, value: Any) -> None:
    """Past a subclass's own ``__setitem__``, but through OrderedDict's (it keeps the order)."""
    import collections

    base: Any = collections.OrderedDict if issubclass(cls, collections.OrderedDict) else dict
    base.__setitem__(new, key, value)


Held = tuple[list[Any] | dict[Any, Any] | None, dict[str, Any] | None]


def held_by(container: Any) -> Held:
    """What a list, dict or object holds itself: its items, its attributes."""
    items = list(container) if isinstance(container, list) else None
    if isinstance(container, dict):
        return dict(dict.items(container)), dict(vars(container)) if hasattr(container, "__dict__") else None
    return items, dict(vars(container)) if items is None and hasattr(container, "__dict__") else None


def still_holds(container: Any, then: Held) -> bool:
    """Whether the very same things are still in it."""
    now = held_by(container)
    return all(identical(a, b) for a, b in zip(now, then, strict=True))


def identical(a: Any, b: Any) -> bool:
    """Whether two lists, or dicts, hold the very same things in one order."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(v is b[k] for k, v in a.items())
    return a is b or (len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True)))


def fill(container: Any, held: Held) -> None:
    """Put these items and attributes in the place of what is in it."""
    items, attributes = held
    if isinstance(items, list):
        list.__setitem__(container, slice(None), items)
    elif items is not None:
        for key in [k for k in container if k not in items]:
            dict.pop(container, key)
        for key, item in items.items():
            _set_item(type(container), container, key, item)
    if attributes is not None:
        vars(container).clear()
        vars(container).update(attributes)


def same(a: Structure, b: Structure, equal: Callable[[Any, Any], bool] | None = None) -> bool:
    """Whether two values differ in nothing but their tensors."""
    if len(a.nodes) != len(b.nodes) or a.paths != b.paths:
        return False
    for x, y in zip(a.nodes, b.nodes, strict=True):
        if (x.kind, x.keys, x.children, x.names, x.attributes) != (y.kind, y.keys, y.children, y.names, y.attributes):
            return False
        if x.kind == "atom":
            if not (equal or _equal)(x.value, y.value):
                return False
        elif x.kind == "tensor":
            if x.value != y.value:
                return False
        elif x.value[0] is not y.value[0]:
            return False
    return True


def _equal(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if type(x) is not type(y):
        return False
    try:
        return bool(x == y) or (x != x and y != y)
    except Exception:
        return False
