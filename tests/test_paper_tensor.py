"""Tensor degrees found from sharding rules: Megatron's division, sequence division, and the best of all divisions."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from partita.capture import capture
from partita.cluster import Cluster, Device
from partita.cost.communication import COLLECTIVES, Channel, Team
from partita.cost.roofline import ALL, Seconds, Shapes, Share, op_seconds
from partita.graph import Graph, Op
from partita.models import GPTSize, LlamaSize
from partita.models.catalog import build
from partita.planners.large.tensor import PARTIAL, WHOLE, Division, Form, change, choices, divide
from partita.planners.large.units import units

DEVICE: Device = Cluster.parse("8xA100").devices[0]
TEAM = Team(4, 1, Channel(240e9, 1e-5), Channel(1.0))


def captured(size: GPTSize | LlamaSize, length: int = 512) -> Graph:
    tokens = torch.zeros(2, length, dtype=torch.int64, device="meta")
    return capture(build(size), (tokens, tokens)).graph


def divided(graph: Graph, ops: range, *, sequence: bool) -> Division:
    shapes = Shapes(graph)

    def seconds(op: Op, share: Share) -> Seconds:
        return op_seconds(shapes, op, 1, DEVICE, share)

    def exchange(kind: str, name: str) -> float:
        return COLLECTIVES[kind](shapes.nbytes(graph.tensor(name), 1), TEAM)

    def form(name: str) -> Form:
        return 1 if sequence and graph.tensor(name).needs_grad else WHOLE

    found = divide(
        shapes, ops, 4, seconds=seconds, exchange=exchange, entering=form, leaving=form, sequence=sequence
    )  # fmt: skip
    assert found is not None
    return found


def layer(graph: Graph) -> range:
    inside = [i for i, op in enumerate(graph.ops) if op.module.split(".")[:2] == ["layers", "1"]]
    return range(inside[0], inside[-1] + 1)


def exchanges(found: Division) -> list[tuple[str, str]]:
    return [(c.forward, c.backward) for c in found.changes if c.forward or c.backward]


@pytest.mark.parametrize("size", [GPTSize(2, 1024, 16, 1000), LlamaSize(2, 1024, 16, 4, 2816, 1000)])
def test_a_transformer_layer_is_divided_as_megatron_does(size: GPTSize | LlamaSize) -> None:
    """Two all_reduces forward and two backward; every product by columns, then by rows (Shoeybi et al., 2019)."""
    graph = captured(size)
    found = divided(graph, layer(graph), sequence=False)
    assert sorted(exchanges(found)) == [("", "all_reduce")] * 2 + [("all_reduce", "")] * 2
    columns = {"qkv": 0, "q": 0, "k": 0, "v": 0, "up": 0, "gate": 0, "proj": 1, "o": 1, "down": 1}
    for name, form in found.parameters:
        part = name.split(".")[-2]
        if part in columns and name.endswith("weight"):
            assert form == columns[part], name


def test_along_the_sequence_all_reduces_fall_into_halves() -> None:
    """Korthikanti et al. (2022), figure 5."""
    graph = captured(GPTSize(2, 1024, 16, 1000))
    found = divided(graph, layer(graph), sequence=True)
    assert sorted(exchanges(found)) == [("all_gather", "reduce_scatter")] * 2 + [("reduce_scatter", "all_gather")] * 2


class Small(nn.Module):
    """Two products with a branch and a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(256, 512), nn.Linear(512, 256), nn.LayerNorm(256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(self.norm(x))))


@pytest.mark.parametrize("sequence", [False, True])
def test_no_labelling_of_a_small_block_is_cheaper(sequence: bool) -> None:
    with torch.device("meta"):
        graph = capture(Small(), (torch.zeros(2, 64, 256),)).graph
    ops = range(len(graph.ops))
    found = divided(graph, ops, sequence=sequence)
    shapes = Shapes(graph)

    def cost(chosen: tuple[int, ...]) -> float:
        form: dict[str, Form] = {}
        paid: set[tuple[str, Form]] = set()
        total = 0.0
        for i, k in zip(ops, chosen, strict=True):
            op = graph.ops[i]
            choice = choices(shapes, op, 4)[k]
            took = op_seconds(shapes, op, 1, DEVICE, Share(choice.label, 4) if choice.label else ALL)
            total += took.forward + took.backward
            for name, needed in choice.inputs:
                tensor = graph.tensor(name)
                if tensor.role == "parameter":
                    continue
                needed = WHOLE if needed == "summed" and not tensor.needs_grad else needed
                made = form.get(name, 1 if sequence and tensor.needs_grad else WHOLE)
                total += exchanged(name, made, needed, paid)
            form.update(choice.outputs)
        for name in graph.outputs:
            total += exchanged(name, form[name], 1 if sequence else WHOLE, paid)
        return total

    def exchanged(name: str, made: Form, needed: Form, paid: set[tuple[str, Form]]) -> float:
        if (name, needed) in paid:
            return 0.0
        if made == PARTIAL and isinstance(needed, int) and not sequence:
            return float("inf")
        paid.add((name, needed))
        turn = change(name, made, needed, gradient=graph.tensor(name).needs_grad)
        size = shapes.nbytes(graph.tensor(name), 1)
        return sum(COLLECTIVES[kind](size, TEAM) for kind in (turn.forward, turn.backward) if kind)

    options = [range(len(choices(shapes, graph.ops[i], 4))) for i in ops]
    assert found.seconds == pytest.approx(min(map(cost, product(*options))), rel=1e-9)


def test_a_degree_divides_the_work_of_the_products() -> None:
    graph = captured(GPTSize(2, 1024, 16, 1000))
    found = divided(graph, layer(graph), sequence=False)
    shapes = Shapes(graph)
    for i, label in zip(layer(graph), found.labels, strict=True):
        op = graph.ops[i]
        if op.flops > 1e8:
            whole = op_seconds(shapes, op, 8, DEVICE)
            part = op_seconds(shapes, op, 8, DEVICE, Share(label, 4))
            assert whole.forward / 4 < part.forward < whole.forward / 2.5, op.name


def test_equal_layers_are_one_kind_of_unit_however_many_there_are() -> None:
    few, many = units(captured(GPTSize(4, 128, 4, 1000), 64)), units(captured(GPTSize(40, 128, 4, 1000), 64))
    assert len(many.row) >= 40
    assert many.num_kinds <= 8 and few.num_kinds <= 8
    assert [u.start for u in many.row[1:]] == [u.stop for u in many.row[:-1]]


def test_a_cut_between_units_sends_the_residual_stream_alone() -> None:
    graph = captured(GPTSize(24, 256, 4, 1000))
    found = units(graph)
    inside = [names for unit, names in zip(found.row, found.sent, strict=True) if unit.name.startswith("layers.")]
    assert inside and all(len(names) == 1 for names in inside)
