"""Pipelining: plans from the split points of torch.distributed.pipelining, and a Plan's stages as modules for it.

pipeline(model, ..., split_spec={"blocks.2": SplitPoint.BEGINNING})     plan_from_split_spec
PipelineStage(stages[i], i, len(stages), device)                        stage_modules
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import SplitPoint

from partita.assign import covers
from partita.capture import Captured, capture
from partita.check import require
from partita.cluster import Cluster, Device
from partita.errors import PlanError
from partita.graph import Graph
from partita.manual import plan_from_cuts
from partita.plan import Plan
from partita.program import Program, Segment, Split
from partita.runtime.codegen import SegmentCode
from partita.runtime.local import Local
from partita.runtime.team import Team
from partita.sharding.batch import layouts


def plan_from_split_spec(
    model: nn.Module,
    example_args: Sequence[Any],
    split_spec: Mapping[str, SplitPoint],
    devices: Sequence[str],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    microbatches: int = 1,
    schedule: str = "1f1b",
) -> Plan:
    """The Plan that cuts where ``pipeline(split_spec=...)`` would, in the order in which the modules run.

    Raises PlanError for names that run nothing, an END after which nothing runs, and as ``partita.split``.
    """
    captured = _captured(model, example_args, example_kwargs)
    graph = captured.graph
    found: dict[int, str] = {}
    problems = []
    for name, point in split_spec.items():
        inside = [i for i, op in enumerate(graph.ops) if covers(name, op.module)]
        if not inside:
            problems.append(f"'{name}' names no module that runs an op")
        elif point is SplitPoint.BEGINNING:
            found[inside[0]] = graph.ops[inside[0]].name
        elif inside[-1] + 1 == len(graph.ops):
            problems.append(f"nothing runs after '{name}': leave its SplitPoint.END out")
        else:
            found[inside[-1] + 1] = graph.ops[inside[-1] + 1].name
    if problems:
        raise PlanError("this split_spec cannot be a plan:", tuple(problems))
    cuts = [found[i] for i in sorted(found)]
    return plan_from_cuts(graph, cuts, devices, microbatches=microbatches, schedule=schedule)


class StageModule(nn.Module):
    """One stage: takes the tensors that reach it, gives those that later stages need; the last gives the outputs.

    Its parameters and buffers are the model's own, under their names. ``takes``, ``gives``: the tensors' names.
    """

    def __init__(self, steps: Sequence[_Step], takes: Sequence[str], gives: Sequence[str], shared: _Shared) -> None:
        super().__init__()
        self.takes, self.gives = tuple(takes), tuple(gives)
        self._steps, self._shared = tuple(steps), shared
        self._names = {use for step in steps for use in step.uses if use in shared.paths}
        for name in sorted(self._names):
            _attach(self, shared.paths[name], shared.tensors[name])

    def forward(self, *tensors: torch.Tensor) -> Any:
        values = dict(self._shared.constants)
        values.update(zip(self.takes, tensors, strict=True))
        for name in self._names:
            owner, _, attribute = self._shared.paths[name].rpartition(".")
            values[name] = getattr(self.get_submodule(owner), attribute)
        device = tensors[0].device
        for step in self._steps:
            with torch.set_grad_enabled(torch.is_grad_enabled() and step.grad):
                made = step.code.run(self._shared.size, self._shared.batch, device, *(values[u] for u in step.uses))
            values.update(zip(step.makes, made, strict=True))
        found = tuple(values[name].contiguous() for name in self.gives)
        return found[0] if len(found) == 1 else found


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A segment's code, what it uses and makes, and whether gradients flow through it."""

    code: SegmentCode
    uses: tuple[str, ...]
    makes: tuple[str, ...]
    grad: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Shared:
    """Of all stages: samples of a microbatch and of the batch; the model's tensors by graph name and by path."""

    size: int
    batch: int
    constants: Mapping[str, torch.Tensor]
    paths: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]


def stage_modules(
    model: nn.Module, plan: Plan, example_args: Sequence[Any], example_kwargs: Mapping[str, Any] | None = None
) -> tuple[StageModule, ...]:
    """Each stage of the plan as a module for ``PipelineStage``; tensors that skip stages are handed through.

    ``example_args``: one whole batch, all tensors. Give a schedule ``n_microbatches=plan.batch.microbatches`` and the
    batch to ``step``. Raises PlanError for what such a pipeline computes otherwise or cannot run: replicas, sharding,
    ZeRO, tied parameters in several stages, ops that need the whole batch when there are microbatches, random ops,
    microbatches of unequal size, outputs that are not rows of the batch.
    """
    captured = _captured(model, example_args, example_kwargs)
    graph = captured.graph
    require(plan, graph, _described(plan))
    found = layouts(graph, batch_norm=plan.batch_norm)
    lowered = Local(captured, found, plan, _described(plan), Team(())).lowered(graph.batch, True)
    _refuse(plan, graph, lowered.forward, [coupling.op for coupling in found.couplings])
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    held = graph.of_role("parameter", "buffer")
    paths = {t.name: t.path for t in held}
    shared = _Shared(
        lowered.forward.sizes[0], graph.batch, captured.constants, paths, {t.name: named[t.path] for t in held}
    )
    steps: list[list[_Step]] = [[] for _ in plan.stages]
    for segment, code in zip(lowered.forward.segments, lowered.codes, strict=True):
        step = _Step(code, tuple(use.tensor for use in segment.uses), segment.outputs, segment.phase != "once")
        for mine in steps if segment.phase == "once" else (steps[segment.stage],):
            mine.append(step)
    return tuple(_assemble(steps, captured, shared))


