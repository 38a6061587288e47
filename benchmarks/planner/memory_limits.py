"""Plans that simulate within memory stay within it when run: every model of the zoo at five limits a device.

``python -m benchmarks.planner.memory_limits [--models gpt2,vit] [--out rows.jsonl]`` needs the zoo (``../shared/zoo``
or PARTITA_ZOO). Each model is planned for two devices of this machine at five limits between the smallest that works
and what it takes when memory is ample; each plan runs AdamW training steps, and the peak of the bytes alive on each
device is set against the limit and the prediction. ``--out`` keeps rows, and models found there are not run again.
Exits 1 where a plan went above its limit or a model could not be run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.same_numbers.run import FIXED_BATCH, entries
from partita.capture import capture
from partita.cluster import Cluster
from partita.errors import InfeasibleError
from partita.lockstep import can_synchronise
from partita.measure import local_cluster
from partita.plan import Plan
from partita.planners.auto import auto
from partita.runtime.compare import tensors_in
from partita.runtime.memory import measure_memory
from partita.runtime.module import ParallelModule
from partita.sharding.batch import layouts
from partita.torch_compat import pytree
from partita.units import format_bytes

LIMITS = 5
COPIES = 4  # the example's samples so often, where its inputs can be joined


@dataclass(frozen=True)
class Row:
    """One device of one plan. Bytes."""

    model: str
    limit: int
    device: str
    predicted: int
    measured: int
    plan: str

    @property
    def ratio(self) -> float:
        return self.measured / max(self.predicted, 1)


def limited(cluster: Cluster, memory: int) -> Cluster:
    return replace(cluster, devices=tuple(replace(d, memory_bytes=memory) for d in cluster.devices))


def repeated(values: Any, batch: int, copies: int) -> Any:
    """The call's inputs ``copies`` times along the batch."""

    def grow(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == batch:
            return torch.cat([leaf] * copies)
        return leaf

    return pytree.tree_map(grow, values)


def loss(output: Any, _: torch.Tensor) -> torch.Tensor:
    """The model's own loss where it gives one, else the mean square of the first output that training can reach."""
    for _, tensor in tensors_in(output):
        if tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
            if not tensor.dim():
                return tensor
            return torch.view_as_real(tensor).square().mean() if tensor.is_complex() else tensor.square().mean()
    raise ValueError("no output needs a gradient")


def few_words(plan: Plan) -> str:
    widths = "+".join(str(len(s.devices)) for s in plan.stages)
    again = sum(len(s.recompute) for s in plan.stages)
    return f"{widths}, {plan.batch.microbatches} mb, {plan.schedule}" + (f", {again} recomputed" if again else "")


def rows_of(name: str, build: Any, *, devices: int = 2, limits: int = LIMITS) -> Iterator[Row]:
    """Every device of the plans of one model; nothing where it runs as its Python goes (no prediction is made)."""
    torch.manual_seed(0)
    model, args, kwargs = build()
    model.train()
    captured = capture(model, args, kwargs)
    batch = captured.graph.batch if not captured.live else 0
    if batch and name not in FIXED_BATCH:
        args, kwargs = repeated((args, kwargs), batch, COPIES)
        captured = capture(model, args, kwargs)
    if captured.live:
        return
    graph, machine = captured.graph, local_cluster(["cpu"] * devices)
    found, sync = layouts(graph), can_synchronise(graph)

    def plan(memory: int) -> Plan:
        return auto(graph, found, limited(machine, memory), sync_batch_norm=sync)

    ample = plan(1 << 40)
    assert ample.predicted is not None
    most = max(need for _, need in ample.predicted.memory)
    least = smallest(plan, most)
    top = max(1.06 * most, 1.25 * least)
    known: dict[Plan, dict[str, int]] = {}
    for k in range(limits):
        memory = round(least * (top / least) ** (k / (limits - 1)))
        try:
            made = plan(memory)
        except InfeasibleError:  # the search is not exhaustive: a smaller limit may have worked
            print(f"{name}: no plan found for {format_bytes(memory)}", flush=True)
            continue
        assert made.predicted is not None
        key = replace(made, predicted=None, reasons=(), gap=0.0, status="manual")
        if key not in known:
            known[key] = measured(model, key, limited(machine, memory), args, kwargs)
        for device, need in made.predicted.memory:
            yield Row(name, memory, device, need, known[key].get(device, 0), few_words(made))


def smallest(plan: Any, most: int) -> int:
    """The smallest limit that works, from the planner's own remedy."""
    try:
        plan(most // 64)
    except InfeasibleError as error:
        clusters = [r.change["cluster"] for r in error.remedies if "cluster" in r.change]
        return int(clusters[0].devices[0].memory_bytes)
    return most // 64


def measured(model: nn.Module, plan: Plan, cluster: Cluster, args: Any, kwargs: Any) -> dict[str, int]:
    """Peak bytes on each device of a training step, AdamW's state in place."""
    parallel = ParallelModule(model, plan, cluster, loss_fn=loss)
    try:
        trained = [p for p in parallel.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        call = (*args, torch.zeros(()))
        parallel.train_step(*call, **kwargs)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return measure_memory(parallel, call, kwargs, optimizer=optimizer)
    finally:
        parallel.close()


def quantiles(values: list[float]) -> str:
    ordered = sorted(values)
    picks = [(q, ordered[min(int(q * len(ordered)), len(ordered) - 1)]) for q in (0.0, 0.05, 0.25, 0.5, 0.75, 0.95)]
    return ", ".join(f"{q:.0%} {v:.3f}" for q, v in picks) + f", most {ordered[-1]:.3f}"


def kept(path: Path | None) -> list[Row]:
    if path is None or not path.is_file():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.planner.memory_limits", description=__doc__)
    parser.add_argument("--models", default="", help="names, separated by commas (all)")
    parser.add_argument("--out", type=Path, help="file of rows to go on with")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    zoo = entries()
    rows = kept(given.out)
    done = {row.model for row in rows}
    failed = 0
    for name in given.models.split(",") if given.models else zoo:
        if name in done:
            continue
        try:
            new = list(rows_of(name, zoo[name].build))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            failed += 1
            continue
        rows += new
        if given.out is not None:
            with given.out.open("a") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in new)
        for row in new:
            mark = "ABOVE THE LIMIT" if row.measured > row.limit else ""
            print(
                f"{name:26} {format_bytes(row.limit):>9} {row.device} predicted {format_bytes(row.predicted):>9} "
                f"measured {format_bytes(row.measured):>9} {row.ratio:6.3f}  {row.plan} {mark}",
                flush=True,
            )
        if not new:
            print(f"{name}: runs as its Python goes; nothing is predicted", flush=True)
    above = [row for row in rows if row.measured > row.limit]
    if rows:
        print(f"measured / predicted over {len(rows)} devices: {quantiles([r.ratio for r in rows])}")
    models, plans = len({r.model for r in rows}), len({(r.model, r.limit) for r in rows})
    print(f"{len(above)} devices above their limit, in {plans} plans of {models} models; {failed} models failed")
    return int(bool(above or failed))


if __name__ == "__main__":
    sys.exit(main())
