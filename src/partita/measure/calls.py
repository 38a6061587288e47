"""From a user's call to measured timings: whether it is worth measuring, and the tensors to measure with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from partita.capture import Captured
from partita.cluster import Cluster
from partita.cost.blocks import Block
from partita.cost.measured import Measured
from partita.cost.table import cost_table
from partita.measure.profile import BUDGET_SECONDS, kept, profile
from partita.sharding.batch import layouts

LEAST_SECONDS = 0.002
LEAST_BUDGET = 0.3
STEPS_WORTH = 30


def measure_call(
    captured: Captured,
    cluster: Cluster,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    sizes: Sequence[int] = (),
    train: bool = True,
    again: bool = False,
    units: Sequence[Block] = (),
    compiled: bool = False,
) -> Measured | None:
    """Timings of the model's parts on this machine's devices, with the call's own tensors; None where that is not
    possible (no real tensors, devices that are not here, user code that should not run twice) or not worth it (a step
    of less than 2 ms). A failure is told as a warning: planning then goes by counts.
    ``sizes``: samples of the microbatches to time, where not ``profile``'s own choice. ``again``: measured now,
    whatever is kept on disk. ``units``, ``compiled``: as ``profile`` has them.
    """
    if not _possible(captured, cluster):
        return None
    step = _step_seconds(captured, cluster, train)
    if step < LEAST_SECONDS:
        return None
    leaves = captured.flatten(tuple(args), kwargs)
    if leaves is None:
        return None
    parameters, buffers = (
        dict(found(remove_duplicate=False)) for found in (model.named_parameters, model.named_buffers)
    )
    given = dict(zip(captured.inputs, leaves, strict=True))
    given.update({t.name: buffers[t.path] for t in captured.graph.of_role("buffer")})
    weights = {t.name: parameters[t.path] for t in captured.graph.of_role("parameter")}
    if any(t.is_meta or t.layout != torch.strided for t in (*given.values(), *weights.values())):
        return None
    try:
        return profile(
            captured, layouts(captured.graph), cluster, given=given, parameters=weights, sizes=sizes,
            train=train, again=again, units=units, compiled=compiled,
            budget_seconds=min(BUDGET_SECONDS, max(LEAST_BUDGET, STEPS_WORTH * step)),
        )  # fmt: skip
    except Exception as error:
        warnings.warn(
            f"measuring the model's parts failed ({type(error).__name__}: {error}); the plan is made from counts. "
            "profile=False leaves measuring out",
            stacklevel=3,
        )
        return None


def kept_timings(
    captured: Captured, cluster: Cluster, *, sizes: Sequence[int] = (), train: bool = True, units: Sequence[Block] = ()
) -> Measured | None:
    """What was measured of this model on these devices before; None where anything is missing."""
    if captured.live or not captured.graph.ops or not cluster.devices:
        return None
    return kept(captured, layouts(captured.graph), cluster, sizes=sizes, train=train, units=units)


def _possible(captured: Captured, cluster: Cluster) -> bool:
    if captured.live or not captured.graph.ops or any(op.target.startswith("opaque:") for op in captured.graph.ops):
        return False
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in cluster.devices:
        kind, _, index = device.name.partition(":")
        if not (kind == "cpu" and device.cores or kind == "cuda" and index.isdecimal() and int(index) < gpus):
            return False
    return True


def _step_seconds(captured: Captured, cluster: Cluster, train: bool) -> float:
    """One step on the slowest device alone, by the analytic model."""
    table, batch = cost_table(captured.graph, cluster), max(captured.graph.batch, 1)
    slowest = 0.0
    for kind in table.kinds:
        rows = table.forward[kind] + (table.backward[kind] + table.weight[kind] if train else 0.0)
        slowest = max(slowest, float(rows[:, 0].sum() + rows[:, 1].sum() * batch))
    return slowest
