"""Costs: closed forms for ops, blocks, memory and pipelines; measured numbers override and survive a round trip."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_graphs import cluster, mlp

from partita.cost.affine import Affine, through, total
from partita.cost.blocks import blocks, legal_cuts
from partita.cost.measured import Measured, Timing
from partita.cost.memory import in_flight, optimizer_factor, static_bytes
from partita.cost.ops import op_cost
from partita.cost.pipeline import StageTime, interleaved_seconds, step_seconds
from partita.cost.table import cost_table, parameters_of, segment_cost
from partita.errors import UsageError
from partita.graph import Op, Ref, Tensor
from partita.schedules import makespan, max_in_flight, schedule

numbers = st.floats(0, 1e6, allow_nan=False)


@given(numbers, numbers, st.integers(1, 50), st.integers(1, 50))
def test_a_line_goes_through_its_points(fixed, slope, a, b):
    line = through(a, fixed + slope * a, b, fixed + slope * b)
    assert line.at(a) == pytest.approx(fixed + slope * a, rel=1e-6, abs=1e-3)
    assert total([line, line]).at(a) == pytest.approx(2 * line.at(a))


def test_a_large_matrix_product_takes_flops_over_rate_and_its_backward_twice_that():
    graph = mlp(1, width=512, batch=64)
    cost = op_cost(graph, graph.ops[0], cluster().devices[0])
    flops = 2 * 64 * 512 * 512
    assert cost.forward.at(64) == pytest.approx(flops / 1e9, rel=1e-3)
    adding = 3 * 512 * 512 * 4 / 1e10
    assert cost.weight.at(64) == pytest.approx(flops / 1e9 + adding, rel=1e-3)


def test_equal_layers_have_equal_signatures_and_other_layers_others():
    graph = mlp(4, deep=True)
    parts = blocks(graph, exact=0, limit=4)
    assert [p.name for p in parts] == [f"blocks.{i}" for i in range(4)]
    assert len({p.signature for p in parts[1:]}) == 1
    wider = blocks(mlp(4, width=65, deep=True), exact=0, limit=4)
    assert {p.signature for p in parts}.isdisjoint(p.signature for p in wider)


@given(st.integers(1, 30), st.integers(2, 40), st.booleans())
def test_blocks_cover_every_op_once_in_order(layers, limit, chunks):
    graph = mlp(layers, deep=True)
    parts = blocks(graph, exact=0, limit=limit, chunks=chunks)
    assert [i for p in parts for i in p.ops] == list(range(len(graph.ops)))
    assert len(parts) <= max(limit, 2)


def test_no_cut_separates_an_in_place_op_from_what_it_changes():
    graph = mlp(3)
    op = graph.ops[3]
    changed = replace(op, target="aten.relu_.default", writes=("h0",), args=(Ref("h0"),))
    graph = replace(graph, ops=(*graph.ops[:3], changed, *graph.ops[4:]))
    legal = legal_cuts(graph)
    assert [i for i, ok in enumerate(legal) if not ok] == [0, 1, 2, 3]


def test_all_ops_that_touch_a_mutated_buffer_stay_together():
    graph = mlp(3)
    buffer = Tensor("count", (), "int64", "buffer", "count", "count")
    bump = Op("bump", "aten.add_.Tensor", (Ref("count"), 1), (), (), "fc1", writes=("count",), grad=False)
    ops = (*graph.ops[:1], replace(bump, name="first"), *graph.ops[1:4], bump, *graph.ops[4:])
    graph = replace(graph, tensors=(*graph.tensors, buffer), ops=ops)
    assert [i for i, ok in enumerate(legal_cuts(graph)) if not ok] == [0, 2, 3, 4, 5]


def test_measured_blocks_override_the_model_and_their_ops_share_the_time():
    graph = mlp(2, deep=True)
    units = blocks(graph, exact=0, limit=2)
    timing = Timing(Affine(1.0, 2.0), Affine(3.0, 0.0), Affine(0.0, 5.0), Affine(100.0, 10.0))
    measured = Measured({(units[1].signature, "cpu"): timing})
    table = cost_table(graph, cluster(), measured=measured, units=units)
    cost = segment_cost(table, "cpu", list(units[1].ops))
    assert cost.forward.at(4) == pytest.approx(9.0)
    assert cost.backward.at(4) == pytest.approx(3.0)
    assert cost.weight.at(4) == pytest.approx(20.0)
    half = segment_cost(table, "cpu", [units[1].start])
    assert 0 < half.forward.at(4) < 9.0


@given(st.dictionaries(st.tuples(st.text(max_size=4), st.text(max_size=4)), st.tuples(numbers, numbers), max_size=4))
def test_measured_survives_json(entries):
    measured = Measured({k: Timing(Affine(*v), saved=Affine(*v)) for k, v in entries.items()})
    assert Measured.from_json(measured.to_json()) == measured


@pytest.mark.parametrize("text", ["", "{}", '{"partita_measured": 99}', '{"partita_measured": 1, "timings": [{}]}'])
def test_a_damaged_table_is_refused(text):
    with pytest.raises(UsageError, match="measure"):
        Measured.from_json(text)


def test_recomputation_halves_what_is_kept_and_pays_forward_again():
    graph = mlp(4)
    table = cost_table(graph, cluster())
    plain, again = (segment_cost(table, "cpu", range(8), r) for r in ((), ((0, 8),)))
    assert again.saved.at(8) == pytest.approx(8 * 64 * 4)
    assert again.saved.at(8) < plain.saved.at(8)
    assert again.backward.at(8) == pytest.approx(plain.backward.at(8) + plain.forward.at(8))


def test_tied_parameters_count_once():
    graph = mlp(2)
    tied = replace(graph.ops[2], args=(Ref("r0"), Ref("w0")))
    graph = replace(graph, ops=(*graph.ops[:2], tied, graph.ops[3]))
    assert sum(size for _, size, _ in parameters_of(graph, range(4))) == 64 * 64 * 4


@pytest.mark.parametrize(("name", "factor"), [("sgd", 0), ("momentum", 1), ("AdamW", 2), ("none", 0)])
def test_optimizer_state_is_a_multiple_of_what_is_trained(name, factor):
    assert optimizer_factor(name) == factor
    assert static_bytes(100, 80, optimizer=name) == 100 + 80 + factor * 80
    assert static_bytes(100, 80, optimizer=name, owner=False) == 80
    assert static_bytes(100, 80, optimizer=name, train=False) == 100


def test_an_unknown_optimizer_is_refused_with_those_known():
    with pytest.raises(UsageError, match="adan.*adamw"):
        optimizer_factor("adan")


@given(st.sampled_from(["gpipe", "1f1b", "zero_bubble"]), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_in_flight_is_never_below_the_schedules_own(name, p, m, joined):
    orders = schedule(name, tuple((str(s),) for s in range(p)), m, joined=joined)
    for s in range(p):
        formula = in_flight(name, microbatches=m, replicas=1, devices_after=p - s, devices=p, joined=joined)
        held = max_in_flight(orders)[str(s), s]
        assert held <= formula
        if name != "zero_bubble":
            assert held == formula


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 6), st.integers(1, 12))
def test_the_closed_form_is_the_makespan_of_equal_stages(name, p, m):
    stage = StageTime(1.0, 1.0, 1.0, m)
    made = makespan(schedule(name, tuple((str(s),) for s in range(p)), m), p)
    assert step_seconds(name, [stage] * p) == pytest.approx(made)


@given(st.integers(1, 6), st.integers(0, 8))
def test_the_zero_bubble_form_is_the_makespan_with_enough_microbatches(p, more):
    m = 2 * p - 1 + more
    made = makespan(schedule("zero_bubble", tuple((str(s),) for s in range(p)), m), p)
    assert step_seconds("zero_bubble", [StageTime(1.0, 1.0, 1.0, m)] * p) == pytest.approx(made)


@given(st.integers(2, 4), st.integers(2, 3), st.integers(1, 4))
def test_the_interleaved_form_is_the_makespan_of_the_textbook_deal(p, v, turns):
    m = p * turns
    placement = tuple((str(s % p),) for s in range(p * v))
    made = makespan(schedule("interleaved", placement, m), p * v)
    assert interleaved_seconds([[3.0] * v] * p, m) == pytest.approx(made)
