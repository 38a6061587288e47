"""Plans a person could pick, on two devices or one beside its host: what predictions and choices are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.models import Workload
from partita.graph import Graph
from partita.manual import plan_from_cuts
from partita.plan import Batch, Offload, Plan, Stage


def families(
    work: Workload, names: Sequence[tuple[str, ...]], graph: Graph, devices: tuple[str, str], *, few: bool = False
) -> dict[str, Plan]:
    """One device, replicas, single ops divided over both, pipelines cut at the middle and on both sides of it under
    each schedule, the same with recomputation. ``names``: the model's parts in order; ``few``: a handful.
    """
    everything = tuple(n for group in names for n in group)
    batch = max(graph.batch, 1)

    def whole(count: int, microbatches: int, *, tensor: int = 1, recompute: tuple[str, ...] = ()) -> Plan:
        stage = Stage(devices[:count], modules=everything, recompute=recompute, tensor=tensor)
        return Plan((stage,), devices=devices[:count], batch=Batch(batch, microbatches))

    plans = {"one device": whole(1, 1), "2 replicas, 2 microbatches": whole(2, 2)}
    if not few:
        plans["each op over both devices"] = whole(2, 1, tensor=2)
    parts = len(names)
    spread = max(1, parts // 6)
    cuts = [parts // 2] if few else [parts // 2 + k * spread for k in (-1, 0, 1)]
    if work.couples_batch:
        counts: tuple[int, ...] = (1,)
    else:
        counts = (1, 4) if few else (1, 2, 4, 8)
        plans["2 replicas, 4 microbatches"] = whole(2, 4)
        if not few:
            plans["2 replicas, recomputing all"] = whole(2, 2, recompute=everything)
    for cut in (c for c in cuts if 0 < c < parts):
        for m in counts:
            for schedule in ("1f1b", "zero_bubble") if m > 1 else ("1f1b",):
                title = f"cut at {names[cut][0]}, {m} x {schedule}"
                plans[title] = plan_from_cuts(
                    graph, names[cut][:1], devices, batch=batch, microbatches=m, schedule=schedule
                )
    if not work.couples_batch:
        for m in (4,) if few else (4, 8):
            base = plan_from_cuts(graph, names[parts // 2][:1], devices, batch=batch, microbatches=m, schedule="1f1b")
            again = [replace(s, recompute=tuple(s.modules)) for s in base.stages]
            plans[f"recomputing one part, {m} x 1f1b"] = replace(
                base, stages=(replace(base.stages[0], recompute=names[1]), *base.stages[1:])
            )
            plans[f"recomputing all, {m} x 1f1b"] = replace(base, stages=tuple(again))
    return plans


def beside_host(
    work: Workload, names: Sequence[tuple[str, ...]], graph: Graph, device: str, *, few: bool = False
) -> dict[str, Plan]:
    """On one device with its host's memory: all kept; none, half or all of the parts made again in backward, or their
    saved activations offloaded; parameters of the middle half, or of all, on the host; microbatches.
    """
    everything = tuple(n for group in names for n in group)
    batch, inner = max(graph.batch, 1), [n for group in names[1:-1] for n in group]
    half = tuple(inner[::2])
    ways: dict[str, dict[str, object]] = {
        "all kept": {},
        "recomputing half": {"recompute": half},
        "recomputing all": {"recompute": tuple(inner)},
        "activations of half on the host": {"offload": Offload(activations=half)},
        "activations of all on the host": {"offload": Offload(activations=tuple(inner))},
        "parameters of half on the host": {"offload": Offload(parameters=half)},
        "parameters and activations of all on the host": {
            "offload": Offload(activations=tuple(inner), parameters=tuple(inner))
        },
    }
    plans = {}
    for m in (1,) if work.couples_batch else (1, 4) if few else (1, 2, 4, 8):
        for title, way in ways.items():
            stage = Stage((device,), modules=everything, **way)  # type: ignore[arg-type]
            plans[f"{title}, {m} microbatch{'es' if m > 1 else ''}"] = Plan(
                (stage,), devices=(device,), batch=Batch(batch, m)
            )
    return plans
