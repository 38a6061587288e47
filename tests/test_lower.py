"""Lowering: every run stands once, every message has one sender and one receiver, skips go straight to their users."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from dividing import SCHEDULES, cases
from torch import nn

from partita.capture import capture
from partita.graph import Graph
from partita.lower import lower
from partita.manual import plan_from_cuts
from partita.program import Program
from partita.sharding.batch import layouts


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(torch.tanh(self.a(x)))
        return self.c(torch.tanh(self.b(h))) * h


class Coupled(nn.Module):
    """The batch's softmax couples all samples, after most of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.b(torch.tanh(self.a(x))), 0)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(Skips(), (torch.randn(8, 6),)).graph


def program(
    graph: Graph, stages: int, microbatches: int, schedule: str, part: str = "step", train: bool = True
) -> Program:
    devices = [f"cpu:{i}" for i in range(stages)]
    plan = plan_from_cuts(graph, ["b", "c"][: stages - 1], devices, microbatches=microbatches, schedule=schedule)
    return lower(graph, layouts(graph), plan, batch=8, part=part, train=train)


def finishes(found: Program) -> bool:
    """Whether every device reaches its end when receives wait for sends and sends never wait."""
    lists = dict(found.instructions)
    at = dict.fromkeys(lists, 0)
    sent: Counter[tuple[object, ...]] = Counter()
    moved = True
    while moved:
        moved = False
        for device, instructions in lists.items():
            while at[device] < len(instructions):
                step = instructions[at[device]]
                key = (step.tensor, step.microbatch, step.segment if step.grad else -1, step.grad)
                if step.kind == "RECV":
                    if not sent[(step.peer, device, *key)]:
                        break
                    sent[(step.peer, device, *key)] -= 1
                elif step.kind == "SEND":
                    sent[(device, step.peer, *key)] += 1
                at[device] += 1
                moved = True
    return all(at[d] == len(i) for d, i in lists.items()) and not any(sent.values())


def test_every_run_stands_once_and_every_message_is_sent_once_and_received_once(graph: Graph) -> None:
    for case in cases():
        found = program(graph, case.stages, case.microbatches, case.schedule)
        runs = Counter(
            (i.kind, i.segment, i.microbatch) for _, steps in found.instructions for i in steps if i.kind in "FB"
        )
        assert set(runs.values()) == {1}
        for kind in "FB":
            assert sum(n for (k, _, _), n in runs.items() if k == kind) == case.stages * case.microbatches, case
        assert finishes(found), case


def test_a_forward_program_and_the_backward_program_after_it_make_one_step(graph: Graph) -> None:
    for name in SCHEDULES:
        whole = program(graph, 3, 4, name)
        parts = [program(graph, 3, 4, name, part) for part in ("forward", "backward")]
        kinds = lambda p: Counter((i.kind, i.segment, i.microbatch, i.grad) for _, s in p.instructions for i in s)  # noqa: E731
        assert kinds(parts[0]) + kinds(parts[1]) == kinds(whole)
        assert not any(i.kind in "BW" or i.grad for _, s in parts[0].instructions for i in s)
        assert finishes(parts[0]) and finishes(parts[1])


def test_without_training_there_is_no_backward(graph: Graph) -> None:
    found = program(graph, 3, 4, "1f1b", train=False)
    assert {i.kind for _, steps in found.instructions for i in steps} == {"F", "SEND", "RECV"}


def test_a_skip_goes_from_its_maker_to_its_user_and_not_through_the_stage_between(graph: Graph) -> None:
    found = program(graph, 3, 1, "gpipe")
    sends = [(device, i.peer) for device, steps in found.instructions for i in steps if i.kind == "SEND" and not i.grad]
    assert ("cpu:0", "cpu:2") in sends
    assert Counter(sends) == Counter({("cpu:0", "cpu:1"): 1, ("cpu:1", "cpu:2"): 1, ("cpu:0", "cpu:2"): 1})


def test_random_draws_stand_in_the_once_segment_whatever_the_number_of_microbatches(graph: Graph) -> None:
    for microbatches in (1, 4):
        found = program(graph, 2, microbatches, "1f1b")
        assert found.segments[0].phase == "once"
        assert any("noise" in op for op in found.segments[0].ops)


def test_what_couples_the_batch_runs_once_between_all_forwards_and_all_backwards() -> None:
    graph = capture(Coupled(), (torch.randn(8, 64),)).graph
    plan = plan_from_cuts(graph, ["b"], ["cpu:0", "cpu:1"], microbatches=4)
    found = lower(graph, layouts(graph), plan, batch=8)
    whole = [i for i, s in enumerate(found.segments) if s.phase == "whole"]
    assert len(whole) == 1
    last = dict(found.instructions)["cpu:1"]
    order = [(i.kind, i.segment in whole) for i in last if i.kind in "FB"]
    assert order == [("F", False)] * 4 + [("F", True), ("B", True)] + [("B", False)] * 4


def test_sizes_follow_the_batch_none_empty(graph: Graph) -> None:
    plan = plan_from_cuts(graph, ["b"], ["cpu:0", "cpu:1"], microbatches=4)
    for batch, sizes in ((8, (2, 2, 2, 2)), (7, (2, 2, 2, 1)), (3, (1, 1, 1)), (1, (1,))):
        assert lower(graph, layouts(graph), plan, batch=batch).sizes == sizes
