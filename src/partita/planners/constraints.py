"""Constraints: what a person fixes; the planner decides the rest. Names are qualified names or globs of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from partita.check_tensor import tensor_problems
from partita.cluster import Cluster
from partita.errors import PlanError, UsageError
from partita.graph import Graph, Op
from partita.plan import Plan, Stage
from partita.schedules import NAMES

Named = tuple[tuple[str, tuple[int, ...]], ...]
"""(name, its ops)."""


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


def enclosing(op: Op) -> tuple[str, ...]:
    """Every name the op answers to: its module's path, each module around it (calls without ``@n`` too), its own."""
    names: dict[str, None] = {}
    if op.module:
        parts = op.module.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            names[".".join(p.partition("@")[0] for p in parts[: i + 1])] = None
            names[name] = None
    names[op.name] = None
    return tuple(names)


def find(graph: Graph, glob: str) -> dict[str, tuple[int, ...]]:
    """Outermost matching name -> its ops (indices), for a glob or a plain name."""
    found: dict[str, list[int]] = {}
    for i, op in enumerate(graph.ops):
        for name in enclosing(op):
            if name == glob or fnmatchcase(name, glob):
                found.setdefault(name, []).append(i)
                break
    return {name: tuple(ops) for name, ops in found.items()}


def resolve(graph: Graph, cluster: Cluster, constraints: Constraints) -> Resolved:
    """The constraints as ops and devices. Raises PlanError with every unknown name and contradiction."""
    problems: list[str] = []

    def ops_of(glob: str, what: str) -> dict[str, tuple[int, ...]]:
        found = find(graph, glob)
        if not found:
            names = list(dict.fromkeys(n for op in graph.ops for n in enclosing(op)))
            near = get_close_matches(glob, names, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else f"; the model has {', '.join(names[:6])}, ..."
            problems.append(f"{what}: {glob!r} names no module or op of {graph.name or 'the model'}{hint}")
        return found

    groups: list[tuple[str, tuple[int, ...]]] = []
    for entry in constraints.keep_together:
        found = [(name, ops) for glob in entry for name, ops in ops_of(glob, "keep_together").items()]
        if len(entry) == 1:
            groups += found
        elif found:
            groups.append((" + ".join(entry), tuple(sorted({i for _, ops in found for i in ops}))))
    starts: list[tuple[str, int]] = []
    for glob in constraints.split_before:
        starts += [(name, min(ops)) for name, ops in ops_of(glob, "split_before").items()]
    place: dict[int, tuple[str, str]] = {}
    devices = {d.name for d in cluster.devices}
    for glob, device in constraints.place:
        if device not in devices:
            problems.append(f"place: no device {device!r}; there are {', '.join(sorted(devices))}")
        for ops in ops_of(glob, "place").values():
            for i in ops:
                if i in place and place[i][1] != device:
                    problems.append(
                        f"place: {graph.ops[i].name} is put on {place[i][1]} by {place[i][0]!r} and on {device} by "
                        f"{glob!r}; drop one of the two"
                    )
                place.setdefault(i, (glob, device))
    again = tuple((name, ops) for glob in constraints.recompute for name, ops in ops_of(glob, "recompute").items())
    away = tuple((name, ops) for glob in constraints.offload for name, ops in ops_of(glob, "offload").items())
    for name, ops in away:
        twice = next((other for other, theirs in again if not set(ops).isdisjoint(theirs)), None)
        if twice is not None:
            problems.append(f"recompute {twice!r} and offload {name!r} contradict: keep each part under one of them")
    lent = tuple((n, ops) for glob in constraints.lent for n, ops in ops_of(glob, "offload_parameters").items())
    problems += _lent_problems(graph, lent, again, away)
    for name, start in starts:
        for group, ops in groups:
            if min(ops) < start <= max(ops):
                problems.append(
                    f"keep_together {group!r} and split_before {name!r} contradict: {name!r} lies "
                    "inside; drop one of the two"
                )
        if start == 0:
            problems.append(f"split_before {name!r}: it is the beginning of the model; there is nothing before it")
    for group, ops in groups:
        where = {place[i][1]: place[i][0] for i in ops if i in place}
        if len(where) > 1:
            (a, x), (b, y), *_ = where.items()
            problems.append(f"keep_together {group!r} contradicts place {x!r} on {a} and place {y!r} on {b}")
    problems += _degrees(constraints, len({s for _, s in starts if s}) + 1, len(cluster.devices))
    problems += _divisions(graph, cluster, constraints)
    used, most = len({d for _, d in place.values()}), _most_stages(constraints, len(cluster.devices))
    if used > most:
        problems.append(f"place uses {used} devices, each a stage of its own, but {most} stages are allowed")
    if problems:
        raise PlanError("the constraints cannot be met", tuple(dict.fromkeys(problems)))
    return Resolved(
        tuple(groups), tuple(starts), tuple((i, d) for i, (_, d) in sorted(place.items())), again, away, lent
    )


def _lent_problems(graph: Graph, lent: Named, again: Named, away: Named) -> Iterator[str]:
    """What is wrong with parameters asked to live in host memory."""
    inside = {i for _, ops in lent for i in ops}
    held: dict[str, str] = {}
    for name, ops in lent:
        for word, others in (("recompute", again), ("offload", away)):
            for other, theirs in others:
                if not set(ops).isdisjoint(theirs) and (word == "recompute" or other != name):
                    both = f"{word} {other!r} and offload_parameters {name!r}"
                    yield f"{both} contradict: keep each part under one of them"
        held |= {n: name for i in ops for n in graph.ops[i].uses() if graph.tensor(n).role == "parameter"}
    for i, op in enumerate(graph.ops):
        for used in op.uses() if held and i not in inside else ():
            if used in held:
                yield (
                    f"offload_parameters {held[used]!r}: {graph.tensor(used).path or used} is used by {op.name} too; "
                    "name that as well, or neither"
                )


def _most_stages(constraints: Constraints, devices: int) -> int:
    return min(filter(None, (constraints.max_stages, constraints.stages)), default=devices)


def _degrees(constraints: Constraints, needed: int, devices: int) -> list[str]:
    """What is wrong with numbers of stages, replicas and microbatches. ``needed``: stages that split points make."""
    lines = []
    exact, most, replicas = constraints.stages, constraints.max_stages, constraints.num_replicas
    if most and needed > most:
        lines.append(f"max_stages {most} and {needed - 1} split points contradict: they make {needed} stages")
    if exact and needed > exact:
        lines.append(f"stages {exact} and {needed - 1} split points contradict: they make {needed} stages")
    if exact and most and exact > most:
        lines.append(f"stages {exact} and max_stages {most} contradict")
    if needed > devices:
        lines.append(f"split_before makes {needed} stages, but there are {devices} devices")
    tensor = max(constraints.tensor, 1)
    if tensor > devices:
        return [*lines, f"tensor {tensor} needs {tensor} devices a stage; there are {devices}"]
    wide = max(replicas, 1) * tensor
    if max(exact, 1) * wide > devices:
        each = [f"replicas {replicas}"] * (replicas > 1) + [f"tensor {tensor}"] * (tensor > 1)
        what = " with ".join([f"stages {exact}"] * bool(exact) + each)
        what = f"stages {exact} of {replicas} replicas" if exact and replicas > 1 and tensor == 1 else what
        lines.append(f"{what} need {max(exact, 1) * wide} devices; there are {devices}")
    if tensor > 1 and needed > 1 and needed * tensor > devices >= needed:
        lines.append(f"{needed} stages with tensor {tensor} need {needed * tensor} devices; there are {devices}")
    if replicas > 1 and needed > 1 and needed * replicas > devices >= needed:
        lines.append(f"{needed} stages of {replicas} replicas need {needed * replicas} devices; there are {devices}")
    if constraints.microbatches and replicas > constraints.microbatches:
        lines.append(f"replicas {replicas} and microbatches {constraints.microbatches} contradict: one would idle")
    return lines


def _divisions(graph: Graph, cluster: Cluster, constraints: Constraints) -> list[str]:
    """What is wrong with wishes for divided ops and state."""
    lines = []
    members = max(constraints.tensor, 2)
    if constraints.shard and constraints.tensor == 1:
        lines.append(
            f"shard {constraints.shard[0][0]!r} and tensor 1 contradict: nothing is divided; drop one of the two"
        )
    elif constraints.shard:
        stage = Stage(tuple(f"member {k}" for k in range(members)), shard=constraints.shard, tensor=members)
        found = tensor_problems(Plan((stage,)), graph, dict.fromkeys((op.name for op in graph.ops), 0))
        lines += [line.removeprefix("stage 0").lstrip(", ") for line in found]
    most = max(Counter(d.node for d in cluster.devices).values(), default=0)
    if constraints.tp_within_node and constraints.tensor > most:
        lines.append(f"tensor {constraints.tensor} and tp_within_node contradict: a node has {most} devices")
    if constraints.lent and (constraints.zero > 0 or constraints.tensor > 1):
        what = f"zero {constraints.zero}" if constraints.zero > 0 else f"tensor {constraints.tensor}"
        lines.append(
            f"{what} and offload_parameters contradict: a device would hold parts of both; drop one of the two"
        )
    if constraints.zero > 0 and constraints.num_replicas == 1:
        lines.append(f"zero {constraints.zero} and replicas 1 contradict: it shards over replicas; drop one of the two")
    return lines


@dataclass(frozen=True, slots=True)
class Resolved:
    """Constraints in op indices: (name, ops) groups, (name, first op) starts, (op, device) places, (name, ops) to
    recompute, to offload, whose parameters live in host memory."""

    together: Named = ()
    starts: tuple[tuple[str, int], ...] = ()
    place: tuple[tuple[int, str], ...] = ()
    recompute: Named = ()
    offload: Named = ()
    lent: Named = ()
