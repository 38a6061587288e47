"""What is a pure function of a model and a plan, worked out once for all ranks and cases that ask for it.

    parent    captures each model once for each kind of call; lays out, divides, lowers, generates the next cases' code
      forks   the ranks, which find all of it there (``remember``) and only run it

Without this every rank would work out the same again for each case. What stands here takes the place of the function of
the same meaning in partita, which it calls: with the same arguments it gives what that gave the first time. Nothing
of it may know the ZeRO level, in which neighbouring cases differ: ``lower``, ``divide`` and the code of whole
parameters do not.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

import partita.api
import partita.runtime.bind
import partita.runtime.distributed.module
import partita.runtime.local
from partita.capture import Captured, capture
from partita.cluster import Cluster, Device
from partita.divide import Division, divide
from partita.graph import Graph
from partita.lower import lower
from partita.plan import Plan
from partita.program import Program
from partita.runtime.codegen import SegmentCode
from partita.runtime.local import Local
from partita.runtime.loss import WithLoss
from partita.runtime.team import Team
from partita.sharding.batch import BatchLayouts, layouts
from tests.distributed.cases import Case, beginning, plan_of
from tests.distributed.models import FAMILIES, loss_of

_current = [""]
_captures: dict[object, Captured] = {}
_layouts: dict[object, BatchLayouts] = {}
_divisions: dict[object, Division | None] = {}
_programs: dict[object, Program] = {}
_codes: dict[object, tuple[SegmentCode, ...]] = {}
_calls: dict[str, tuple[tuple[Captured, bool], ...]] = {}
_codes_of = Local._codes


def about(model: str) -> None:
    """The family whose model is captured from here on: cases differ in the plan, not in the model."""
    _current[0] = model


def captured_once(model: torch.nn.Module, args: Any = (), kwargs: Any = None, **options: Any) -> Captured:
    """``capture``, once for each kind of call of a model."""
    forward = options.get("forward") or model
    key = _current[0], type(forward).__name__, model.training, torch.is_grad_enabled()
    if key not in _captures:
        found = capture(model, args, kwargs, **options)
        if found.effects or found.opaques:  # bound to this very model
            return found
        _captures[key] = found
    return _captures[key]


def laid_out(graph: Graph, **options: Any) -> BatchLayouts:
    """``layouts``, once for each model."""
    key = id(graph), *options.values()
    if key not in _layouts:
        _layouts[key] = layouts(graph, **options)
    return _layouts[key]


def divided(graph: Graph, layouts: BatchLayouts, plan: Plan, *, batch: int) -> Division | None:
    """``divide``, once for each way to lay the stages: neither schedule nor ZeRO level matter to it."""
    key = id(graph), plan.stages, plan.batch, batch
    if key not in _divisions:
        _divisions[key] = divide(graph, layouts, plan, batch=batch)
    return _divisions[key]


def lowered(
    graph: Graph, layouts: BatchLayouts, plan: Plan, *, batch: int, train: bool = True, part: str = "step",
    division: Division | None = None,
) -> Program:  # fmt: skip
    """``lower``, once for each plan but for its ZeRO level."""
    key = id(graph), plan.stages, plan.batch, plan.schedule, plan.batch_norm, batch, train, part
    if key not in _programs:
        _programs[key] = lower(graph, layouts, plan, batch=batch, train=train, part=part, division=division)
    return _programs[key]


def coded(self: Local, graph: Graph, used: BatchLayouts, program: Program) -> tuple[SegmentCode, ...]:
    """The code of whole parameters' segments, once for each Program and member."""
    key = id(self.captured), id(graph), id(program)
    if key not in _codes:
        _codes[key] = _codes_of(self, graph, used, program)
    return _codes[key]


def remember() -> None:
    """From now on partita asks here."""
    for module in (partita.api, partita.runtime.bind):
        module.capture = captured_once  # type: ignore[attr-defined]
    for module in (partita.runtime.distributed.module, partita.runtime.local):
        module.divide, module.lower = divided, lowered  # type: ignore[attr-defined]
    partita.runtime.distributed.module.layouts = laid_out  # type: ignore[attr-defined]
    Local._codes = coded  # type: ignore[method-assign]


def calls_of(model: str) -> tuple[tuple[Captured, bool], ...]:
    """The three kinds of call that a case makes, and whether each wants gradients; the first is that of the plan."""
    about(model)
    if model in _calls:
        return _calls[model]
    made, inputs, target = beginning(FAMILIES[model], Case(model, 1, 1).rows)
    with torch.no_grad():
        plain = captured_once(made, inputs, {})
    step = captured_once(made, (*inputs, target), {}, forward=WithLoss(made, loss_of))
    return _calls.setdefault(model, ((captured_once(made, inputs, {}), True), (step, True), (plain, False)))


def prepare(cases: Iterable[Case]) -> None:
    """Work out all that these cases will ask for."""
    for case in dict.fromkeys(replace(c, zero=0) for c in cases):
        plan = plan_of(case)
        cluster = Cluster(tuple(Device(d, "cpu", 1 << 34, 1e10, 1e10) for d in plan.devices))
        for captured, grad in calls_of(case.model):
            found = laid_out(captured.graph, batch_norm=plan.batch_norm)
            Local(captured, found, plan, cluster, Team(cluster.devices)).lowered(captured.graph.batch, grad)
        graph = calls_of(case.model)[0][0].graph
        whole = laid_out(graph, batch_norm=plan.batch_norm)
        lowered(graph, whole, plan, batch=graph.batch, division=divided(graph, whole, plan, batch=graph.batch))


def forget() -> None:
    """Let go of what was worked out for plans; models stay."""
    for found in (_divisions, _programs, _codes):
        found.clear()
    gc.collect()
