"""Accelerate: a Plan from a ``device_map`` (module name -> device), and a ``device_map`` from a Plan.

A device map runs one device at a time; as a Plan the same placement runs with all devices busy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from partita.assign import Names, complete, covers
from partita.capture import capture
from partita.errors import PlanError
from partita.graph import Graph
from partita.manual import stage_names
from partita.plan import Batch, Offload, Plan, Stage


def plan_from_device_map(
    model: nn.Module,
    example_args: Sequence[Any],
    device_map: Mapping[str, int | str],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    devices: Mapping[int | str, str] | None = None,
    microbatches: int = 1,
    schedule: str = "1f1b",
) -> Plan:
    """The Plan that runs every module where the map puts it, the longest name winning as in accelerate.

    ``example_args``: one typical call. ``devices``: what the map's devices are called here (``{0: "cpu:0"}``); a bare
    number is that CUDA device otherwise. A stage is a stretch of ops that needs no later device's results; a map that
    goes back to a device becomes another stage there. "cpu" beside accelerators means, as in accelerate, that the
    module runs on the first accelerator and its parameters live in host memory (``Offload.parameters``). Raises
    PlanError for what a Plan cannot say: "disk", keys that are single parameters, names the model has not;
    CaptureError.
    """
    captured = capture(model, tuple(example_args), dict(example_kwargs or {}))
    if captured.live:
        raise PlanError(f"this model runs as its Python goes, which a plan made of ops cannot say: {captured.live}")
    named = {key: _device(device, devices or {}) for key, device in device_map.items()}
    _refuse(model, device_map, named)
    hosted = _hosted(device_map, named)
    named |= dict.fromkeys(hosted, next((d for d in named.values() if not d.startswith("cpu")), ""))
    graph = captured.graph
    order = list(dict.fromkeys(named.values()))
    names = Names([key for key, device in named.items() if device == name] for name in order)
    listed = {op.name: found for op in graph.ops if (found := names.find(op.module)) is not None}
    where = complete(graph, listed)
    stage_of, stages = _stages(graph, {op: order[index] for op, index in where.items()})
    parts = stage_names(graph, stage_of, len(stages))
    return Plan(
        stages=tuple(
            Stage((d,), modules=m, ops=o, offload=Offload(parameters=_run_by(graph, stage_of, s, hosted)))
            for s, (d, (m, o)) in enumerate(zip(stages, parts, strict=True))
        ),
        model=graph.name,
        fingerprint=graph.fingerprint,
        devices=tuple(dict.fromkeys(stages)),
        batch=Batch(graph.batch, microbatches),
        schedule=schedule,
        reasons=("from a device_map",),
    )


def _device(device: int | str, devices: Mapping[int | str, str]) -> str:
    if device in devices:
        return devices[device]
    if isinstance(device, int) or device.isdecimal():
        return f"cuda:{device}"
    return f"{device}:0" if device in ("cpu", "cuda") else str(device)


def _hosted(device_map: Mapping[str, int | str], named: Mapping[str, str]) -> tuple[str, ...]:
    """Keys of which only the parameters are on "cpu"."""
    elsewhere = any(not device.startswith(("cpu", "disk", "meta")) for device in named.values())
    return tuple(key for key, device in device_map.items() if elsewhere and device == "cpu")


def _run_by(graph: Graph, stage_of: Mapping[str, int], stage: int, keys: Sequence[str]) -> tuple[str, ...]:
    """The modules among ``keys`` that the stage runs."""
    mine = [op.module for op in graph.ops if stage_of[op.name] == stage]
    return tuple(key for key in keys if any(covers(key, module) for module in mine))


def _refuse(model: nn.Module, device_map: Mapping[str, int | str], named: Mapping[str, str]) -> None:
    modules = {name for name, _ in model.named_modules()}
    tensors = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    problems = []
    for key, device in named.items():
        if device.startswith(("disk", "meta")):
            problems.append(f"'{key}' is on {device_map[key]!r}: a plan keeps parameters in a device's memory; "
                            "give it a device, or let partita find a plan that fits")  # fmt: skip
        if key not in modules:
            what = "is a parameter or buffer: name the module that uses it" if key in tensors else "is no module here"
            problems.append(f"'{key}' {what}")
    if problems:
        raise PlanError("this device_map cannot be a plan:", tuple(problems))


def _stages(graph: Graph, device_of: Mapping[str, str]) -> tuple[dict[str, int], list[str]]:
    """Op -> stage, and each stage's device: the earliest stage on an op's device that no result flows back to."""
    stage_of: dict[str, int] = {}
    stages: list[str] = []
    for op in graph.ops:
        makers = [graph.producer(name) for name in op.uses()]
        first = max((stage_of[graph.ops[i].name] for i in makers if i is not None), default=0)
        device = device_of[op.name]
        found = next((s for s in range(first, len(stages)) if stages[s] == device), None)
        if found is None:
            found = len(stages)
            stages.append(device)
        stage_of[op.name] = found
    return stage_of, stages


def device_map_of(plan: Plan, model: nn.Module) -> dict[str, int | str]:
    """The plan as a ``device_map`` for ``accelerate.dispatch_model`` or ``from_pretrained(device_map=...)``.

    Raises PlanError for what a device map cannot say: replicas, tensor sharding, cuts inside a module, single calls of
    a module, several groups of CPU cores; and for modules with parameters that the plan does not name.
    """
    problems: list[str] = []
    found: dict[str, int | str] = {}
    for index, stage in enumerate(plan.stages):
        if len(stage.devices) > 1:
            problems.append(f"stage {index} has {len(stage.devices)} devices: a device_map has one for each module")
        if stage.ops:
            problems.append(
                f"stage {index} begins or ends inside a module ({stage.ops[0]}): move the cut to its border"
            )
        for name in stage.modules:
            if "@" in name:
                problems.append(f"stage {index} has one call of a module ({name}): a device_map places all its calls")
            found[name] = _key(stage.devices[0])
        found |= dict.fromkeys(stage.offload.parameters, "cpu")
    used = {d for stage in plan.stages for d in stage.devices if d.startswith("cpu")}
    if len(used) > 1:
        problems.append(f"{', '.join(sorted(used))} are groups of cores, which accelerate knows as one 'cpu'")
    covered = Names([list(found)])
    loose = [name for name, _ in model.named_parameters() if covered.find(name.rpartition(".")[0]) is None]
    if loose:
        problems.append(f"no stage names a module that holds {', '.join(map(repr, loose[:5]))}")
    if problems:
        raise PlanError("this plan cannot be a device_map:", tuple(problems))
    return found


def _key(device: str) -> int | str:
    kind, _, index = device.partition(":")
    return int(index or 0) if kind == "cuda" else kind if kind == "cpu" else device
