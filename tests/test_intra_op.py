"""Intra-op planning: optimal by trying everything, Megatron's division and data parallelism found, memory kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from planning_graphs import mlp

from partita.capture import capture
from partita.cluster import Cluster
from partita.cost.communication import Channel, Team, all_gather, all_reduce, reduce_scatter
from partita.cost.roofline import DEFAULT
from partita.errors import InfeasibleError, PlanError
from partita.graph import Graph, Op, Ref, Tensor
from partita.models.llama import Llama, LlamaSize
from partita.planners import series
from partita.planners.intra import Mesh, plan_intra_op
from partita.planners.intra.forms import Moves
from partita.planners.intra.problem import at_batch, pose
from partita.planners.labelling import Edge, Problem
from partita.planners.series import solve_series
from partita.sharding.placements import COPIED, PARTIAL, REPLICATE, Cut, Shard, even


def mesh(*shape: int, bandwidth: float = 4e11, latency: float = 1e-6) -> Mesh:
    device = Cluster.parse("2xH100").devices[0]
    channel = Channel(bandwidth, latency)
    return Mesh(device, tuple(Team(n, 1, channel, channel) for n in shape))


def residual(width: int = 64, batch: int = 8) -> Graph:
    """``mlp`` of two layers whose input is added to its result, so that a tensor has two users."""
    graph = mlp(2, width=width, batch=batch)
    shape = graph.tensor("r1").shape
    total = Op(":add", "aten.add.Tensor", (Ref("r0"), Ref("r1")), (), ("y",))
    tensors = (*graph.tensors, Tensor("y", shape, "float32", "op", "", "y", True))
    return replace(graph, tensors=tensors, ops=(*graph.ops, total), outputs=("y",))


def block(layers: int = 2, batch: int = 16) -> Graph:
    with torch.device("meta"):
        model = Llama(LlamaSize(layers, 1024, 16, 16, 2816, vocabulary=4096)).to(torch.bfloat16)
    return capture(model, (torch.zeros(batch, 512, dtype=torch.int64, device="meta"),)).graph


def tried(problem: Problem) -> float:
    return min(problem.cost(labels) for labels in product(*(range(len(c)) for c in problem.costs)))


@pytest.mark.parametrize("seed", range(40))
def test_series_equals_trying_every_labelling(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n = int(draw.integers(1, 7))
    sizes = draw.integers(1, 4, n)
    edges = []
    for a, b in product(range(n), range(n)):
        if a != b and draw.random() < 0.4:
            table = draw.integers(0, 9, (sizes[a], sizes[b])).astype(np.float64)
            table[draw.random(table.shape) < 0.15] = np.inf
            edges.append(Edge(a, b, table))
    problem = Problem(tuple(draw.integers(0, 9, s).astype(np.float64) for s in sizes), tuple(edges))
    best = tried(problem)
    found = solve_series(problem)
    if np.isinf(best):
        assert found.status == "infeasible"
    else:
        assert found.status == "optimal"
        assert problem.cost(found.labels) == found.cost == pytest.approx(best)
        assert found.lower_bound == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_what_elimination_would_blow_up_is_left_to_the_labelling_solver(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(6) for b in range(a)]
    problem = Problem(
        tuple(draw.integers(0, 9, 3).astype(np.float64) for _ in range(6)),
        tuple(Edge(a, b, draw.integers(0, 9, (3, 3)).astype(np.float64)) for a, b in pairs),
    )
    eliminated = solve_series(problem)
    monkeypatch.setattr(series, "ENTRIES", 0)
    searched = solve_series(problem)
    assert searched.status == eliminated.status == "optimal"
    assert searched.cost == eliminated.cost == tried(problem)


@pytest.mark.parametrize("bandwidth", [1e9, 4e11])
@pytest.mark.parametrize("graph", [mlp(2), residual(), mlp(1, width=512, batch=4)])
def test_a_plan_costs_what_trying_every_sharding_finds(graph: Graph, bandwidth: float) -> None:
    small = mesh(4, bandwidth=bandwidth)
    problem = pose(at_batch(graph), small, DEFAULT, {}).problem
    assert np.prod([len(c) for c in problem.costs]) < 2e6
    total = sum_of_all(problem)
    plan = plan_intra_op(graph, small)
    assert plan.seconds == pytest.approx(total, rel=1e-12)
    assert plan.gap < 1e-9


@pytest.mark.parametrize("share", [0.26, 0.4, 0.6, 0.8])
def test_under_a_memory_limit_the_bound_and_the_plan_hold_the_optimum_between_them(share: float) -> None:
    graph, small = mlp(2, width=256, batch=64), mesh(4)
    posed = pose(at_batch(graph), small, DEFAULT, {})
    whole = sum(float(b.max()) for b in posed.state_bytes)
    usages = [np.zeros(len(c)) for c in posed.problem.costs]
    usages[len(posed.ops) : len(posed.ops) + len(posed.held)] = posed.state_bytes
    every = product(*(range(len(c)) for c in posed.problem.costs[len(posed.ops) :]))
    best = np.inf
    for tail in every:  # held and shared nodes tried; the ops between them by the unlimited solver, which is exact
        labels = dict(enumerate(tail, start=len(posed.ops)))
        if sum(usages[v][label] for v, label in labels.items()) <= share * whole:
            costs = [np.where(np.arange(len(c)) == labels.get(v, np.arange(len(c))), c, np.inf)
                     for v, c in enumerate(posed.problem.costs)]  # fmt: skip
            best = min(best, solve_series(replace(posed.problem, costs=tuple(costs))).cost)
    plan = plan_intra_op(graph, small, memory=share * whole)
    assert plan.state_bytes <= share * whole
    assert plan.lower_bound <= best * (1 + 1e-9) and best <= plan.seconds * (1 + 1e-9)


def test_alike_blocks_are_divided_one_by_one_until_they_fit() -> None:
    slow, fast = Channel(2e10, 1e-5), Channel(4e11, 1e-6)
    graph, grid = block(4, batch=8), Mesh(mesh(8).device, (Team(1, 4, slow, slow), Team(8, 1, fast, fast)))
    free = plan_intra_op(graph, grid)
    half = plan_intra_op(graph, grid, memory=free.state_bytes / 2)
    assert half.state_bytes <= free.state_bytes / 2
    assert half.seconds > free.seconds
    assert half.gap < 0.02


def sum_of_all(problem: Problem) -> float:
    """The least cost over all labels at once, as one table with a dim a node."""
    n = problem.num_nodes
    total = np.zeros(tuple(len(c) for c in problem.costs))
    for v, cost in enumerate(problem.costs):
        total = total + cost.reshape([-1 if u == v else 1 for u in range(n)])
    for edge in problem.edges:
        table = edge.cost if edge.a < edge.b else edge.cost.T
        low, high = sorted((edge.a, edge.b))
        total = total + table.reshape([table.shape[0] if u == low else table.shape[1] if u == high else 1
                                       for u in range(n)])  # fmt: skip
    return float(total.min())


def test_a_transformer_block_is_divided_as_megatron_divides_it() -> None:
    plan = plan_intra_op(block(batch=2), mesh(8))
    form = {"q": 0, "k": 0, "v": 0, "o": 1}
    for layer in range(2):
        for name, dim in form.items():
            (held,) = plan.held[f"layers.{layer}.attention.{name}.weight"]
            assert isinstance(held, Shard) and held.dim == dim
        for name, dim in {"gate": 0, "up": 0, "down": 1}.items():
            (held,) = plan.held[f"layers.{layer}.mlp.{name}.weight"]
            assert isinstance(held, Shard) and held.dim == dim
    assert plan.gap < 1e-9


def test_the_batch_is_divided_where_messages_are_dear() -> None:
    plan = plan_intra_op(mlp(4, width=256, batch=1 << 20), mesh(8, bandwidth=1e9, latency=1e-5))
    assert {labels for name, labels in plan.ops.items() if "linear" in name} == {("b.0",)}


def test_on_two_axes_the_batch_takes_the_slow_one_and_columns_the_fast_one() -> None:
    device = Cluster.parse("2xH100").devices[0]
    slow, fast = Channel(2e10, 1e-6), Channel(4e11, 1e-6)
    plan = plan_intra_op(block(batch=256), Mesh(device, (Team(1, 4, slow, slow), Team(8, 1, fast, fast))))
    across = {labels[0] for name, labels in plan.ops.items() if name.endswith(":linear")}
    assert across == {"b.1"}


def test_weights_are_divided_at_rest_where_memory_is_short() -> None:
    graph, grid = block(batch=256), mesh(8, bandwidth=5e9)
    free = plan_intra_op(graph, grid)
    elements = sum(int(np.prod(t.shape)) for t in graph.of_role("parameter"))
    limit = 16.0 * elements / 8
    assert free.state_bytes > limit
    tight = plan_intra_op(graph, grid, memory=limit)
    assert tight.state_bytes == limit
    assert free.seconds <= tight.lower_bound <= tight.seconds
    assert tight.gap < 0.01
    with pytest.raises(InfeasibleError, match="larger mesh"):
        plan_intra_op(graph, grid, memory=limit - 1)


def test_a_tensor_is_held_as_asked_and_that_costs_no_less() -> None:
    graph, grid = block(), mesh(2, 4)
    free = plan_intra_op(graph, grid)
    asked = plan_intra_op(graph, grid, fixed={"*.mlp.down.weight": ("Replicate", 0)})
    held = asked.held["layers.1.mlp.down.weight"]
    assert held[0] == REPLICATE and isinstance(held[1], Shard) and held[1].dim == 0
    assert asked.seconds >= free.seconds
    with pytest.raises(PlanError, match="cannot be held"):
        plan_intra_op(graph, grid, fixed={"*.mlp.down.weight": (5, 0)})


def test_a_change_costs_its_collectives_forward_and_backward() -> None:
    team = Team(4, 1, Channel(1e9, 1e-6), Channel(1e9, 1e-6))
    moves, rows, columns = Moves((team,)), Shard(0, cut(64)), Shard(1, cut(64))
    size = 1e6

    def price(made: object, needed: object) -> float:
        return moves.seconds(size, (made,), (needed,), grad=True)  # type: ignore[arg-type]

    assert price(REPLICATE, REPLICATE) == 0
    assert price(REPLICATE, COPIED) == all_reduce(size, team)
    assert price(rows, COPIED) == all_gather(size, team) + reduce_scatter(size, team)
    assert price(PARTIAL, rows) == reduce_scatter(size, team) + all_gather(size, team)
    assert price(rows, columns) > 0
    assert price(COPIED, REPLICATE) == price(rows, PARTIAL) == float("inf")


def test_what_one_axis_divides_the_other_moves_less_of() -> None:
    team = Team(4, 1, Channel(1e9), Channel(1e9))
    moves, rows, columns = Moves((team, team)), Shard(0, cut(64)), Shard(1, cut(64))
    alone = moves.seconds(1e6, (rows, REPLICATE), (REPLICATE, REPLICATE), grad=False)
    beside = moves.seconds(1e6, (rows, columns), (REPLICATE, columns), grad=False)
    assert beside == pytest.approx(alone / 4)


def test_a_mesh_puts_its_last_axis_inside_of_nodes() -> None:
    grid = Mesh.over(Cluster.parse("4x8xH100"), (4, 8))
    assert [(t.per_node, t.nodes) for t in grid.axes] == [(1, 4), (8, 1)]
    one = Mesh.over(Cluster.parse("4x8xH100"), (32,))
    assert [(t.per_node, t.nodes) for t in one.axes] == [(8, 4)]
    with pytest.raises(PlanError, match="needs 16 devices"):
        Mesh.over(Cluster.parse("4x8xH100"), (16,))


def cut(size: int) -> Cut:
    found = even(size, 4)
    assert found is not None
    return found
