"""Held out: Llama 3 405B on 8,192 and 16,384 H100 at its authors' degrees, by constants fitted on A100s.

    python -m benchmarks.planner.llama3

Grattafiori et al., *The Llama 3 Herd of Models* (2024), Table 4: sequences of 8,192 tokens, 16 M tokens a step, tensor
degree 8, 16 stages in a row, 64 and 128 replicas, 430 and 400 Tflop/s a device in bfloat16; interleaved, sequences
divided, RoCE of 400 Gbit/s, nothing recomputed. The GPUs, degrees, tokens and Tflop/s are those that P. Balaji (Meta)
showed at SC 2024, as noted at https://glennklockwood.com/garden/llama-3.1; the rest has the paper alone as source.
Stages a device and ZeRO level are the cost model's choice. Two predictions: with nothing recomputed, whatever the
memory (its prediction is printed; the authors make it fit 80 GB by freeing tensors early), and under the memory limit,
where layers are recomputed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from partita.capture import capture
from partita.cluster import Cluster
from partita.cost.roofline import Assumptions
from partita.models import make
from partita.planners.large.clock import ranked
from partita.planners.large.explain import spell
from partita.planners.large.pools import pools
from partita.planners.large.search import Limits, Search
from partita.planners.large.units import units

LENGTH, BATCH = 8192, 2048


@dataclass(frozen=True, slots=True)
class Run:
    """``achieved``: Tflop/s a device."""

    nodes: int
    replicas: int
    achieved: float


RUNS = (Run(1024, 64, 430.0), Run(2048, 128, 400.0))


def main() -> None:
    began = time.perf_counter()
    model, args = make("llama-405b", 2, LENGTH)
    graph = capture(model, args).graph
    print(f"captured in {time.perf_counter() - began:.1f} s")
    assume, row = Assumptions(), units(graph)
    flops = 3.0 * sum(op.flops for op in graph.ops) / graph.batch * BATCH
    like = None
    for run in RUNS:
        for what, headroom in (("nothing recomputed", 16.0), ("within 80 GB", 0.95)):
            like = Search(
                graph, row, pools(Cluster.parse(f"{run.nodes}x8xH100@ROCE-400G"), assume), batch=BATCH, assume=assume,
                headroom=headroom, limits=Limits(8, 16, run.replicas, 1, order="interleaved", sequence=True), like=like,
            )  # fmt: skip
            best = ranked(like, like.run(20.0)).layouts[0]
            speed = flops / best.seconds / (8 * run.nodes) / 1e12
            again = sum(sum(stage.recomputed) for stage in best.stages)
            print(
                f"{8 * run.nodes} H100, {what}: {speed:.1f} Tflop/s a device, achieved {run.achieved:.0f} "
                f"({100 * (speed / run.achieved - 1):+.1f} %); {max(s.memory for s in best.stages) / 1e9:.1f} GB, "
                f"{again} of {len(row.row)} units recomputed or offloaded; {spell(best.degrees)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
