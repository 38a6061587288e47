"""Against AutoParallel (meta-pytorch/autoparallel): a Llama of hidden size 1024 on 8 devices and on 4 x 8.

    python -m benchmarks.planner.autoparallel                             our planner on the published model
    python -m benchmarks.planner.autoparallel --autoparallel CHECKOUT     and AutoParallel beside it, in the same run

Its rule for the CPU's fused attention is 'whole on every device'; ``--attention-as-products`` traces attention as
products and a softmax, which it can divide. ``--autoparallel`` (or ``PARTITA_AUTOPARALLEL``) takes what is to be put
on the import path, several folders with ``:`` between them. Returns 1 where its program rejects our labels or has a
better objective, where our own planner leaves a gap or its plan costs more than AutoParallel's placements do.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import sys
import time
import warnings
from math import prod
from pathlib import Path
from typing import Any

import torch

from partita.capture import capture
from partita.cluster import Cluster
from partita.graph import Graph
from partita.models.catalog import build
from partita.models.llama import LlamaSize
from partita.planners.intra import IntraPlan, Mesh, plan_intra_op
from partita.planners.intra.forms import Form
from partita.planners.intra.problem import STATE_BYTES
from partita.planners.series import solve_series
from partita.sharding.placements import Shard

DATA = Path(os.environ.get("PARTITA_PLANNER_DATA", Path(__file__).parents[2].parent / "shared" / "planner-data"))
HIDDEN, HEADS, INNER, VOCABULARY, LENGTH, PER_RANK = 1024, 16, 2816, 32000, 512, 2
NAMES = (
    ("tok_embeddings", "tokens"), ("attention_norm", "norm1"), ("ffn_norm", "norm2"), ("feed_forward", "mlp"),
    (".wq.", ".q."), (".wk.", ".k."), (".wv.", ".v."), (".wo.", ".o."), (".w1.", ".gate."), (".w3.", ".up."),
    (".w2.", ".down."), ("output.", "head."),
)  # fmt: skip
Placed = dict[str, tuple[int | str, ...]]


def graph_of(layers: int, shape: tuple[int, ...]) -> Graph:
    model = build(LlamaSize(layers, HIDDEN, HEADS, HEADS, INNER, VOCABULARY)).to(torch.bfloat16)
    tokens = torch.zeros(PER_RANK * shape[0], LENGTH, dtype=torch.int64, device="meta")
    return capture(model, (tokens,)).graph


def mesh_of(shape: tuple[int, ...]) -> Mesh:
    nodes = prod(shape) // 8
    return Mesh.over(Cluster.parse(f"{nodes}x8xH100" if nodes > 1 else "8xH100"), shape)


def placed(graph: Graph, held: dict[str, Form]) -> Placed:
    """Parameters and inputs by path: a dim or 'Replicate' along each axis."""
    return {
        graph.tensor(name).path or name: tuple(p.dim if isinstance(p, Shard) else "Replicate" for p in form)
        for name, form in held.items()
    }


def ours(layers: int, shape: tuple[int, ...]) -> tuple[Graph, IntraPlan, dict[str, Any]]:
    started = time.perf_counter()
    graph = graph_of(layers, shape)
    captured, before = time.perf_counter(), time.process_time()
    plan = plan_intra_op(graph, mesh_of(shape))
    ended, after = time.perf_counter(), time.process_time()
    row = {
        "capture": captured - started, "plan": ended - captured, "process": after - before, "nodes": plan.nodes,
        "step": plan.seconds, "messages": plan.messages, "gap": plan.gap, "state": plan.state_bytes,
    }  # fmt: skip
    return graph, plan, row


# -- AutoParallel, in a process of its own ---------------------------------------------------------------------------


def theirs(path: str, layers: int, shape: tuple[int, ...], wanted: Placed, products: bool) -> dict[str, Any]:
    """Its problem built, solved by us and by its own solver, and solved again with our placements of weights."""
    sys.path[:0] = path.split(os.pathsep)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", "Overwriting previously set objective")
    _as_h100()
    import pulp  # type: ignore[import-not-found]
    from autoparallel._testing.models.llama3 import (  # type: ignore[import-not-found]
        ScaledDotProductAttention,
        Transformer,
        TransformerModelArgs,
    )
    from autoparallel.api import AutoParallel  # type: ignore[import-not-found]
    from torch.nn.attention import SDPBackend
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from benchmarks.planner.autoparallel_problem import judge, read, spent

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=prod(shape))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
    if products:
        ScaledDotProductAttention.backends = [SDPBackend.MATH]
    with torch.device("meta"):
        sizes = TransformerModelArgs(
            dim=HIDDEN, n_layers=layers, n_heads=HEADS, vocab_size=VOCABULARY, max_seq_len=LENGTH
        )
        model = Transformer(sizes).to(torch.bfloat16)

    def example() -> torch.Tensor:
        return torch.randint(0, VOCABULARY, (PER_RANK * shape[0], LENGTH), device="cpu")

    began = time.perf_counter()
    with AutoParallel(model, example, mesh, repeated_subgraphs=True) as auto:
        optimizer = auto.sharding_optimizer
        built = time.perf_counter()
        problem = read(optimizer)
        was_read = time.perf_counter()
        found = solve_series(problem.problem, seconds=120)
        solved = time.perf_counter()
        row: dict[str, Any] = {
            "variables": len(optimizer.pulp_variables), "build": built - began, "read": was_read - built,
            "our_seconds": solved - was_read, "our_cost": found.cost, "our_bound": found.lower_bound,
            "judged": judge(optimizer, problem, found.labels) if found.labels else float("inf"),
        }  # fmt: skip
        asked, missing = _asked(optimizer, problem, wanted)
        bound_to = solve_series(asked, seconds=120)
        row["as_ours"] = judge(optimizer, problem, bound_to.labels) if bound_to.labels else float("inf")
        row["missing"] = missing
        row["spent_as_ours"] = spent(optimizer)
        for var in optimizer.pulp_variables.values():
            var.varValue = None
        began = time.perf_counter()
        auto.optimize_placement()
        row["its_seconds"] = time.perf_counter() - began
        row["its_cost"] = float(pulp.value(optimizer.prob.objective))
        row["spent"] = spent(optimizer)
        row["placed"] = _its_placements(optimizer, auto.sharding_placement)
    return row


def _as_h100() -> None:
    """Its cost models ask for the device's name: an H100, as in its own tests without devices."""
    torch.cuda.get_device_name = lambda *_, **__: "NVIDIA H100"
    torch.cpu.get_device_name = lambda *_, **__: "NVIDIA H100"  # type: ignore[attr-defined]