def _assemble(steps: list[list[_Step]], captured: Captured, shared: _Shared) -> Iterator[StageModule]:
    """From the last stage's needs backwards: what a stage does not make itself it takes from the stage before."""
    here = set(shared.paths) | set(shared.constants)
    gives = list(captured.graph.outputs[: captured.returned])
    found: list[StageModule] = []
    for number in reversed(range(len(steps))):
        made = {name for step in steps[number] for name in step.makes}
        needs = dict.fromkeys(name for step in steps[number] for name in step.uses)
        needs.update(dict.fromkeys(gives))
        takes = [name for name in needs if name not in made and name not in here]
        if number == 0:
            takes = list(captured.inputs)
        found.append(StageModule(steps[number], takes, gives, shared))
        gives = takes
    yield from reversed(found)


def _captured(model: nn.Module, example_args: Sequence[Any], example_kwargs: Mapping[str, Any] | None) -> Captured:
    captured = capture(model, tuple(example_args), dict(example_kwargs or {}))
    if captured.live:
        raise PlanError(f"this model runs as its Python goes and has no stages made of ops: {captured.live}")
    return captured


def _described(plan: Plan) -> Cluster:
    """The plan's devices with room for anything: where the stages run is PipelineStage's to say."""
    names = plan.devices or tuple(d for s in plan.stages for d in s.devices)
    return Cluster(tuple(Device(name, "stage", 1 << 62, 1e12, 1e12) for name in dict.fromkeys(names)))


def _refuse(plan: Plan, graph: Graph, program: Program, couplings: Sequence[str]) -> None:
    problems = []
    if len(program.sizes) != plan.batch.microbatches:
        problems.append(f"{couplings[0] if couplings else 'the model'} needs the whole batch: use one microbatch")
    for index, stage in enumerate(plan.stages):
        if len(stage.devices) > 1:
            problems.append(
                f"stage {index} has {len(stage.devices)} devices: replicas and sharded stages are not stages there"
            )
    if plan.zero:
        problems.append(f"zero: {plan.zero} divides state over replicas")
    if len(set(program.sizes)) > 1:
        problems.append(f"microbatches of {program.sizes} samples: it chunks the batch evenly; choose a divisor")
    owner: dict[str, int] = {}
    for segment in program.segments:
        for use in segment.uses if segment.phase != "once" else ():
            if (
                graph.tensor(use.tensor).role == "parameter"
                and owner.setdefault(use.tensor, segment.stage) != segment.stage
            ):
                problems.append(f"'{graph.tensor(use.tensor).path}' is used by stages {owner[use.tensor]} and "
                                f"{segment.stage}: their gradients would not be added up")  # fmt: skip
        problems += _wholly(graph, segment, program)
    problems += [f"{op.name} draws random numbers, anew in each microbatch: call model.eval() or set its rate to 0"
                 for op in graph.ops if op.random]  # fmt: skip
    layout = dict(program.layouts)
    for name in graph.outputs:
        if len(program.sizes) > 1 and layout.get(name) != Split(0):
            problems.append(f"the output {name} is not one row for each sample: return it before it is reduced")
    if problems:
        raise PlanError("torch.distributed.pipelining cannot run this plan with the same numbers:",
                        tuple(dict.fromkeys(problems)))  # fmt: skip


def _wholly(graph: Graph, segment: Segment, program: Program) -> list[str]:
    """Why a segment cannot run microbatch by microbatch."""
    if len(program.sizes) == 1:
        return []
    if segment.phase == "whole":
        return [f"{segment.ops[0]} needs the whole batch: use one microbatch"]
    problems = []
    for use in segment.uses:
        tensor = graph.tensor(use.tensor)
        if tensor.role == "input" and use.take != Split(0):
            problems.append(f"the input {tensor.path} is not one row for each sample, as pipelining cuts it")
        elif tensor.role != "input" and isinstance(use.take, Split) and not isinstance(use.layout, Split):
            problems.append(f"{segment.ops[0]} takes another part of {tensor.name} in each microbatch: use one")
    return problems


def _attach(root: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Register a tensor under its qualified name, making the modules on the way."""
    *modules, name = path.split(".")
    for part in modules:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)
