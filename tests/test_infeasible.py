"""What cannot be met says why and offers what can: every remedy, applied, is planned and fits; conflicts are small."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_graphs import cluster, mlp, normed

from partita.check import check
from partita.cluster import Cluster
from partita.errors import InfeasibleError, PlanError, Remedy, UsageError
from partita.graph import Graph
from partita.plan import Plan
from partita.planners.auto import auto
from partita.planners.conflicts import Atom, atoms, joined, largest_agreement, smallest_conflict
from partita.planners.constraints import Constraints
from partita.sharding.batch import layouts

DEEP = mlp(8, width=128, deep=True, batch=16)
WEIGHTS = 8 * 128 * 128 * 4
ROOMY = cluster(2)


def request(graph: Graph, where: Cluster, **options: Any) -> Plan:
    made = auto(graph, layouts(graph), where, **options)
    assert made.predicted is not None
    assert check(made, graph, where, memory=dict(made.predicted.memory)) == ()
    return made


def small(part: float, count: int = 2) -> Cluster:
    """Devices with this part of what parameters, gradients and AdamW's state take."""
    return cluster(count, memory=int(4 * WEIGHTS * part))


# What is asked, and what the answer must say.
CASES: dict[str, tuple[Graph, Cluster, dict[str, Any], str]] = {
    "half the parameters": (DEEP, small(0.1), {}, "alone take 2MiB.*devices may hold"),
    "one device of too little": (DEEP, small(0.5, 1), {}, "smallest memory that works"),
    "optimizer state": (DEEP, small(0.4), {}, "'sgd' instead of 'adamw'"),
    "three devices are one too few": (DEEP, small(0.3, 3), {}, "such devices instead of 3"),
    "the batch": (mlp(2, width=64, deep=True, batch=4096), cluster(1, memory=3_000_000),
                  {"constraints": {"microbatches": 1}}, "batch of|microbatches"),
    "batch statistics hold the whole batch": (normed(4, batch=256), cluster(1, memory=400_000), {}, "batch of"),
    "inference": (DEEP, cluster(2, memory=WEIGHTS // 4), {"objective": "inference"}, "parameters"),
    "one stage does not fit": (DEEP, small(0.7), {"constraints": {"max_stages": 1, "tensor": 1}},
                                "max_stages 2 instead of 1.*tensor 2 instead of 1"),
    "two replicas do not fit": (DEEP, small(0.7), {"constraints": {"replicas": 2}}, "replicas 1 instead of 2"),
    "kept together and too large": (DEEP, small(0.7), {"constraints": {"keep_together": ["blocks"], "tensor": 1}},
                                    "without the constraint keep_together 'blocks'"),
    "placed on one device and too large": (DEEP, small(0.7), {"constraints": {"place": {"blocks": "cpu:1"}}},
                                           "without the constraint place 'blocks' on cpu:1"),
    "split points and max_stages": (DEEP, ROOMY, {"constraints": {"split_before": ["blocks.3"], "max_stages": 1}},
                                    "smallest conflicting set: split_before 'blocks.3', max_stages 1"),
    "more split points than devices": (DEEP, ROOMY, {"constraints": {"split_before": ["blocks.2", "blocks.5"]}},
                                       "3 stages, but there are 2 devices"),
    "a split inside what is kept together": (
        DEEP, ROOMY, {"constraints": {"keep_together": [["blocks.1", "blocks.4"]], "split_before": ["blocks.3"]}},
        "keep_together 'blocks.1' \\+ 'blocks.4'"),
    "one op on two devices": (DEEP, ROOMY, {"constraints": {"place": {"blocks.1": "cpu:0", "blocks.1.fc": "cpu:1"}}},
                              "on cpu:0 .*on cpu:1"),
    "places that alternate": (
        DEEP, ROOMY, {"constraints": {"place": {"blocks.1": "cpu:0", "blocks.2": "cpu:1", "blocks.3": "cpu:0"}}},
        "these cannot be met together: place 'blocks.1' on cpu:0, place 'blocks.2' on cpu:1, place 'blocks.3' on"),
    "an unknown device": (DEEP, ROOMY, {"constraints": {"place": {"blocks.1": "cpu:5"}}}, "no device 'cpu:5'"),
    "more stages than devices": (DEEP, ROOMY, {"constraints": {"stages": 3}}, "stages 2 instead of 3"),
    "stages times replicas": (DEEP, ROOMY, {"constraints": {"stages": 2, "replicas": 2}}, "need 4 devices"),
    "more microbatches than samples": (DEEP, ROOMY, {"constraints": {"microbatches": 64}}, "microbatches 16 instead"),
    "more replicas than microbatches": (DEEP, ROOMY, {"constraints": {"microbatches": 1, "replicas": 2}},
                                        "replicas 1 instead of 2|microbatches 2 instead of 1"),
    "nothing before the first module": (DEEP, ROOMY, {"constraints": {"split_before": ["blocks.0"]}},
                                        "beginning of the model"),
    "a name that is not there": (DEEP, ROOMY, {"constraints": {"recompute": ["blocks.88"]}}, "did you mean blocks.7"),
    "two contradictions at once": (
        DEEP, ROOMY,
        {"constraints": {"split_before": ["blocks.3", "blocks.0"], "max_stages": 1, "keep_together": ["blocks"]}},
        "without "),
}  # fmt: skip


def refused(graph: Graph, where: Cluster, options: dict[str, Any]) -> tuple[str, tuple[Remedy, ...]]:
    with pytest.raises((InfeasibleError, PlanError)) as caught:
        auto(graph, layouts(graph), where, **options)
    error = caught.value
    assert isinstance(error, InfeasibleError | PlanError)
    return str(error), error.remedies


@pytest.mark.parametrize("name", CASES)
def test_every_remedy_works_when_it_is_applied(name: str) -> None:
    graph, where, options, words = CASES[name]
    text, remedies = refused(graph, where, options)
    assert re.search(words, text, re.DOTALL), text
    assert remedies, text
    for remedy in remedies:
        assert re.search(r"\d", remedy.text) and remedy.text in text
        changed = {"cluster": where, **options, **remedy.change}
        made = request(graph, changed.pop("cluster"), **changed)
        limits = {d.name: d.memory_bytes for d in remedy.change.get("cluster", where).devices}
        assert made.predicted is not None
        assert all(need <= limits[device] for device, need in made.predicted.memory)


def test_there_are_at_least_twenty_cases() -> None:
    assert len(CASES) >= 20


def test_the_memory_named_is_needed() -> None:
    text, remedies = refused(*CASES["half the parameters"][:3])
    memory = next(r.change["cluster"] for r in remedies if r.text.startswith("smallest memory"))
    less = replace(memory, devices=tuple(replace(d, memory_bytes=int(0.9 * d.memory_bytes)) for d in memory.devices))
    with pytest.raises(InfeasibleError):
        request(DEEP, less)


ATOMS = (
    Atom("max_stages", 1), Atom("stages", 2), Atom("replicas", 2), Atom("microbatches", 1),
    Atom("split_before", "blocks.1"), Atom("split_before", "blocks.2"), Atom("keep_together", ("blocks.0", "blocks.2")),
    Atom("place", ("blocks.0", "cpu:0")), Atom("place", ("blocks.1", "cpu:1")), Atom("place", ("blocks.2", "cpu:0")),
    Atom("recompute", "blocks.1"),
)  # fmt: skip
TINY = mlp(3, width=16, deep=True, batch=4)


def works(constraints: Constraints) -> bool:
    try:
        request(TINY, ROOMY, constraints=constraints)
    except (InfeasibleError, PlanError):
        return False
    return True


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(ATOMS), min_size=2, max_size=4, unique=True))
def test_the_conflicting_set_is_a_smallest_one_of_all_subsets(parts: list[Atom]) -> None:
    known: dict[Constraints, bool] = {}

    def asked(constraints: Constraints) -> bool:
        if constraints not in known:
            known[constraints] = works(constraints)
        return known[constraints]

    found = smallest_conflict(parts, asked) if not asked(joined(parts)) else ()
    failing = [
        set(some) for size in range(len(parts) + 1) for some in combinations(parts, size) if not asked(joined(some))
    ]
    minimal = [some for some in failing if not any(other < some for other in failing)]
    assert (set(found) in minimal) if failing else not found
    kept = largest_agreement(parts, asked)
    assert asked(joined(kept)) and not any(asked(joined([*kept, a])) for a in parts if a not in kept)


