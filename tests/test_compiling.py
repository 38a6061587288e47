"""What a plan compiles: nothing unasked, what was asked for, or what was measured to pay; what is predicted of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from dividing import cluster
from test_compiled import ALL, WIDTH, deep

from partita import compiling
from partita.capture import capture
from partita.check import check
from partita.cluster import Cluster
from partita.compiling import as_asked, where_it_pays
from partita.cost.affine import Affine
from partita.cost.blocks import Block, profile_units
from partita.cost.compiled import COMPILED
from partita.cost.measured import Measured, Timing
from partita.errors import PlanError, UsageError
from partita.graph import Graph
from partita.manual import plan_from_cuts
from partita.plan import Plan, Predicted
from partita.planners.auto import auto
from partita.planners.constraints import Constraints
from partita.predict import predict
from partita.runtime import compiled
from partita.sharding.batch import layouts

GRAPH: Graph = capture(deep(), (torch.randn(8, 3, WIDTH),), {}).graph
WHERE = cluster(2)
SLOW = {(u.signature, "cpu"): Timing(Affine(0.0, 1e-3), Affine(0.0, 2e-3)) for u in profile_units(GRAPH)}


def planned(*cuts: str) -> Plan:
    plan = plan_from_cuts(GRAPH, cuts, ["cpu:0", "cpu:1"], microbatches=1 + len(cuts))
    trace = predict(GRAPH, plan, WHERE, measured=Measured(SLOW))
    return replace(plan, predicted=Predicted(trace.step_seconds, "cpu:0", trace.memory, 1.0))


def timer(share: Callable[[Block], float]) -> Callable[..., Measured]:
    """Compiled, a unit takes this share of what it takes as it is."""

    def timings(over: Cluster, sizes: Sequence[int], units: Sequence[Block] = (), compiled: bool = False) -> Measured:
        assert sizes in ((4,), (8,)) and {op for u in units for op in u.ops} == set(range(len(GRAPH.ops)))
        return Measured({
            (u.signature, "cpu"): Timing(Affine(0.0, 3e-3 * (share(u) if compiled else 1.0)), saved=Affine(0.0, 1e3))
            for u in units
        })  # fmt: skip

    return timings


def test_what_pays_is_compiled_and_predicted_as_measured() -> None:
    before = planned("2")
    plan, timed = where_it_pays(GRAPH, before, WHERE, Measured(SLOW), timer(lambda u: 0.5), "adamw")
    assert [s.compile for s in plan.stages] == [ALL, ALL]
    assert plan.predicted is not None and before.predicted is not None and timed is not None
    assert plan.predicted.step_seconds < before.predicted.step_seconds
    assert predict(GRAPH, plan, WHERE, measured=timed).step_seconds == pytest.approx(plan.predicted.step_seconds)
    assert any("compiled by torch.compile" in reason for reason in plan.reasons)


def test_of_unequal_parts_those_that_pay_are_named_and_where_none_does_the_plan_stays() -> None:
    first = GRAPH.ops[0].name

    def only_first(unit: Block) -> float:
        return 0.2 if GRAPH.ops[unit.start].name == first and unit.signature.startswith(COMPILED) else 1.1

    before = planned()
    plan, _ = where_it_pays(GRAPH, before, WHERE, Measured(SLOW), timer(only_first), "adamw")
    assert plan.stages[0].compile == ("0",) and check(plan, GRAPH, WHERE) == ()
    same, timed = where_it_pays(GRAPH, before, WHERE, Measured(SLOW), timer(lambda u: 0.99), "adamw")
    assert same.stages == before.stages and timed == Measured(SLOW)
    assert "nothing is compiled" in same.reasons[-1]
    unmeasured, _ = where_it_pays(GRAPH, before, WHERE, None, timer(lambda u: 0.5), "adamw")
    assert unmeasured.stages == before.stages


def test_names_are_compiled_as_asked_and_nothing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(not s.compile for s in auto(GRAPH, layouts(GRAPH), WHERE).stages)
    plan = as_asked(GRAPH, planned("2"), WHERE, ("1", "3.up", "3.norm"), None, "adamw")
    assert [s.compile for s in plan.stages] == [("1",), ("3.norm", "3.up")]
    assert [s.compile for s in as_asked(GRAPH, planned("2"), WHERE, ALL, None, "adamw").stages] == [ALL, ALL]
    with pytest.raises(PlanError, match="'nowhere' is no module or op"):
        as_asked(GRAPH, planned(), WHERE, ("nowhere",), None, "adamw")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(PlanError, match=r"there is no .* here: install one, name one in the environment variable CXX"):
        as_asked(GRAPH, planned(), WHERE, ALL, None, "adamw")
    assert compiling.unmet(planned()) == ()


def test_the_constraint_is_read_as_it_is_written() -> None:
    assert Constraints.read({"compile": True}).compile == ALL
    assert Constraints.read({"compile": False}).compile == ()
    assert Constraints.parse(["compile=auto"]).compile == "auto"
    assert Constraints.parse(["compile=[blocks.*, head]"]).compile == ("blocks.*", "head")
    with pytest.raises(UsageError, match="did you mean 'compile'"):
        Constraints.read({"compiled": True})
