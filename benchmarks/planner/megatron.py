"""Published throughput: the ten GPT runs of Narayanan et al. (SC 2021, Table 1), predicted by the library's cost model.

    python -m benchmarks.planner.megatron          the table: predicted against achieved, and the planner's own choice
    python -m benchmarks.planner.megatron --fit    fits the constants again on every other row (a few minutes)

Each row's tensor, pipeline and data degrees are given exactly; the microbatch and the number of interleaved stages a
device, which the table does not say, are the model's choice (powers of two; divisors of the layers). Attention is not
fused and activations are recomputed, as there. ``FITTED`` is what was fitted, on rows 1, 3, 5, 7 and 9; rows 2, 4, 6, 8
and 10 were never looked at by the fit. Everything else is a default of ``cost.roofline.Assumptions`` or a figure of
the cluster as published.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from partita.capture import capture
from partita.cluster import Cluster
from partita.cost.roofline import Assumptions
from partita.graph import Graph
from partita.models.catalog import build
from partita.models.gpt import GPTSize
from partita.planners.large.degrees import Layout
from partita.planners.large.explain import spell
from partita.planners.large.pools import pools
from partita.planners.large.search import Limits, Search
from partita.planners.large.units import units

DATA = Path(os.environ.get("PARTITA_PLANNER_DATA", Path(__file__).resolve().parents[3] / "shared" / "planner-data"))
TABLE = DATA / "published" / "megatron-sc21-table1.json"
LENGTH, VOCABULARY = 2048, 51200
FITTED = {"products": 0.68}
FIT_ROWS = (0, 2, 4, 6, 8)


@dataclass(frozen=True, slots=True)
class Run:
    """One row of the table. ``achieved``: Tflop/s per GPU."""

    billions: float
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    achieved: float

    @property
    def flops(self) -> float:
        """Of a step, as the paper counts them (section 5.1)."""
        h, layers = self.hidden, self.layers
        return 96.0 * self.batch * LENGTH * layers * h * h * (1 + LENGTH / (6 * h) + VOCABULARY / (16 * layers * h))

    def tflops(self, seconds: float) -> float:
        return self.flops / seconds / self.gpus / 1e12


def runs(path: Path = TABLE) -> tuple[Run, ...]:
    return tuple(Run(*row) for row in json.loads(path.read_text())["rows"])


def graph_of(run: Run) -> Graph:
    """The model as trained there: dropout 0.1, attention's scores in memory."""
    size = GPTSize(run.layers, run.hidden, run.heads, VOCABULARY, LENGTH, dropout=0.1, fused=False)
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64, device="meta")
    return capture(build(size), (tokens, tokens)).graph


def searcher(run: Run, graph: Graph, assume: Assumptions, limits: Limits) -> Search:
    cluster = Cluster.parse(f"{run.gpus // 8}x8xA100-80GB@HDR")
    return Search(graph, units(graph), pools(cluster, assume), batch=run.batch, assume=assume, limits=limits)


def as_published(run: Run, graph: Graph, assume: Assumptions) -> Layout | None:
    """The best layout with the row's degrees: Megatron of 2021 divides no sequence, has no ZeRO, and recomputes."""
    replicas = run.gpus // (run.tensor * run.pipeline)
    limits = Limits(run.tensor, run.pipeline, replicas, sequence=False, recompute="all", zero=0)
    found = searcher(run, graph, assume, limits).run(30.0)
    even = [x for x in found.layouts if run.layers % (run.pipeline * x.degrees.chunks) == 0]
    return even[0] if even else None


def errors(table: Sequence[Run], graphs: Sequence[Graph], rows: Iterable[int], assume: Assumptions) -> list[float]:
    found = []
    for i in rows:
        layout = as_published(table[i], graphs[i], assume)
        found.append(table[i].tflops(layout.seconds) / table[i].achieved - 1.0 if layout else float("-inf"))
    return found


def assumptions() -> Assumptions:
    """The library's own, with the fitted constants."""
    return Assumptions(**FITTED)  # type: ignore[arg-type]


def fit(table: Sequence[Run], graphs: Sequence[Graph]) -> Assumptions:
    """The constants that make the squared relative errors of ``FIT_ROWS`` least, by a shrinking search on a grid."""
    best = replace(Assumptions(), products=0.5)
    step = dict.fromkeys(FITTED, 0.08)
    score = float(np.square(errors(table, graphs, FIT_ROWS, best)).sum())
    while max(step.values()) > 0.004:
        moved = False
        for name, width in step.items():
            for sign in (1, -1):
                value = round(min(0.98, max(0.3, getattr(best, name) + sign * width)), 3)
                tried = replace(best, **{name: value})
                found = float(np.square(errors(table, graphs, FIT_ROWS, tried)).sum())
                if found < score:
                    best, score, moved = tried, found, True
        print(
            f"  {', '.join(f'{n} {getattr(best, n)}' for n in step)}: root mean square {100 * (score / 5) ** 0.5:.2f} %"
        )
        if not moved:
            step = {name: width / 2 for name, width in step.items()}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="fit the constants again")
    options = parser.parse_args()
    if not TABLE.is_file():
        print(f"skipped: {TABLE} is not there (PARTITA_PLANNER_DATA says where planner-data is)")
        return
    table = runs()
    began = time.perf_counter()
    graphs = [graph_of(run) for run in table]
    print(f"ten models captured on meta tensors in {time.perf_counter() - began:.1f} s")
    assume = fit(table, graphs) if options.fit else assumptions()
    print(f"constants fitted on rows {', '.join(str(i + 1) for i in FIT_ROWS)}: "
          + ", ".join(f"{name} {getattr(assume, name)}" for name in FITTED))  # fmt: skip
    print("\nrow  billion  GPUs  t x p x d      micro  chunks  achieved  predicted   error  rows  fullest device")
    found: dict[str, list[float]] = {"fit": [], "held out": []}
    for i, run in enumerate(table):
        layout = as_published(run, graphs[i], assume)
        assert layout is not None, f"row {i + 1} does not fit"
        kind = "fit" if i in FIT_ROWS else "held out"
        error = run.tflops(layout.seconds) / run.achieved - 1.0
        found[kind].append(abs(error))
        d = layout.degrees
        shape = f"{run.tensor} x {run.pipeline} x {d.groups[0].replicas}"
        print(
            f"{i + 1:3d}  {run.billions:7.1f}  {run.gpus:4d}  {shape:13s}  {d.samples:5d}  {d.chunks:6d}  "
            f"{run.achieved:8.0f}  {run.tflops(layout.seconds):9.1f}  {100 * error:+5.1f}%  {kind:8s}  "
            f"{max(s.memory for s in layout.stages) / 1e9:.1f} GB"
        )
    for kind, values in (*found.items(), ("all ten", found["fit"] + found["held out"])):
        print(f"{kind}: median {100 * median(values):.1f} %, worst {100 * max(values):.1f} %")
    print("\nthe planner's own choice (same models, GPUs, batch; attention not fused):")
    for i, run in enumerate(table):
        began = time.perf_counter()
        chosen = searcher(run, graphs[i], assume, Limits()).run()
        took = time.perf_counter() - began
        speed = run.tflops(chosen.layouts[0].seconds)
        print(
            f"{i + 1:3d}  {speed:6.1f} ({speed / run.achieved:.2f}x published) in {took:4.1f} s: "
            f"{spell(chosen.layouts[0].degrees)}"
        )


if __name__ == "__main__":
    main()
