"""The planner finds what trying every plan finds, on joint problems of every kind; a wrong planner would be seen."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.planner import agreement
from partita.planners.problem import Feasible, Infeasible, Optimal, Problem
from partita.planners.stages import stages


def test_on_sixty_joint_problems_the_answer_is_the_optimum_or_within_its_gap() -> None:
    found = agreement.compare(60, number=1)
    assert found["optimal"] + found["gap"] + found["infeasible"] >= 60
    assert found["optimal"] > 20 and found["infeasible"] > 5
    assert sum(found[way] for way in agreement.WAYS)  # memory binds


def second_best(problem: Problem, **options: Any) -> Optimal | Feasible | Infeasible:
    found = stages(problem, **options)
    return replace(found, best=found.others[0]) if not isinstance(found, Infeasible) and found.others else found


def blind_to_memory(problem: Problem, **options: Any) -> Optimal | Feasible | Infeasible:
    ample = replace(problem, pools=tuple(replace(p, memory_bytes=1e12) for p in problem.pools))
    return stages(ample, **options)


@pytest.mark.parametrize("wrong", [second_best, blind_to_memory])
def test_a_planner_that_is_wrong_is_caught(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "stages", wrong)
    with pytest.raises(AssertionError):
        agreement.compare(150, number=2, shrink=False)
