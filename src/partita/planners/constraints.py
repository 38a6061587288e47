"""Constraints: what a person fixes; the planner decides the rest. Names are qualified names or globs of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from partita.errors import UsageError
from partita.schedules import NAMES


@dataclass(frozen=True, slots=True)
class Constraints:
    """``keep_together``: each entry's modules in one stage (a lone glob: each module it names on its own).

    ``split_before``: a stage begins there. ``place``: (glob, device). ``recompute``: activations dropped and made
    again. ``offload``: activations that wait in host memory. ``offload_parameters``: whose parameters live there, or
    False: nobody's (True leaves it open). ``max_stages``, ``stages`` (exactly so many),
    ``microbatches``: 0 leaves them open. ``schedule``: empty leaves it open. ``replicas``: devices of each stage; True
    leaves them open, False or 1 is one device a stage.
    ``tensor``: devices that divide each single op between them; they count as one device for all else. 1 is no
    division, 0 leaves it open where ``replicas`` is open, for devices without ``place``. ``shard``: (glob of parameters
    or ops, ``Shard(0)`` or ``Replicate``) that such teams keep to. ``tp_within_node``: teams on one node only, or
    (False) over nodes too. ``zero``: ZeRO's level over replicas, 0 to 3, for a process a device (-1: open).

    ``compile``: what ``torch.compile`` makes other code of; ``""``: everything; ``"auto"``, no tuple: where measuring
    shows that it pays, which takes minutes. Nothing is compiled unasked.

    For described clusters only: ``sequence``: activations between products divided along the sequence, or not.
    ``stages_per_device``: stages that a device takes in turn (interleaving). ``place`` may name a kind of device there.
    """

    keep_together: tuple[tuple[str, ...], ...] = ()
    split_before: tuple[str, ...] = ()
    place: tuple[tuple[str, str], ...] = ()
    recompute: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    offload_parameters: tuple[str, ...] | bool = True
    max_stages: int = 0
    stages: int = 0
    microbatches: int = 0
    schedule: str = ""
    replicas: bool | int = True
    tensor: int = 0
    shard: tuple[tuple[str, str], ...] = ()
    zero: int = -1
    tp_within_node: bool | None = None
    sequence: bool | None = None
    stages_per_device: int = 0
    compile: str | tuple[str, ...] = ()

    @property
    def num_replicas(self) -> int:
        """Devices of every stage; 0 where that is open."""
        return 0 if self.replicas is True else max(int(self.replicas), 1)

    @property
    def lent(self) -> tuple[str, ...]:
        """Globs of what has its parameters in host memory."""
        return () if isinstance(self.offload_parameters, bool) else self.offload_parameters

    @property
    def for_clusters(self) -> tuple[str, ...]:
        """Those given that only plans for described clusters can meet."""
        return tuple(n for n in FOR_CLUSTERS if getattr(self, n) != getattr(Constraints(), n))

    @staticmethod
    def read(value: Constraints | Mapping[str, Any] | None) -> Constraints:
        """From what a person wrote. Raises UsageError naming every mistake."""
        if value is None:
            return Constraints()
        if isinstance(value, Constraints):
            return value
        if not isinstance(value, Mapping):
            raise UsageError(f"constraints must be a mapping such as {{'max_stages': 2}}; got {value!r}")
        problems, made = [], {}
        for key, written in value.items():
            if key not in READERS:
                near = get_close_matches(str(key), READERS, n=1)
                problems.append(f"{key!r} is no constraint{f'; did you mean {near[0]!r}?' if near else ''}")
            elif written is not None:
                try:
                    made[key] = READERS[key](written)
                except (TypeError, ValueError) as error:
                    problems.append(f"{key} cannot be read: {error}")
        if problems:
            raise UsageError("constraints: " + "; ".join(problems))
        return Constraints(**made)

    @staticmethod
    def parse(words: Sequence[str], path: str = "") -> Constraints:
        """From a terminal: ``max_stages=2``, ``place={blocks.0: cpu:1}``; lists and mappings under one name add up.

        ``path``: a YAML file of the same names, to which the words add. Raises UsageError.
        """
        try:
            text = Path(path).read_text(encoding="utf-8") if path else ""
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"constraints file {path!r} cannot be read: {error}") from error
        written = _yaml(text, path) or {}
        if not isinstance(written, dict):
            raise UsageError(f"constraints file {path!r} must be a mapping such as 'max_stages: 2'")
        for word in words:
            name, _, text = (part.strip() for part in word.partition("="))
            value = _yaml(text, word)
            if value is None:
                raise UsageError(f"constraint {word!r} has no value; write NAME=VALUE, such as max_stages=2")
            written[name] = _added(written.get(name), value)
        return Constraints.read(written)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"constraints: {where!r} is no YAML: {error}") from error


def _added(before: Any, value: Any) -> Any:
    """Both together, where they are lists, names or mappings; else the later one."""
    if isinstance(before, dict) and isinstance(value, dict):
        return {**before, **value}
    if isinstance(before, str | list) and isinstance(value, str | list):
        return [*_several(before), *_several(value)]
    return value


def _several(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        raise ValueError(f"a list of names is needed, not {value!r}")
    return (value,) if isinstance(value, str) else tuple(value)


def _names(value: Any) -> tuple[str, ...]:
    return tuple(map(str, _several(value)))


def _groups(value: Any) -> tuple[tuple[str, ...], ...]:
    return tuple((entry,) if isinstance(entry, str) else _names(entry) for entry in _several(value))


def _pairs(value: Any) -> tuple[tuple[str, str], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    return tuple((str(name), str(device)) for name, device in pairs)


def _lent(value: Any) -> tuple[str, ...] | bool:
    return value if isinstance(value, bool) else _names(value) or True


def _count(value: Any) -> int:
    count = int(value)
    if count < 0 or isinstance(value, bool) or count != float(value):
        raise ValueError(f"{value!r} must be a whole number, 1 or more (0 leaves it open)")
    return count


def _degree(value: Any) -> bool | int:
    return value if isinstance(value, bool) else _count(value) or True


def _compiled(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, bool):
        return ("",) if value else ()
    return "auto" if value == "auto" else _names(value)


def _schedule(value: Any) -> str:
    if value and value not in NAMES:
        raise ValueError(f"schedule {value!r} is not known; take one of {', '.join(NAMES)}")
    return str(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} must be true or false")
    return value


def _level(value: Any) -> int:
    if isinstance(value, bool) or value not in (-1, 0, 1, 2, 3):
        raise ValueError(f"{value!r} must be a ZeRO level: 0, 1, 2 or 3 (-1 leaves it open)")
    return int(value)


def _placements(value: Any) -> tuple[tuple[str, str], ...]:
    """``{head.weight: Shard(0)}`` or, as in a plan file, ``{head.weight: [Shard(0)]}``."""
    found = []
    for name, written in value.items() if isinstance(value, Mapping) else value:
        text = ", ".join(map(str, written)) if isinstance(written, list | tuple) else str(written)
        if not _PLACEMENT.fullmatch(text):
            raise ValueError(f"{name!r} as {text!r}: one placement is needed, Shard(0), Shard(1) ... or Replicate")
        found.append((str(name), text.removesuffix("()")))
    return tuple(found)


FOR_CLUSTERS = ("sequence", "stages_per_device")
_PLACEMENT = re.compile(r"Shard\(\d+\)|Replicate(\(\))?")
READERS: Mapping[str, Callable[[Any], Any]] = {
    "keep_together": _groups, "split_before": _names, "place": _pairs, "recompute": _names, "offload": _names,
    "offload_parameters": _lent, "max_stages": _count, "stages": _count, "microbatches": _count,
    "schedule": _schedule, "replicas": _degree, "tensor": _count, "shard": _placements, "zero": _level,
    "tp_within_node": _switch, "sequence": _switch, "stages_per_device": _count, "compile": _compiled,
}  # fmt: skip
"""How each constraint is read from plain data: strings, numbers, lists, mappings."""