def _weights(graph: Any) -> dict[str, Any]:
    """Its placeholder of each of our parameters, and of the tokens."""
    from torch._functorch._aot_autograd.fx_utils import get_param_and_grad_nodes, get_plain_input_and_grad_nodes

    found = {}
    for description, (node, _) in get_param_and_grad_nodes(graph).items():
        name = description.target
        for theirs_, ours_ in NAMES:
            name = name.replace(theirs_, ours_)
        found[re.sub(r"\._checkpoint_wrapped_module", "", name)] = node
    ((_, (tokens, _)),) = get_plain_input_and_grad_nodes(graph).items()
    found["args[0]"] = tokens
    return found


def _spoken(placements: Any) -> tuple[int | str, ...]:
    return tuple(p.dim if hasattr(p, "dim") else "Replicate" for p in placements)


def _asked(optimizer: Any, problem: Any, wanted: Placed) -> tuple[Any, list[str]]:
    """Its problem with our placements of the weights, and what it has no strategy for."""
    from dataclasses import replace

    root = {linked[0]: own[0] for linked, own in optimizer.cluster_links.items()}
    place = {number: i for i, number in enumerate(problem.nodes)}
    costs, missing = list(problem.problem.costs), []
    for name, node in _weights(optimizer.graph).items():
        number = optimizer.node_map[node]
        own = place[root.get(number, number)]
        fits = [_spoken(s.output_specs.placements) == wanted[name] for s in optimizer.strats[node].strategies]
        if any(fits):
            costs[own] = costs[own] + [0.0 if fit else float("inf") for fit in fits]
        else:
            missing.append(f"{name} {wanted[name]}")
    return replace(problem.problem, costs=tuple(costs)), missing


def _its_placements(optimizer: Any, chosen: Any) -> Placed:
    strategies = {node.name: spec for node, spec in chosen.items()}
    return {
        name: _spoken(strategies[node.name].output_specs.placements) for name, node in _weights(optimizer.graph).items()
    }


# -- the command -----------------------------------------------------------------------------------------------------


