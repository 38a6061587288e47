"""Check: everything wrong with a plan for this model on these devices, at once, each finding with its remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Protocol

from partita.assign import assign, changed_in_place, covers
from partita.check_tensor import tensor_problems
from partita.cluster import Cluster
from partita.errors import PlanError
from partita.graph import Graph, Op
from partita.plan import Plan
from partita.schedules import NAMES
from partita.united import is_united, members
from partita.united import problem as unite_problem
from partita.units import format_bytes

TOGETHER = (
    ("recompute", "offload", "what is made again has nothing to bring back"),
    ("recompute", "compile", "compiled code chooses itself what it makes again"),
    ("offload", "compile", "what compiled code saves is not known by the model's names"),
)
BATCH_NORMS = ("exact", "per_microbatch")


class Coupled(Protocol):
    """What ``check`` asks of ``sharding.batch.BatchLayouts``."""

    @property
    def microbatchable(self) -> bool: ...


def require(
    plan: Plan,
    graph: Graph,
    cluster: Cluster,
    layouts: Coupled | None = None,
    *,
    memory: Mapping[str, int] | None = None,
    what: str = "the plan cannot be carried out",
) -> None:
    """Raises PlanError with every problem ``check`` finds."""
    problems = check(plan, graph, cluster, layouts, memory=memory)
    if problems:
        raise PlanError(f"{what}:", problems)


def check(
    plan: Plan,
    graph: Graph,
    cluster: Cluster,
    layouts: Coupled | None = None,
    *,
    memory: Mapping[str, int] | None = None,
) -> tuple[str, ...]:
    """Every problem in words, with what to do; empty for a plan that can run.

    ``layouts``: the graph's batch layouts, to see whether it can be cut into microbatches. ``memory``: predicted bytes
    per device (a simulated trace's ``memory``), to compare with the cluster's limits; the plan's own prediction is not
    trusted.
    """
    problems: list[str] = []
    problems += _model(plan, graph)
    problems += _batch(plan, graph, layouts)
    problems += _devices(plan, cluster)
    names = _names(plan, graph)
    problems += names
    if plan.stages:
        stage_of = assign(plan, graph)
        problems += _order(plan, graph, stage_of)
        problems += _in_place(graph, stage_of)
        problems += _kept(plan, graph, stage_of)
        problems += _empty(plan, graph, stage_of, bool(names))
        problems += tensor_problems(plan, graph, stage_of)
    problems += _memory(cluster, memory or {})
    return tuple(dict.fromkeys(problems))


def _near(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...' or what there is."""
    names = list(dict.fromkeys(n for n in known if n))
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    shown = ", ".join(names[:8])
    return f"; there are {shown}{', ...' if len(names) > 8 else ''}" if names else ""


def _model(plan: Plan, graph: Graph) -> list[str]:
    if plan.fingerprint and graph.fingerprint and plan.fingerprint != graph.fingerprint:
        return [
            f"it was made for another model: {plan.model or 'a model'} with fingerprint {plan.fingerprint[:12]}, and "
            f"this is {graph.name or 'a model'} with {graph.fingerprint[:12]}; plan this model anew, or, where "
            "the plan is meant for it, remove the fingerprint from the file"
        ]
    return []


def _batch(plan: Plan, graph: Graph, layouts: Coupled | None) -> list[str]:
    problems: list[str] = []
    batch = plan.batch
    if plan.schedule not in NAMES:
        problems.append(f"schedule {plan.schedule!r} is not known{_near(plan.schedule, NAMES)}")
    if plan.batch_norm not in BATCH_NORMS:
        problems.append(f"batch_norm {plan.batch_norm!r} is not known; take 'exact' or 'per_microbatch'")
    if batch.microbatches < 1:
        problems.append(f"microbatches is {batch.microbatches}; it must be at least 1")
    if batch.size < 0:
        problems.append(f"the batch's size is {batch.size}; it must be at least 1 (or left out)")
    if 0 < batch.size < batch.microbatches:
        problems.append(
            f"{batch.microbatches} microbatches are more than the batch's {batch.size} samples; "
            f"take at most {batch.size}"
        )
    if batch.sizes:
        if len(batch.sizes) != batch.microbatches:
            problems.append(
                f"sizes names {len(batch.sizes)} microbatches, and microbatches is {batch.microbatches}: "
                "make them agree"
            )
        if min(batch.sizes) < 1:
            problems.append(f"sizes has a microbatch of {min(batch.sizes)} samples; each needs at least 1")
        if batch.size and sum(batch.sizes) != batch.size:
            problems.append(f"sizes adds up to {sum(batch.sizes)} samples, and the batch has {batch.size}")
    cut = batch.microbatches > 1
    if cut and layouts is not None and not layouts.microbatchable:
        problems.append(
            f"{batch.microbatches} microbatches: this model's inputs have no batch dim that can be cut without "
            "changing the numbers; set microbatches to 1"
        )
    elif cut and layouts is None and graph.batch == 0:
        problems.append(
            f"{batch.microbatches} microbatches: no batch dim was found in the model's inputs; set microbatches to 1"
        )
    return problems


def _devices(plan: Plan, cluster: Cluster) -> list[str]:
    problems: list[str] = []
    known = [d.name for d in cluster.devices]
    if not plan.stages:
        problems.append("it has no stages; list at least one, with its devices")
    for s, stage in enumerate(plan.stages):
        if not stage.devices:
            problems.append(f"stage {s} has no devices; give it one of {', '.join(known)}")
        for device in dict.fromkeys(stage.devices):
            if is_united(device):
                why = unite_problem(cluster, device)
                problems += [f"stage {s} runs on {device!r}: {why}"] if why else []
            elif device not in known:
                shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
                problems.append(f"stage {s} runs on {device!r}, which is no device here; there are {shown}")
            if stage.devices.count(device) > 1:
                problems.append(f"stage {s} lists {device!r} more than once; replicas need different devices")
        if len(stage.groups) > plan.batch.microbatches >= 1:
            problems.append(
                f"stage {s} has {len(stage.groups)} replicas but the plan only {plan.batch.microbatches} "
                f"microbatch{'es' if plan.batch.microbatches != 1 else ''}: some would idle; set microbatches to "
                f"{len(stage.groups)} or more, or take devices away"
            )
    used = list(dict.fromkeys(device for stage in plan.stages for device in stage.devices))
    for united in filter(is_united, used):
        for other in used:
            shared = set(members(united)) & set(members(other)) if other != united else ()
            if shared:
                problems.append(
                    f"{', '.join(sorted(shared))} is part of {united!r} and of {other!r}; use it in one way"
                )
    return problems


def _names(plan: Plan, graph: Graph) -> list[str]:
    problems: list[str] = []
    op_names = {op.name for op in graph.ops}
    modules = _modules(graph)
    first: dict[tuple[str, str], int] = {}
    for s, stage in enumerate(plan.stages):
        for name in stage.modules:
            if name and not _runs(name, modules):
                problems.append(_unknown(f"stage {s} lists module {name!r}", name, graph, modules))
        for name in stage.ops:
            if name not in op_names:
                problems.append(f"stage {s} lists op {name!r}, which the model does not run{_near(name, op_names)}")
        for kind, names in (("module", stage.modules), ("op", stage.ops)):
            for name in dict.fromkeys(names):
                other = first.setdefault((kind, name), s)
                if other != s:
                    problems.append(f"{kind} {name!r} is listed by stages {other} and {s}; keep it in one of them")
        for does, names in (
            ("recomputes", stage.recompute), ("compiles", stage.compile),
            ("offloads the activations of", stage.offload.activations),
            ("offloads the parameters of", stage.offload.parameters),
        ):  # fmt: skip
            for name in names:
                if name and name not in op_names and not _runs(name, modules):
                    problems.append(_unknown(f"stage {s} {does} {name!r}", name, graph, modules))
    return problems


def _kept(plan: Plan, graph: Graph, stage_of: Mapping[str, int]) -> list[str]:
    """Names that a stage recomputes, offloads or compiles though another stage runs them, and two of it for one op."""
    lines = []
    for s, stage in enumerate(plan.stages):
        ways: dict[str, dict[str, str]] = {}
        offload = tuple(dict.fromkeys((*stage.offload.activations, *stage.offload.parameters)))
        for word, names in (("recompute", stage.recompute), ("offload", offload), ("compile", stage.compile)):
            for name in names:
                every = bool(name) or word == "compile"
                ops = [op.name for op in graph.ops if op.name == name or (every and covers(name, op.module))]
                where = {stage_of[op] for op in ops}
                if where and s not in where:
                    lines.append(
                        f"stage {s} lists {name!r} under {word}, but stage {min(where)} runs it: list it there"
                    )
                ways.setdefault(word, {}).update(dict.fromkeys((op for op in ops if stage_of[op] == s), name))
        for one, other, why in TOGETHER:
            both = [op for op in ways.get(one, ()) if op in ways.get(other, ())]
            lines += [
                f"stage {s} lists {_all(a)} under {one} and {_all(b)} under {other}: {why}; list "
                "each part under one of them"
                for a, b in dict.fromkeys((ways[one][op], ways[other][op]) for op in both)
            ]
        if stage.compile and plan.zero == 3:
            lines.append(
                f"stage {s} compiles and the plan has ZeRO 3: parameters are gathered op by op, which compiled code "
                "does not stop for; take zero 2, or compile out"
            )
        lines += _lent(plan, graph, stage_of, s)
    return lines


def _all(name: str) -> str:
    return repr(name) if name else "all of it"


def _lent(plan: Plan, graph: Graph, stage_of: Mapping[str, int], s: int) -> list[str]:
    """What is wrong with parameters that a stage keeps in host memory."""
    stage, lines = plan.stages[s], []
    names = stage.offload.parameters
    if not names:
        return []
    if stage.tensor > 1 or plan.zero:
        what = "divides its ops" if stage.tensor > 1 else f"has its state divided by ZeRO {plan.zero}"
        lines.append(f"stage {s} offloads parameters and {what}: a device would hold parts of both; take one of them")
    listed = dict.fromkeys((*stage.offload.activations, *names))
    for name in listed:
        other = next((n for n in listed if n != name and (not n or covers(n, name))), None)
        if other is not None:
            lines.append(f"stage {s} offloads {name!r} and {other!r}, which is around it: list one of them")
    inside = {
        op.name for op in graph.ops for n in names
        if stage_of[op.name] == s and (op.name == n or not n or covers(n, op.module))
    }  # fmt: skip
    held: dict[str, str] = {}
    for op in graph.ops:
        for name in op.uses() if op.name in inside else ():
            if graph.tensor(name).role == "parameter":
                held.setdefault(name, op.name)
    for op in graph.ops:
        for name in op.uses() if op.name not in inside else ():
            if name in held:
                lines.append(
                    f"stage {s} offloads {graph.tensor(name).path or name!r}, which {_where(op)} uses too: list that "
                    "under offload as well, or keep both on the device"
                )
                held.pop(name)
    return lines


def _modules(graph: Graph) -> dict[str, None]:
    """Paths of every module call that runs ops, and of the modules around it."""
    found: dict[str, None] = {}
    for path in dict.fromkeys(op.module for op in graph.ops if op.module):
        parts = path.split(".")
        for i in range(len(parts)):
            found[".".join(parts[: i + 1])] = None
    return found


def _runs(name: str, modules: Mapping[str, None]) -> bool:
    return name in modules or any(covers(name, path) for path in modules)


def _unknown(what: str, name: str, graph: Graph, modules: Mapping[str, None]) -> str:
    held = [t.path for t in graph.of_role("parameter", "buffer") if t.path]
    held += [alias for alias, _ in graph.ties]
    if any(path == name or path.startswith(name + ".") for path in held):
        return f"{what}, which holds parameters but runs no op of its own in this call; leave it out"
    return f"{what}, which names no module the model runs{_near(name, modules)}"


def _order(plan: Plan, graph: Graph, stage_of: Mapping[str, int]) -> list[str]:
    """Values that would have to flow to an earlier stage; one line for each pair of modules."""
    lines: dict[tuple[int, int, str, str], str] = {}
    for op in graph.ops:
        here = stage_of[op.name]
        for name in op.uses():
            producer = graph.producer(name)
            if producer is None:
                continue
            made_by = graph.ops[producer]
            there = stage_of[made_by.name]
            if there > here:
                key = (there, here, made_by.module, op.module)
                lines.setdefault(
                    key,
                    f"stage {here} runs {_where(op)}, which needs {name!r} of {_where(made_by)} in the later "
                    f"stage {there}: move one of them, or put {op.module or op.name} into stage {there} or later",
                )
    return _few(list(lines.values()), "more values flow backwards in the same way")


def _where(op: Op) -> str:
    code = f" ({op.source})" if op.source else ""
    return f"{op.name}{code}"


def _few(lines: list[str], rest: str, limit: int = 6) -> list[str]:
    return lines if len(lines) <= limit else [*lines[:limit], f"{len(lines) - limit} {rest}"]


def _in_place(graph: Graph, stage_of: Mapping[str, int]) -> list[str]:
    """Memory changed in one stage and made, or (for a buffer) used, in another."""
    lines = []
    for base, writers, others in changed_in_place(graph):
        for writer in writers:
            apart = next((o for o in others if stage_of[o.name] != stage_of[writer.name]), None)
            if apart is None:
                continue
            tensor = graph.tensor(base)
            verb = "made" if graph.producer(base) is not None else "uses"
            lines.append(
                f"stage {stage_of[writer.name]} runs {_where(writer)}, which changes {tensor.path or base!r} in place; "
                f"{_where(apart)} in stage {stage_of[apart.name]} {verb} it: "
                "keep both in one stage"
            )
            break
    return _few(lines, "more tensors are changed in place across stages")


def _empty(plan: Plan, graph: Graph, stage_of: Mapping[str, int], names_wrong: bool) -> list[str]:
    used = set(stage_of.values())
    lines = []
    for s, stage in enumerate(plan.stages):
        if s in used or names_wrong:
            continue
        listed: Sequence[str] = (*stage.modules, *stage.ops)
        why = (
            f"every op of {', '.join(map(repr, listed[:3]))} is listed by another stage under a longer name"
            if listed
            else "it lists no modules and no ops"
        )
        lines.append(f"stage {s} has nothing to run: {why}; list modules there or remove the stage")
    return lines


def _memory(cluster: Cluster, memory: Mapping[str, int]) -> list[str]:
    limits = {d.name: d.memory_bytes for d in cluster.devices}
    return [
        f"{device} would need {format_bytes(need)} and may use {format_bytes(limits[device])}: move modules to another "
        "stage, recompute some, take more microbatches, or allow it more memory"
        for device, need in memory.items()
        if device in limits and need > limits[device]
    ]
