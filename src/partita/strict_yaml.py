"""Strict YAML: a file becomes a msgspec Struct, or every mistake in it is named with its line.

All scalars are read as text and converted by the field's type, so a module called ``0`` or ``1.10`` stays a name.
"""

from __future__ import annotations

import difflib
import os
import tempfile
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import msgspec
import yaml

from partita.errors import UsageError

T = TypeVar("T", bound=msgspec.Struct)
Path_ = tuple[str | int, ...]
MAX_DEPTH = 40
MAX_NODES = 1_000_000


def nearest(word: str, known: Sequence[str]) -> str:
    """``"; did you mean 'x'?"`` where something known is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The file's text. ``what`` names the kind of file in the refusal."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = Path(path).parent
        names = [p.name for p in beside.iterdir()] if beside.is_dir() else []
        raise UsageError(f"no {what} at '{path}'{nearest(Path(path).name, names)}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read the {what} '{path}': not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise UsageError(f"cannot read the {what} '{path}': {error.strerror or error}") from None


def write_text(path: str | os.PathLike[str], text: str, what: str) -> None:
    """Write all of it or nothing: a temporary file beside the target, then a rename."""
    target = Path(path)
    scratch = ""
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)
        os.replace(scratch, target)
    except OSError as error:
        if scratch and os.path.exists(scratch):
            os.unlink(scratch)
        reason = error.strerror or str(error)
        step = "" if target.parent.is_dir() else f"; make the directory '{target.parent}' first"
        raise UsageError(f"cannot write the {what} '{path}': {reason}{step}") from None


class Reader:
    """One YAML text as plain values, the line of each, and the problems found so far."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self.lines: dict[Path_, int] = {}
        self.problems: list[str] = []
        self._found: list[int] = []
        self._nodes = 0
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise UsageError(f"{source} is not YAML: {where}{reason}") from None
        self.tree = self._plain(node, ()) if node is not None else None

    def _plain(self, node: yaml.Node, path: Path_) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        self._nodes += 1
        if len(path) > MAX_DEPTH or self._nodes > MAX_NODES:
            raise UsageError(f"{self.source}: line {node.start_mark.line + 1}: nested too deeply or too large")
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    self.problem((*path, "?"), "a key must be plain text", line=key.start_mark.line + 1)
                    continue
                self.lines[(*path, key.value)] = key.start_mark.line + 1
                if key.value in result:
                    self.problem((*path, key.value), "written twice; keep one")
                result[key.value] = self._plain(value, (*path, key.value))
            return result
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*path, i)) for i, item in enumerate(node.value)]
        return node.value

    def problem(self, path: Path_, text: str, line: int | None = None) -> None:
        line = line or self.lines.get(path) or self.lines.get(path[:-1]) or 0
        where = f"line {line}: " if line else ""
        self._found.append(line)
        self.problems.append(f"{where}{spell(path)}{': ' if path else ''}{text}")

    def sorted_problems(self) -> tuple[str, ...]:
        """In the order of the file's lines."""
        order = sorted(range(len(self.problems)), key=lambda i: self._found[i])
        return tuple(self.problems[i] for i in order)

    def fill(self, kind: type[T], tree: Any, path: Path_ = ()) -> T | None:
        """``tree`` as ``kind``; None (with problems noted) where it does not fit."""
        if not isinstance(tree, dict):
            self.problem(path, f"expected keys and values, found {show(tree)}")
            return None
        before = len(self.problems)
        fields = {f.name: f for f in msgspec.structs.fields(kind)}
        for key in tree:
            if key not in fields:
                hint = nearest(key, tuple(fields)) or f" (known: {', '.join(fields)})"
                self.problem((*path, key), f"unknown key{hint}")
        values: dict[str, Any] = {}
        for name, info in fields.items():
            if name in tree:
                values[name] = self._value(info.type, tree[name], (*path, name))
            elif info.required:
                self.problem(path, f"'{name}' is missing")
        return kind(**values) if len(self.problems) == before else None

    def _value(self, kind: Any, tree: Any, path: Path_) -> Any:
        kind = _without_none(kind)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self.fill(kind, tree, path)
        item = get_args(kind)[0] if get_origin(kind) is tuple else None
        if isinstance(item, type) and issubclass(item, msgspec.Struct):
            if not isinstance(tree, list):
                self.problem(path, f"expected a list, found {show(tree)}")
                return ()
            return tuple(self.fill(item, entry, (*path, i)) for i, entry in enumerate(tree))
        try:
            return msgspec.convert(tree, kind, strict=False)
        except msgspec.ValidationError:
            choices = get_args(kind) if get_origin(kind) is typing.Literal else ()
            near = nearest(tree, choices) if isinstance(tree, str) else ""
            self.problem(path, f"expected {describe(kind)}, found {show(tree)}{near}")
            return None


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        kept = [k for k in get_args(kind) if k is not type(None)]
        return kept[0] if len(kept) == 1 else kind
    return kind


def spell(path: Path_) -> str:
    """('stages', 0, 'devices') -> 'stages[0].devices'."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def show(value: Any) -> str:
    if value == "":
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value if len(str(value)) < 60 else str(value)[:57] + "...")


def describe(kind: Any) -> str:
    """A type in a reader's words."""
    plain = {int: "a whole number", float: "a number", str: "text"}
    if kind in plain:
        return plain[kind]
    if get_origin(kind) is tuple:
        return "a list of whole numbers" if get_args(kind)[0] is int else "a list of names"
    if get_origin(kind) is dict:
        return "names and values"
    if get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(get_args(kind))
    return "another kind of value"


class Flow(dict[str, Any]):
    """A mapping written on one line where it fits."""


class FlowList(list[Any]):
    """A list written on one line where it fits."""


class _Dumper(yaml.SafeDumper):
    def analyze_scalar(self, scalar: str) -> Any:
        analysis = super().analyze_scalar(scalar)
        # 'cpu:0' needs no quotes inside [...]: a colon only ends a key where a space follows.
        if scalar and all(c.isalnum() or c in ":_./@-" for c in scalar) and scalar[0].isalpha() and scalar[-1] != ":":
            analysis.allow_flow_plain = True
        return analysis

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


_Dumper.add_representer(Flow, lambda d, v: d.represent_mapping("tag:yaml.org,2002:map", v.items(), flow_style=True))
_Dumper.add_representer(FlowList, lambda d, v: d.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))


def dump(tree: dict[str, Any]) -> str:
    """YAML in the order given; ``Flow`` and ``FlowList`` on one line each."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=False)