def run(path: str, layers: int, shape: tuple[int, ...], products: bool) -> dict[str, Any]:
    graph, plan, row = ours(layers, shape)
    began = time.process_time()
    elements = sum(prod(graph.tensor(t.name).shape_at(graph.batch)) for t in graph.of_role("parameter"))
    tight = plan_intra_op(graph, mesh_of(shape), memory=STATE_BYTES * elements / prod(shape))
    row |= {"tight": tight.seconds, "tight_gap": tight.gap, "tight_process": time.process_time() - began}
    if not path:
        return row
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        other = pool.apply(theirs, (path, layers, shape, placed(graph, dict(plan.held)), products))
    imposed = plan_intra_op(graph, mesh_of(shape), fixed=other["placed"])
    return {**row, **other, "step_as_theirs": imposed.seconds, "messages_as_theirs": imposed.messages}


def differences(ours_: dict[tuple[str, str], float], its: dict[tuple[str, str], float]) -> list[str]:
    """Where, by its cost model, our placements cost otherwise than its own: totals, then the kinds that differ most."""
    found = []
    for what in ("work", "messages", "transitions"):
        both = [sum(cost for (w, _), cost in side.items() if w == what) for side in (ours_, its)]
        kinds = {kind: ours_.get((what, kind), 0.0) - its.get((what, kind), 0.0) for _, kind in {*ours_, *its}}
        most = sorted(kinds.items(), key=lambda item: -abs(item[1]))[:5]
        shown = ", ".join(f"{kind} {more:+.1f}" for kind, more in most if abs(more) > 1e-3)
        found.append(f"{what}: {both[0]:.1f} placed as ours, {both[1]:.1f} as its own ({shown or 'alike'})")
    return found


def wrong(row: dict[str, Any]) -> list[str]:
    found = []
    if max(row["gap"], row["tight_gap"]) > 1e-2 or row["gap"] > 1e-6:
        found.append(f"our plans are within {row['gap']:.2%} and {row['tight_gap']:.2%} of their bounds only")
    if "judged" in row:
        if row["judged"] > row["its_cost"] * (1 + 1e-6):
            found.append(f"its program prices our labels at {row['judged']:.3f}, its own at {row['its_cost']:.3f}")
        if row["step"] > row["step_as_theirs"] * (1 + 1e-9):
            found.append("its placements of the weights cost less than ours by our cost model")
    return found


def published(layers: int, shape: tuple[int, ...]) -> float | None:
    file = DATA / "published" / "autoparallel-times.json"
    if not file.exists():
        return None
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return next((r["plan_s"] for r in rows if r["layers"] == layers and tuple(r["mesh"]) == shape), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--autoparallel", default=os.environ.get("PARTITA_AUTOPARALLEL", ""), metavar="CHECKOUT")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--mesh", choices=("8", "4x8"), help="one mesh only")
    parser.add_argument("--attention-as-products", action="store_true", help="give it attention as single products")
    options = parser.parse_args()
    failed = 0
    for text in (options.mesh,) if options.mesh else ("8", "4x8"):
        shape = tuple(map(int, text.split("x")))
        row = run(options.autoparallel, options.layers, shape, options.attention_as_products)
        known = published(options.layers, shape)
        print(f"{options.layers} layers on {text}" + (f" (published: {known:.1f} s to plan)" if known else ""))
        print(
            f"  ours: captured in {row['capture']:.2f} s, planned in {row['plan']:.2f} s ({row['process']:.2f} s of the"
            f" process; {row['nodes']} nodes); step {row['step'] * 1e3:.3f} ms, gap {row['gap']:.1e}, "
            f"{row['state'] / 2**30:.2f} GiB of state a device"
        )
        print(
            f"  ours, with as little state a device as can be: step {row['tight'] * 1e3:.3f} ms, gap "
            f"{row['tight_gap']:.1e}, {row['tight_process']:.2f} s of the process"
        )
        if "judged" in row:
            print(
                f"  its program ({row['variables']} variables, built in {row['build']:.1f} s, read in "
                f"{row['read']:.1f} s): ours {row['judged']:.3f} in {row['our_seconds']:.2f} s, bound "
                f"{row['our_bound']:.3f}; its solver {row['its_cost']:.3f} in {row['its_seconds']:.1f} s"
            )
            print(
                f"  weights placed as it places them, by our cost model: {row['step_as_theirs'] * 1e3:.3f} ms "
                f"({row['messages_as_theirs'] * 1e3:.3f} of messages, ours {row['messages'] * 1e3:.3f}); as we place "
                f"them, by its cost model: {row['as_ours']:.3f}"
            )
            for line in differences(row["spent_as_ours"], row["spent"]):
                print(f"    {line}")
            for name in row["missing"]:
                print(f"    it has no strategy for {name}; left free")
        else:
            print("  AutoParallel: skipped, no checkout given")
        for line in wrong(row):
            failed = 1
            print(f"  WRONG: {line}")
        sys.stdout.flush()
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
