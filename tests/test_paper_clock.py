"""A schedule played with a clock: what holds whatever the layout, and where the closed forms are exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from partita.capture import capture
from partita.cluster_file import describe
from partita.cost.roofline import Assumptions
from partita.graph import Graph
from partita.models import GPTSize
from partita.models.catalog import build
from partita.planners.large.clock import MOST_STEPS, _orders, _play, ranked, stages_of, step_seconds
from partita.planners.large.degrees import Degrees, Group, Layout
from partita.planners.large.exchange import together
from partita.planners.large.pools import pools
from partita.planners.large.search import Limits, Search
from partita.planners.large.units import units
from partita.schedules import makespan


@pytest.fixture(scope="module")
def graph() -> Graph:
    tokens = torch.zeros(2, 512, dtype=torch.int64, device="meta")
    return capture(build(GPTSize(12, 1024, 16, 8192)), (tokens, tokens)).graph


def search(graph: Graph, spec: str, batch: int, assume: Assumptions | None = None, **limits: object) -> Search:
    made = assume or Assumptions()
    return Search(
        graph,
        units(graph),
        pools(describe(spec), made),
        batch=batch,
        assume=made,
        limits=Limits(**limits),  # type: ignore[arg-type]
    )


def best(looking: Search) -> Layout:
    return looking.run().layouts[0]


@pytest.mark.parametrize(("order", "chunks"), [("1f1b", 1), ("gpipe", 1), ("zero_bubble", 1), ("1f1b", 2)])
def test_equal_stages_and_free_messages_take_the_schedules_makespan(graph: Graph, order: str, chunks: int) -> None:
    degrees = Degrees((Group(0, 4, 1, 1),), 1, chunks, order=order)
    looking = search(graph, "4xA100", 8)
    stages = [replace(s, forward=1.0, backward=2.0, late=1.0, message=0.0) for s in _stages(looking, 4, chunks)]
    orders = _orders(degrees, 8, True)
    assert _play(orders, stages, [0.0] * 4, 0.0, degrees) == makespan(orders, 4 * chunks)


def _stages(looking: Search, stages: int, chunks: int):  # type: ignore[no-untyped-def]
    layout = best(search(looking.graph, f"{stages}xA100", 8, stages=stages, replicas=1, samples=1, chunks=chunks))
    return stages_of(looking, layout)


@pytest.mark.parametrize("limits", [{"order": "1f1b"}, {"chunks": 2}, {"order": "zero_bubble"}])
def test_stages_add_up_to_the_layout_and_no_step_is_shorter_than_its_busiest_device(
    graph: Graph, limits: dict[str, object]
) -> None:
    looking = search(graph, "4xA100", 32, stages=4, replicas=1, samples=1, **limits)
    layout = best(looking)
    stages = stages_of(looking, layout)
    for rank, mine in enumerate(layout.stages):
        assert sum(s.forward for s in stages[rank::4]) == pytest.approx(mine.forward)
        assert sum(s.backward for s in stages[rank::4]) == pytest.approx(mine.backward)
    seconds = step_seconds(looking, layout)
    assert seconds >= 32 * max(s.forward + s.backward for s in layout.stages)
    assert seconds == pytest.approx(layout.closed, rel=0.08)


def test_messages_that_pass_beside_compute_cost_less(graph: Graph) -> None:
    spec = "4x1xA100@ETHERNET-10G"
    seconds = []
    for hidden in (0.0, 0.5, 1.0):
        looking = search(graph, spec, 32, Assumptions(messages_hidden=hidden), stages=4, samples=1, order="1f1b")
        seconds.append(step_seconds(looking, best(looking)))
    assert seconds == sorted(seconds, reverse=True) and seconds[2] < 0.9 * seconds[0]


def test_a_long_step_is_the_same_played_whole_or_in_part(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = search(graph, "4xA100", 256, stages=4, replicas=1, samples=1, order="1f1b")
    layout = best(looking)
    whole = step_seconds(looking, layout)
    monkeypatch.setattr("partita.planners.large.clock.MOST_STEPS", 100)
    assert MOST_STEPS > 2 * 4 * 256
    assert step_seconds(looking, layout) == pytest.approx(whole, rel=1e-3)


def test_replicas_that_divide_unevenly_are_played_and_ranked(graph: Graph) -> None:
    looking = search(graph, "2xA100-80GB + 2x2xV100-16GB", 32)
    found = looking.run()
    again = ranked(looking, found)
    played = [x.seconds for x in again.layouts[:5]]
    assert played == sorted(played) and again.bound == found.bound and again.gap == found.gap
    assert {x.degrees for x in again.layouts} == {x.degrees for x in found.layouts}


def test_gathers_beside_compute_cost_what_contention_takes_and_what_sticks_out(graph: Graph) -> None:
    assert together(3.0, 1.0, 0.0) == 3.0 and together(1.0, 3.0, 0.0) == 3.0 and together(2.0, 1.0, 0.5) == 2.5
    slow = "4x1xA100@ETHERNET-10G"
    limits = {"degree": 1, "stages": 1, "replicas": 4, "samples": 1}
    three = best(search(graph, slow, 8, zero=3, **limits))
    one = best(search(graph, slow, 8, zero=1, **limits))
    assert dict(three.parts)["gathers not hidden"] > 0.0 == dict(one.parts)["gathers not hidden"]
    free = best(search(graph, slow, 8, Assumptions(contention=0.0), zero=3, **limits))
    assert free.seconds < three.seconds
