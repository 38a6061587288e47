"""Check of tensor degrees and placements: a plan that divides single ops must name what is there and can be divided."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from partita.errors import UsageError
from partita.graph import Graph, Op, Size
from partita.plan import Plan, Stage
from partita.sharding.choose import matches
from partita.sharding.options import Ways
from partita.sharding.placements import even, parse_placement
from partita.sharding.reading import reading


def tensor_problems(plan: Plan, graph: Graph, stage_of: Mapping[str, int]) -> list[str]:
    """Every problem with ``Stage.tensor`` and ``Stage.shard`` in words, with what to do."""
    problems: list[str] = []
    member: dict[str, tuple[int, tuple[str, ...]]] = {}
    for s, stage in enumerate(plan.stages):
        problems += _degree(s, stage)
        for group in stage.groups:
            for device in group:
                other, known = member.setdefault(device, (s, group))
                if known != group:
                    problems.append(
                        f"{device} divides ops with {', '.join(known)} in stage {other} and with {', '.join(group)} in "
                        f"stage {s}; give it the same group in both"
                    )
        problems += _placements(s, stage, graph, stage_of)
    return problems


def _degree(s: int, stage: Stage) -> list[str]:
    if stage.tensor < 1:
        return [f"stage {s} has tensor {stage.tensor}; it must be at least 1"]
    if stage.tensor > len(stage.devices) > 0:
        return [
            f"stage {s} divides its ops by {stage.tensor} and has {len(stage.devices)} device"
            f"{'s' if len(stage.devices) != 1 else ''}; give it {stage.tensor}, or set tensor to {len(stage.devices)}"
        ]
    if len(stage.devices) % stage.tensor:
        return [
            f"stage {s} has {len(stage.devices)} devices, which do not make groups of {stage.tensor}; take "
            f"{len(stage.devices) % stage.tensor} away or set tensor to a number that divides {len(stage.devices)}"
        ]
    return []


def _placements(s: int, stage: Stage, graph: Graph, stage_of: Mapping[str, int]) -> list[str]:
    problems: list[str] = []
    if stage.shard and stage.tensor < 2:
        return [f"stage {s} lists placements under shard but has tensor 1; set tensor to the number of devices to use"]
    parameters = {t.path: t.name for t in graph.of_role("parameter")}
    parameters |= {alias: parameters[path] for alias, path in graph.ties if path in parameters}
    ops = {op.name: op for op in graph.ops if stage_of.get(op.name) == s}
    for pattern, text in stage.shard:
        try:
            wish = parse_placement(text)
        except UsageError as why:
            problems.append(f"stage {s}, shard of {pattern!r}: {why}")
            continue
        paths = [path for path in parameters if matches(pattern, path)]
        named = [op for name, op in ops.items() if matches(pattern, name)]
        if not paths and not named:
            near = get_close_matches(pattern, [*parameters, *ops], n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; leave it out"
            problems.append(f"stage {s} lists {pattern!r} under shard, which is no parameter and no op of it{hint}")
        elif isinstance(wish, int):
            for path in paths:
                problems += _dim(s, path, graph.tensor(parameters[path]).shape, wish, stage.tensor)
            for op in named:
                problems += _result(s, graph, op, wish, stage.tensor)
    return problems


def _dim(s: int, path: str, shape: tuple[int | Size, ...], dim: int, members: int) -> list[str]:
    if not -len(shape) <= dim < len(shape):
        dims = f"dims 0 to {len(shape) - 1}" if len(shape) > 1 else f"{len(shape)} dim{'s' if not shape else ''}"
        return [f"stage {s} divides dim {dim} of {path!r}, which has {dims}; name one of them"]
    size = shape[dim]
    if isinstance(size, int) and even(size, members) is None:
        return [
            f"stage {s} divides dim {dim} of {path!r}, which has {size} row{'s' if size != 1 else ''}, by {members}: "
            "somebody would have none; divide another dim or leave it out"
        ]
    return []


def _result(s: int, graph: Graph, op: Op, dim: int, members: int) -> list[str]:
    tensor = graph.tensor(op.outputs[0]) if op.outputs and op.outputs[0] else None
    if tensor is None:
        return [f"stage {s} divides {op.name!r}, which makes no tensor; leave it out"]
    wrong = _dim(s, op.name, tensor.shape, dim, members)
    if wrong:
        return wrong
    read = reading(graph, op)
    if read is None:
        return [
            f"stage {s} divides {op.name!r} [{op.target}], of which no rule says how it treats its dims; a line of "
            "partita.sharding_rule would, or leave it out"
        ]
    labels = read.outputs[0][dim % len(tensor.shape)]
    if labels and all(name in read.whole for name in labels):
        whole = [i for i, names in enumerate(read.outputs[0]) if not any(n in read.whole for n in names)]
        rest = f"; dims it can be divided along: {', '.join(map(str, whole))}" if whole else "; leave it out"
        ways = Ways(graph, op, members)
        if ways.parts is None or ways.parts[0] != dim:
            return [f"stage {s} divides dim {dim} of {op.name!r} [{op.target}], which needs that dim whole{rest}"]
    return []
