"""Checking breaks one thing at a time and sees it caught, with the remedy; assigning follows the plan's names."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning_graphs import N, cluster, mlp

from partita.assign import assign, covers
from partita.check import check, require
from partita.errors import PlanError
from partita.graph import Graph, Op, Ref, Tensor
from partita.plan import Batch, Plan, Stage

GRAPH = mlp(4)
DEVICES = cluster(2)
FIRST = Stage(("cpu:0",), modules=("fc0", "act0", "fc1", "act1"))
SECOND = Stage(("cpu:1",), modules=("fc2", "act2", "fc3", "act3"))
GOOD = Plan((FIRST, SECOND), "MLP", GRAPH.fingerprint, ("cpu:0", "cpu:1"), Batch(8, 4))


def stages(first: Stage = FIRST, second: Stage = SECOND) -> Plan:
    return replace(GOOD, stages=(first, second))


def test_a_good_plan_has_no_problems():
    assert check(GOOD, GRAPH, DEVICES) == ()
    require(GOOD, GRAPH, DEVICES)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (replace(GOOD, fingerprint="0" * 16), "made for another model.*plan this model anew"),
        (replace(GOOD, schedule="1f2b"), "schedule '1f2b' is not known; did you mean '1f1b'"),
        (replace(GOOD, batch_norm="fast"), "batch_norm 'fast'"),
        (replace(GOOD, batch=Batch(8, 0)), "microbatches is 0; it must be at least 1"),
        (replace(GOOD, batch=Batch(8, 9)), "9 microbatches are more than the batch's 8 samples; take at most 8"),
        (replace(GOOD, batch=Batch(8, 2, (4, 3))), "adds up to 7 samples, and the batch has 8"),
        (replace(GOOD, batch=Batch(8, 2, (8, 0))), "a microbatch of 0 samples"),
        (replace(GOOD, batch=Batch(8, 3, (4, 4))), "sizes names 2 microbatches, and microbatches is 3"),
        (replace(GOOD, stages=()), "no stages"),
        (stages(replace(FIRST, devices=())), "stage 0 has no devices"),
        (stages(replace(FIRST, devices=("cpu:7",))), "stage 0 runs on 'cpu:7'.*there are cpu:0, cpu:1"),
        (stages(replace(FIRST, devices=("cpu:0", "cpu:0"))), "lists 'cpu:0' more than once"),
        (stages(replace(FIRST, modules=("fc0", "ac0"))), "module 'ac0'.*did you mean.*'act0'"),
        (stages(replace(FIRST, ops=("fc0:lin",))), "op 'fc0:lin'.*did you mean 'fc0:linear'"),
        (stages(replace(FIRST, modules=("fc0", "fc2"))), "module 'fc2' is listed by stages 0 and 1"),
        (stages(FIRST, replace(SECOND, ops=("fc3:linear",), recompute=("fc9",))), "recomputes 'fc9'"),
        (stages(replace(FIRST, recompute=("fc2",))), "'fc2' under recompute, but stage 1 runs it"),
        (stages(replace(FIRST, modules=("fc2", "act2")), replace(SECOND, modules=("fc0", "act0", "fc1", "act1"))),
         r"stage 0 runs fc2:linear \(net.py:3.*needs 'r1' of act1:relu in the later stage 1"),
        (replace(GOOD, stages=(Stage(("cpu:0",), modules=("",)), Stage(("cpu:1",)))), "stage 1 has nothing to run"),
    ],
)  # fmt: skip
def test_each_mistake_is_found_with_its_remedy(plan, text):
    with pytest.raises(PlanError, match=f"(?s){text}"):
        require(plan, GRAPH, DEVICES)


def test_all_mistakes_are_found_at_once():
    plan = replace(stages(replace(FIRST, devices=("cpu:9",), modules=("nope",))), schedule="x", batch=Batch(8, -1))
    assert len(check(plan, GRAPH, DEVICES)) >= 4


def test_more_replicas_than_microbatches_are_refused():
    plan = replace(GOOD, stages=(Stage(("cpu:0", "cpu:1"), modules=("",)),), batch=Batch(8, 1))
    assert "set microbatches to 2 or more" in check(plan, GRAPH, DEVICES)[0]


def test_a_model_without_a_batch_dim_takes_one_microbatch():
    assert any("no batch dim" in p for p in check(GOOD, replace(GRAPH, batch=0), DEVICES))


def test_memory_above_the_limit_is_said_with_both_numbers():
    found = check(GOOD, GRAPH, cluster(2, memory=1000), memory={"cpu:0": 5000})
    assert found == tuple(p for p in found if "cpu:0 would need 4.88KiB and may use 1000B" in p) and found


def test_a_cut_through_an_in_place_op_is_found():
    op = GRAPH.ops[4]
    changed = replace(op, target="aten.relu_.default", args=(Ref("r1"),), writes=("r1",))
    graph = replace(GRAPH, ops=(*GRAPH.ops[:4], changed, *GRAPH.ops[5:]))
    assert any("changes 'r1' in place" in p and "keep both in one stage" in p for p in check(GOOD, graph, DEVICES))


def test_a_buffer_changed_in_two_stages_is_found():
    buffer = Tensor("n", (), "int64", "buffer", "count", "n")
    bump = Op("bump", "aten.add_.Tensor", (Ref("n"), 1), (), (), "fc0", writes=("n",), grad=False)
    graph = replace(
        GRAPH, tensors=(*GRAPH.tensors, buffer), ops=(bump, *GRAPH.ops, replace(bump, name="bump_1", module="fc3"))
    )
    assert any("'count' in place" in p for p in check(GOOD, graph, DEVICES))


def test_a_module_without_ops_is_told_apart_from_a_wrong_name():
    unused = Tensor("u", (1,), "float32", "parameter", "unused.weight", "u", True)
    graph = replace(GRAPH, tensors=(*GRAPH.tensors, unused))
    plan = stages(replace(FIRST, modules=(*FIRST.modules, "unused")))
    assert "runs no op of its own" in check(plan, graph, DEVICES)[0]


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        ("blocks.0", "blocks.0", True), ("blocks.0", "blocks.0.attn", True), ("blocks.0", "blocks.0@1", True),
        ("blocks.0", "blocks.0@1.attn", True), ("blocks.0@1", "blocks.0", False), ("blocks.0@1", "blocks.0@1", True),
        ("blocks.0@1", "blocks.0@2", False), ("blocks.1", "blocks.10", False), ("blocks", "blocks.10", True),
        ("blocks.0@0", "blocks.0", True), ("blocks.0@0", "blocks.0@1", False),
        ("blocks.0.attn", "blocks.0", False), ("", "anything", True),
    ],
)  # fmt: skip
def test_a_name_covers_its_parts_and_calls_component_by_component(name, call, expected):
    assert covers(name, call) is expected


def named(*modules: str) -> Graph:
    """A chain of ops, one in each module call."""
    tensors = [Tensor("x", (N,), "float32", "input", "args[0]", "x")]
    ops = []
    for i, module in enumerate(modules):
        tensors.append(Tensor(f"t{i}", (N,), "float32", "op", "", f"t{i}"))
        ops.append(Op(f"op{i}", "aten.relu.default", (Ref(f"t{i - 1}" if i else "x"),), (), (f"t{i}",), module))
    return Graph("chain", "", 4, tuple(tensors), tuple(ops), (f"t{len(ops) - 1}",))


def test_the_longest_name_wins_and_ops_win_over_modules():
    graph = named("blocks.0.attn", "blocks.0.mlp", "blocks.0@1.attn", "blocks.0@1.mlp")
    plan = Plan((Stage(("a",), ("blocks",)), Stage(("b",), ("blocks.0@1",)), Stage(("c",), ops=("op3",))))
    assert list(assign(plan, graph).values()) == [0, 0, 1, 2]


def test_what_is_not_listed_runs_with_its_latest_producer():
    graph = named("a", "", "b", "")
    plan = Plan((Stage(("x",), ("a",)), Stage(("y",), ("b",))))
    assert list(assign(plan, graph).values()) == [0, 0, 1, 1]


def test_what_has_no_producer_runs_with_its_earliest_consumer():
    graph = named("a", "b", "c")
    made = Op("mask", "aten.ones.default", ((4,),), (), ("m",), "", grad=False)
    view = Op("view", "aten.view.default", (Ref("m"),), (), ("v",), "", grad=False)
    tensors = (*graph.tensors, *(Tensor(n, (4,), "float32", "op", "", n) for n in "mv"))
    user = replace(graph.ops[1], args=(Ref("t0"), Ref("v")))
    late = replace(graph.ops[2], args=(Ref("t1"), Ref("v")))
    graph = Graph("g", "", 4, tensors, (made, view, graph.ops[0], user, late), ("t2",))
    plan = Plan((Stage(("x",), ("a",)), Stage(("y",), ("b",)), Stage(("z",), ("c",))))
    found = assign(plan, graph)
    assert (found["mask"], found["view"]) == (1, 1)


def test_an_unlisted_write_stays_with_what_it_writes():
    graph = named("a", "b")
    bump = Op("bump", "aten.add_.Tensor", (Ref("n"), 1), (), (), "", writes=("n",), grad=False)
    read = replace(graph.ops[1], args=(Ref("t0"), Ref("n")))
    graph = replace(
        graph, tensors=(*graph.tensors, Tensor("n", (), "int64", "buffer", "n", "n")), ops=(graph.ops[0], bump, read)
    )
    assert assign(Plan((Stage(("x",), ("a",)), Stage(("y",), ("b",)))), graph)["bump"] == 1
