"""The automatic plan: valid, within memory, obeying constraints; what fits nowhere comes with remedies that work."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_graphs import cluster, mlp, normed

from partita.assign import assign
from partita.check import check
from partita.errors import InfeasibleError, PlanError, UsageError
from partita.planners.auto import auto
from partita.planners.constraints import Constraints
from partita.sharding.batch import layouts
from partita.units import parse_bytes

GRAPH = mlp(6, deep=True, batch=16)
LAYOUTS = layouts(GRAPH)


def plan(devices=None, graph=GRAPH, **options):
    made = auto(graph, LAYOUTS if graph is GRAPH else layouts(graph), devices or cluster(2), **options)
    assert check(made, graph, devices or cluster(2), memory=dict(made.predicted.memory)) == ()
    return made


def test_two_equal_cpu_devices_take_half_the_batch_each():
    made = plan()
    assert [len(s.devices) for s in made.stages] == [2] and made.batch.microbatches == 2
    assert made.predicted.one_device_seconds / made.predicted.step_seconds > 1.7
    assert any(line.startswith("next best") for line in made.reasons)


def test_a_pipeline_is_balanced_and_says_why_it_is_cut_there():
    made = plan(constraints={"replicas": False, "microbatches": 8})
    assert [len(s.devices) for s in made.stages] == [1, 1]
    counts = [list(assign(made, GRAPH).values()).count(s) for s in (0, 1)]
    assert counts == [6, 6]
    cut = next(line for line in made.reasons if line.startswith("cut before blocks.3"))
    assert "earlier" in cut and "later" in cut and "%" in cut


def test_unequal_devices_get_samples_by_their_speed():
    made = plan(cluster(2, speeds=(3.0, 1.0)))
    assert made.batch.sizes and sum(made.batch.sizes) == 16
    assert made.batch.sizes[0] > 2 * made.batch.sizes[1]


def test_memory_below_the_parameters_makes_a_pipeline():
    wide = mlp(8, width=256, deep=True, batch=16)
    whole = 4 * 8 * 256 * 256 * 4
    made = plan(cluster(2, memory=int(whole * 0.7)), wide)
    assert [len(s.devices) for s in made.stages] == [1, 1]
    assert all(need <= whole * 0.7 for _, need in made.predicted.memory)


@pytest.mark.parametrize(("width", "batch"), [(64, 16), (64, 256), (256, 64), (256, 256), (256, 1024)])
def test_a_limit_at_what_the_plan_of_ample_memory_holds_changes_nothing(width, batch):
    graph = mlp(8, width=width, deep=True, batch=batch)
    ample = plan(graph=graph, optimizer="none")
    need = max(held for _, held in ample.predicted.memory)
    tight = plan(cluster(2, memory=int(need / 0.99) + 1), graph, optimizer="none")
    assert tight.predicted.step_seconds == pytest.approx(ample.predicted.step_seconds, rel=1e-6)


def test_recomputation_is_used_where_only_it_fits():
    wide = mlp(8, width=64, deep=True, batch=4096, act="gelu")
    limit = int((8 * 2 + 4 - 3) * 64 * 4 * 4096 * 1.0)
    made = plan(cluster(1, memory=limit), wide, constraints={"microbatches": 1})
    assert made.stages[0].recompute
    assert any("recomputed" in line for line in made.reasons)
    assert dict(made.predicted.memory)["cpu:0"] <= limit


def test_inference_counts_no_gradients():
    train, infer = plan(), plan(objective="inference")
    assert max(m for _, m in infer.predicted.memory) < max(m for _, m in train.predicted.memory)
    assert infer.predicted.step_seconds < train.predicted.step_seconds


def test_constraints_are_obeyed():
    made = plan(constraints={"split_before": ["blocks.1"], "replicas": False, "microbatches": 4})
    stage = assign(made, GRAPH)
    assert stage["blocks.0.act:relu"] + 1 == stage["blocks.1.fc:linear"]
    made = plan(constraints={"place": {"blocks.0*": "cpu:1"}})
    assert made.stages[assign(made, GRAPH)["blocks.0.fc:linear"]].devices == ("cpu:1",)
    made = plan(constraints={"keep_together": [["blocks.2", "blocks.3"]], "replicas": False})
    stage = assign(made, GRAPH)
    assert stage["blocks.2.fc:linear"] == stage["blocks.3.act:relu"]
    made = plan(constraints={"recompute": ["blocks.2"]})
    assert any("blocks.2" in s.recompute for s in made.stages)
    made = plan(constraints=Constraints(max_stages=1, microbatches=4, schedule="gpipe"))
    assert (len(made.stages), made.batch.microbatches, made.schedule) == (1, 4, "gpipe")


@pytest.mark.parametrize(
    ("constraints", "error", "text"),
    [
        ({"split_befor": ["blocks.1"]}, UsageError, "'split_befor' is no constraint; did you mean 'split_before'"),
        ({"schedule": "1f2b"}, UsageError, "1f2b.*1f1b"),
        ({"max_stages": "many"}, UsageError, "cannot be read"),
        ({"split_before": ["blocks.9"]}, PlanError, "'blocks.9' names no module.*did you mean"),
        ({"place": {"blocks.1": "cpu:5"}}, PlanError, "no device 'cpu:5'; there are cpu:0, cpu:1"),
        ({"keep_together": ["blocks"], "split_before": ["blocks.2"]}, PlanError,
         "keep_together 'blocks' and split_before 'blocks.2' contradict"),
        ({"split_before": ["blocks.1"], "max_stages": 1}, PlanError, "max_stages 1.*contradict"),
        ({"split_before": ["blocks.1", "blocks.2"]}, PlanError, "3 stages, but there are 2 devices"),
        ({"place": {"blocks.1": "cpu:0", "blocks.1.fc": "cpu:1"}}, PlanError, "on cpu:0.*on cpu:1.*drop one"),
        ({"split_before": ["blocks.0"]}, PlanError, "beginning of the model"),
    ],
)  # fmt: skip
def test_contradictions_and_wrong_names_are_explained(constraints, error, text):
    with pytest.raises(error, match=f"(?s){text}"):
        plan(constraints=constraints)


@pytest.mark.parametrize("option", [{"optimizer": "adan"}, {"objective": "fastest"}])
def test_unknown_words_are_refused(option):
    with pytest.raises(UsageError, match=next(iter(option.values()))):
        plan(**option)


def test_what_fits_nowhere_names_the_smallest_memory_and_it_works():
    wide = mlp(4, width=256, deep=True, batch=16)
    with pytest.raises(InfeasibleError) as caught:
        plan(cluster(2, memory=300_000), wide)
    text = str(caught.value)
    found = re.search(r"smallest memory that works: (\S+) on cpu:\d \((\S+)x", text)
    assert found, text
    assert parse_bytes(found[1]) > 300_000
    enough = cluster(2, memory=int(300_000 * float(found[2]) * 1.01))
    assert plan(enough, wide).stages


def test_other_remedies_are_planned_too():
    wide = mlp(4, width=256, deep=True, batch=16)
    with pytest.raises(InfeasibleError) as caught:
        plan(cluster(2, memory=1_700_000), wide)
    text = str(caught.value)
    assert "3 such devices instead of 2 work" in text or "4 such devices instead of 2 work" in text
    assert "optimizer 'sgd' instead of 'adamw' fits" in text


def test_a_constraint_that_makes_it_impossible_is_named():
    wide = mlp(8, width=256, deep=True, batch=16)
    whole = 4 * 8 * 256 * 256 * 4
    with pytest.raises(InfeasibleError, match="without the constraint max_stages 1 it works"):
        plan(cluster(2, memory=int(whole * 0.7)), wide, constraints={"max_stages": 1, "tensor": 1})


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 4), st.sampled_from([1, 3, 16]), st.booleans(),
    st.sampled_from([2 * 10**5, 10**6, 10**9]),
)  # fmt: skip
def test_every_plan_passes_check_and_stays_within_memory(layers, devices, batch, unequal, memory):
    graph = mlp(layers, batch=batch, deep=True)
    where = cluster(devices, memory=memory, speeds=tuple(1.0 + i for i in range(devices)) if unequal else ())
    try:
        made = auto(graph, layouts(graph), where)
    except InfeasibleError as error:
        assert "memory" in str(error)
        return
    assert check(made, graph, where, layouts(graph), memory=dict(made.predicted.memory)) == ()


def test_a_model_that_couples_nothing_and_has_no_batch_gets_one_microbatch():
    graph = replace(mlp(4), batch=0)
    assert auto(graph, layouts(graph), cluster(2)).batch.microbatches == 1


def test_replicas_are_not_chosen_blindly_where_batch_statistics_couple_the_samples():
    graph = normed(6, at=0, width=256)
    apart, synced = plan(graph=graph), plan(graph=graph, sync_batch_norm=True)
    assert any("needs the whole batch" in line for line in apart.reasons)
    assert len(synced.stages[0].devices) == synced.batch.microbatches == 2
    assert synced.predicted.step_seconds < 0.7 * apart.predicted.step_seconds


def test_the_part_before_batch_statistics_still_shares_the_work():
    graph = normed(6, at=4, width=256)
    made = plan(graph=graph)
    assert made.batch.microbatches > 1
    assert made.predicted.one_device_seconds / made.predicted.step_seconds > 1.3
