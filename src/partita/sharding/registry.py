"""Which rule an op has: the table of built-in rules and the door for users' own ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from partita.errors import UsageError
from partita.sharding.call import Call, Ruling
from partita.sharding.notation import Rule, parse

RuleFunction = Callable[[Call], Ruling]
Entry = Rule | RuleFunction
Decorated = TypeVar("Decorated")

_BUILT_IN: dict[str, Entry] = {}
_CUSTOM: dict[str, Rule] = {}


def define(names: str | Iterable[str], text: str) -> None:
    """Enter one rule for several ops (``linear`` or ``add.Tensor``, of ``aten`` unless said otherwise)."""
    for name in _targets(names):
        assert name not in _BUILT_IN, f"two rules for {name}"
        _BUILT_IN[name] = parse(text)


def rule_for(names: str | Iterable[str]) -> Callable[[RuleFunction], RuleFunction]:
    """Enter a function of the call as the rule of several ops."""

    def enter(function: RuleFunction) -> RuleFunction:
        for name in _targets(names):
            assert name not in _BUILT_IN, f"two rules for {name}"
            _BUILT_IN[name] = function
        return function

    return enter


def _targets(names: str | Iterable[str]) -> list[str]:
    listed = names.split() if isinstance(names, str) else list(names)
    return [name if name.startswith(("aten.", "partita.")) else f"aten.{name}" for name in listed]


def find(target: str) -> Entry | None:
    """The rule of an op: a user's, the overload's, the op's, the functional form's of an in-place op; or None."""
    base, _, overload = target.rpartition(".")
    for name in (target, base):
        if name in _CUSTOM:
            return _CUSTOM[name]
    for name in (target, base):
        if name in _BUILT_IN:
            return _BUILT_IN[name]
    if base.endswith("_") and not base.endswith("__"):
        for name in (f"{base[:-1]}.{overload}", base[:-1]):
            if name in _BUILT_IN:
                return _BUILT_IN[name]
    return None


def built_in() -> tuple[str, ...]:
    """Every target (or op without overload) that has a built-in rule."""
    return tuple(_BUILT_IN)


def is_custom(target: str) -> bool:
    return target in _CUSTOM or target.rpartition(".")[0] in _CUSTOM


def sharding_rule(text: str, *, op: object = None) -> Callable[[Decorated], Decorated]:
    """Tell how a custom or fused op treats its dims, as a decorator or with ``op=`` for an op that exists.

    >>> @sharding_rule("b k, k n, +n? -> b n")
    ... def my_fused_op(x, w, bias=None): ...

    Takes a function (known by its qualified name), a ``torch.library`` custom op, or an operator of ``torch.ops``.
    The language stands in ``partita.sharding.notation``; a rule that cannot be read raises ``UsageError``.
    """
    rule = parse(text)

    def register(thing: Decorated) -> Decorated:
        _CUSTOM[target_name(thing)] = rule
        return thing

    if op is not None:
        register(op)
    return register


def target_name(thing: Any) -> str:
    """The name under which a graph holds calls of this op."""
    if isinstance(thing, str):
        name = thing
    elif isinstance(getattr(thing, "_qualname", None), str) and "::" in thing._qualname:
        name = thing._qualname
    elif isinstance(getattr(thing, "__qualname__", None), str) and not hasattr(thing, "overloads"):
        name = thing.__qualname__ if not hasattr(thing, "_schema") else str(thing)
    else:
        name = str(thing)
    name = name.replace("::", ".").removeprefix("torch.ops.")
    if not name or " " in name or "<" in name.replace("<locals>", ""):
        raise UsageError(
            f"sharding_rule cannot tell which op {thing!r} is: give a function, a torch.library custom op, an operator "
            "such as torch.ops.mylib.fused, or its name 'mylib::fused'"
        )
    return name.removesuffix(".default")
