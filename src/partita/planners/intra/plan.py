"""Intra-op planning: the cheapest sharding of every op on a mesh, proven, under each device's memory for weights.

Without a memory limit the graph of a model reduces exactly (``planners.series``). A limit on the weights' bytes is
priced: the cheapest plan at a price per byte, for rising prices, gives plans within the limit and a lower bound on all
of them (Lagrangian relaxation, Everett, 1963); the gap says what is left between the two. Blocks that are alike would
all change at one price, so that in the end a byte is priced a little differently in each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from partita.cost.roofline import DEFAULT, Assumptions
from partita.errors import InfeasibleError
from partita.graph import Graph
from partita.planners.intra.forms import Form
from partita.planners.intra.mesh import Mesh
from partita.planners.intra.problem import Posed, Wish, at_batch, pose
from partita.planners.series import solve_series
from partita.units import format_bytes

ROUNDS = 10
STEEP = 64.0
CLOSE = 1e-3  # a plan this near to the bound is not sought to be bettered
SPREAD = 0.2


@dataclass(frozen=True, slots=True)
class IntraPlan:
    """``ops``: of each op, what it divides along each axis ('' : nothing). ``held``: of each parameter and input, its
    form at rest. ``seconds``: of a training step, with ``lower_bound`` on any plan's, and ``messages`` of them between
    ops and from tensors at rest; ``state_bytes``: of weights, gradients and optimizer state on one device. ``nodes``,
    ``posing``: of the problem, and seconds to write it down.
    """

    ops: Mapping[str, tuple[str, ...]]
    held: Mapping[str, Form]
    seconds: float
    messages: float
    lower_bound: float
    state_bytes: float
    nodes: int
    posing: float

    @property
    def gap(self) -> float:
        return max(self.seconds - self.lower_bound, 0.0) / self.lower_bound if self.lower_bound else 0.0


def plan_intra_op(
    graph: Graph,
    mesh: Mesh,
    *,
    assume: Assumptions = DEFAULT,
    memory: float = math.inf,
    fixed: Mapping[str, Wish] | None = None,
) -> IntraPlan:
    """The cheapest plan of a training step at the graph's own batch.

    ``memory``: bytes of weights, gradients and optimizer state one device may hold. ``fixed``: how parameters and
    inputs are held, by their names with ``*``: a dim or ``'Replicate'`` along each axis. Raises PlanError where a
    tensor cannot be held so, InfeasibleError where the weights do not fit however they are divided.
    """
    started = time.monotonic()
    posed = pose(at_batch(graph), mesh, assume, fixed or {})
    posing = time.monotonic() - started
    least = sum(float(b.min()) for b in posed.state_bytes)
    if least > memory:
        raise InfeasibleError(
            f"{graph.name or 'the model'}: weights, gradients and optimizer state take {format_bytes(least)} on each "
            f"device, divided as far as they can be, and {format_bytes(memory)} are allowed; take a larger mesh"
        )
    labels, bound = _within(posed, memory)
    problem = posed.problem
    first = len(posed.ops)
    ops = {
        name: tuple(option.label for option in table.ways[label])
        for (name, table), label in zip(posed.ops, labels, strict=False)
    }
    chosen = labels[first : first + len(posed.held)]
    held = {name: forms[label] for (name, forms), label in zip(posed.held, chosen, strict=True)}
    seconds = problem.cost(labels)
    messages = seconds - sum(float(c[label]) for c, label in zip(problem.costs, labels, strict=True))
    return IntraPlan(ops, held, seconds, messages, bound, _state(posed, labels), problem.num_nodes, posing)


def _state(posed: Posed, labels: tuple[int, ...]) -> float:
    first = len(posed.ops)
    return sum(float(b[labels[first + i]]) for i, b in enumerate(posed.state_bytes))


def _within(posed: Posed, memory: float) -> tuple[tuple[int, ...], float]:
    """Labels whose state fits, and a lower bound on the cost of all that do."""
    even = [1.0] * len(posed.held)
    over, bound = _solved(posed, 0.0, even)
    if _state(posed, over) <= memory:
        return over, bound
    price = STEEP * bound / memory
    best, least = _solved(posed, price, even)
    while _state(posed, best) > memory:
        bound = max(bound, least - price * memory)
        price *= STEEP
        best, least = _solved(posed, price, even)
    cost = posed.problem.cost
    fits = best
    for _ in range(ROUNDS):  # the price at which both cost the same: the bound is best there, or a third plan cheaper
        price = (cost(fits) - cost(over)) / (_state(posed, over) - _state(posed, fits))
        labels, least = _solved(posed, price, even)
        bound = max(bound, least - price * memory)
        if least >= (cost(fits) + price * _state(posed, fits)) * (1 - 1e-9):
            break
        if _state(posed, labels) > memory:
            over = labels
        else:
            fits = labels
    best = min(best, fits, key=cost)
    if cost(best) > bound * (1 + CLOSE):
        best = min(best, _graded(posed, memory, price, best), key=cost)
    return best, min(bound, cost(best))


def _graded(posed: Posed, memory: float, price: float, best: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks that are alike are divided one after another, not all at once, where a byte costs more in later ones."""
    count = len(posed.held)
    graded = [1.0 + SPREAD * (i / max(count - 1, 1) - 0.5) for i in range(count)]
    low, high = price * (1 - SPREAD), price * (1 + SPREAD)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        labels, _ = _solved(posed, middle, graded)
        if _state(posed, labels) > memory:
            low = middle
        else:
            high = middle
            best = min(best, labels, key=posed.problem.cost)
    return best


def _solved(posed: Posed, price: float, weights: list[float]) -> tuple[tuple[int, ...], float]:
    """The cheapest labels with ``price`` seconds a byte of state (times the tensor's weight), and the bound on that."""
    problem = posed.problem
    if price:
        costs = list(problem.costs)
        for i, nbytes in enumerate(posed.state_bytes):
            costs[len(posed.ops) + i] = costs[len(posed.ops) + i] + price * weights[i] * nbytes
        problem = replace(problem, costs=tuple(costs))
    found = solve_series(problem)
    if not found.labels:
        raise InfeasibleError("no ways of the ops fit together; free some of what is fixed")
    return found.labels, found.lower_bound