def test_constraints_fall_into_parts_and_come_together_again() -> None:
    whole = Constraints(
        keep_together=(("a", "b"), ("c",)), split_before=("d", "e"), place=(("f", "cpu:0"),), recompute=("g",),
        max_stages=3, stages=2, microbatches=4, schedule="gpipe", replicas=1,
    )  # fmt: skip
    assert joined(atoms(whole)) == whole and len(atoms(whole)) == 11
    assert atoms(Constraints()) == () and atoms(Constraints(replicas=False)) == (Atom("replicas", False),)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"max_stages": -1}, "max_stages cannot be read"),
        ({"stages": 1.5}, "stages cannot be read"),
        ({"microbatches": True}, "microbatches cannot be read"),
        ({"place": ["blocks.0"]}, "place cannot be read"),
        ({"split_before": {"a": "b"}}, "split_before cannot be read"),
        (["max_stages"], "must be a mapping"),
    ],
)
def test_constraints_of_the_wrong_kind_are_named(written: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        request(TINY, ROOMY, constraints=written)


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)])
def test_fixed_degrees_are_those_of_the_plan(stages: int, replicas: int) -> None:
    made = request(DEEP, cluster(4), constraints={"stages": stages, "replicas": replicas})
    assert [len(s.devices) for s in made.stages] == [replicas] * stages


def test_constraints_are_read_from_words_and_from_a_file(tmp_path: Path) -> None:
    words = ["max_stages=2", "place={blocks.0: cpu:1}", "split_before=a", "split_before=[b, c]", "replicas=false"]
    read = Constraints.parse(words)
    assert read == Constraints(
        max_stages=2, place=(("blocks.0", "cpu:1"),), split_before=("a", "b", "c"), replicas=False
    )
    file = tmp_path / "limits.yaml"
    file.write_text("place: {blocks.1: cpu:0}\nsplit_before: z\nmax_stages: 3\n")
    both = Constraints.parse(words, str(file))
    assert both.place == (("blocks.1", "cpu:0"), ("blocks.0", "cpu:1")) and both.max_stages == 2
    assert both.split_before == ("z", "a", "b", "c")
    for wrong, said in ((["max_stages"], "no value"), (["max_stage=2"], "did you mean"), (["place={"], "no YAML")):
        with pytest.raises(UsageError, match=said):
            Constraints.parse(wrong)
    with pytest.raises(UsageError, match="cannot be read"):
        Constraints.parse([], str(tmp_path / "none.yaml"))
