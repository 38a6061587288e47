"""Every model of the zoo, divided: outputs, named gradients and buffers are the unsplit model's on fresh inputs.

Two and three parts, one and four microbatches, at the example batch and at one that does not divide, dropout on and
off. Each case names how the model was captured; none may be silently wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import zoo_dir
from test_capture_zoo import NAMES, zoo  # noqa: F401
from torch import nn

from partita.capture import capture
from partita.cluster import Cluster, Device
from partita.cost.blocks import legal_cuts
from partita.graph import Graph
from partita.manual import plan_live, stage_names
from partita.plan import Batch, Plan, Stage
from partita.runtime.compare import compare, observe
from partita.runtime.live import children_bytes
from partita.runtime.module import ParallelModule
from partita.torch_compat import pytree

CLUSTER = Cluster(tuple(Device(f"cpu:{i}", "cpu", 1 << 34, 1e10, 1e10) for i in range(3)))
CASES = [  # parts, microbatches, schedule, a batch that does not divide, dropout
    (2, 1, "1f1b", False, True),
    (3, 4, "1f1b", False, True),
    (2, 4, "zero_bubble", True, True),
    (2, 4, "gpipe", True, False),
]
# Samples of these do not lie along the first dim of every input: joining inputs does not make a larger batch.
FIXED_BATCH = {"hm_dlrm", "hm_variable_len_list", "hm_packed_gru", "llava"}


def even_plan(graph: Graph, parts: int, microbatches: int, schedule: str) -> Plan:
    """Cut near every ``parts``-th of the ops, where a cut is allowed."""
    legal = [i for i, ok in enumerate(legal_cuts(graph)) if ok]
    cuts: list[int] = []
    for k in range(1, parts):
        later = [i for i in legal if not cuts or i > cuts[-1]]
        if later:
            cuts.append(min(later, key=lambda i: abs(i - len(graph.ops) * k // parts)))
    stage_of = {op.name: sum(i >= cut for cut in cuts) for i, op in enumerate(graph.ops)}
    names = stage_names(graph, stage_of, len(cuts) + 1)
    return Plan(
        stages=tuple(Stage((f"cpu:{i}",), modules=m, ops=o) for i, (m, o) in enumerate(names)),
        batch=Batch(graph.batch, microbatches),
        schedule=schedule,
    )


def without_dropout(model: nn.Module) -> nn.Module:
    import importlib
    import sys

    sys.path.insert(0, str(zoo_dir()))
    reference = importlib.import_module("reference")
    changed: nn.Module = reference.zero_dropout(model)
    return changed


def joined(calls: list[tuple[Any, ...]], batch: int) -> Any:
    """The calls' inputs one after the other along the batch: five samples of twos."""
    flat = [pytree.tree_flatten(call) for call in calls]
    leaves = []
    for values in zip(*(f[0] for f in flat), strict=True):
        first = values[0]
        if isinstance(first, torch.Tensor) and first.dim() and first.shape[0] == batch:
            leaves.append(torch.cat([*values[:-1], values[-1][:1]]))
        else:
            leaves.append(first)
    return pytree.tree_unflatten(leaves, flat[0][1])


@pytest.mark.zoo
@pytest.mark.parametrize("name", NAMES)
def test_a_divided_real_model_has_the_unsplit_models_numbers(zoo: Any, name: str) -> None:  # noqa: F811
    build = zoo[name].build
    torch.manual_seed(0)
    model, args, kwargs = build()
    calls = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        calls.append(build()[1:])
    model.train()
    captured = capture(model, args, kwargs)
    for parts, microbatches, schedule, uneven, dropout in CASES:
        if not dropout:
            without_dropout(model)
        if uneven and (name in FIXED_BATCH or not captured.graph.batch):
            continue
        fresh = joined(calls, captured.graph.batch) if uneven else calls[0]
        if captured.live:
            devices = [d.name for d in CLUSTER.devices[:parts]]
            plan = plan_live(children_bytes(model), name, devices, reason=captured.live)
        else:
            plan = even_plan(captured.graph, parts, microbatches, schedule)
        divided = ParallelModule(model, plan, CLUSTER)
        try:
            found = compare(observe(model, model, *fresh), observe(divided, model, *fresh))
        finally:
            divided.close()
        assert found.ok, (name, parts, microbatches, schedule, uneven, dropout, captured.live, str(found))
