"""Schedules: complete, deadlock-free, drawn as in their docstrings, with the textbooks' bubbles and memory."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.errors import PlanError
from partita.schedules import (
    NAMES,
    Step,
    draw,
    gpipe,
    interleaved,
    makespan,
    max_in_flight,
    one_f_one_b,
    order,
    schedule,
    stuck,
    zero_bubble,
)
from partita.schedules.greedy import play
from partita.schedules.steps import device_of

CHAINS = st.tuples(st.integers(1, 6), st.integers(1, 12))


def chain(p: int) -> tuple[tuple[str, ...], ...]:
    return tuple((chr(97 + s),) for s in range(p))


@st.composite
def placements(draw_: st.DrawFn) -> tuple[tuple[str, ...], ...]:
    names = "abcde"[: draw_(st.integers(1, 5))]
    stage = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).map(tuple)
    return tuple(draw_(st.lists(stage, min_size=1, max_size=6)))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), placements(), st.integers(1, 9), st.booleans(), st.booleans())
def test_every_step_stands_exactly_once_on_its_device_and_nobody_waits_for_ever(name, placement, m, joined, train):
    orders = schedule(name, placement, m, joined=joined, train=train)
    kinds = "F" if not train else "FBW" if name == "zero_bubble" else "FB"
    count = Counter((device, step) for device, steps in orders.items() for step in steps)
    wanted = {
        (device_of(placement, s, i), Step(k, s, i)) for k in kinds for s in range(len(placement)) for i in range(m)
    }
    assert set(count) == wanted and set(count.values()) == {1}
    if train:
        assert stuck(orders, len(placement)) == ()
    if joined and train:
        for steps in orders.values():
            kinds_in_order = "".join(step.kind for step in steps)
            assert "F" not in kinds_in_order.lstrip("F")


@pytest.mark.parametrize(
    ("module", "name", "drawings"),
    [
        (gpipe, "gpipe", [(chain(2), 3)]),
        (one_f_one_b, "1f1b", [(chain(3), 4)]),
        (zero_bubble, "zero_bubble", [(chain(3), 4), ((("a",), ("b",), ("b",), ("a",)), 2)]),
        (interleaved, "interleaved", [((("a",), ("b",), ("a",), ("b",)), 2)]),
    ],
)
def test_the_drawing_in_the_docstring_is_what_is_made(module, name, drawings):
    drawn = "\n".join(line.strip() for line in module.__doc__.splitlines() if re.match(r"\s*[a-z]: [FBW]\d", line))
    assert "\n".join(draw(schedule(name, placement, m)) for placement, m in drawings) == drawn


@given(CHAINS)
def test_1f1b_is_warm_up_then_one_forward_one_backward_then_cool_down(pm):
    p, m = pm
    orders = schedule("1f1b", chain(p), m)
    for s, steps in enumerate(orders.values()):
        warm = min(m, p - s - 1)
        book = [Step("F", s, i) for i in range(warm)]
        for i in range(warm, m):
            book += [Step("F", s, i), Step("B", s, i - warm)]
        book += [Step("B", s, i) for i in range(m - warm, m)]
        assert list(steps) == book


@given(CHAINS)
def test_gpipe_is_all_forwards_then_all_backwards(pm):
    p, m = pm
    for s, steps in enumerate(schedule("gpipe", chain(p), m).values()):
        assert list(steps) == [Step("F", s, i) for i in range(m)] + [Step("B", s, i) for i in range(m)]


@given(CHAINS, st.sampled_from(["gpipe", "1f1b"]))
def test_bubble_is_p_minus_1_over_m_plus_p_minus_1(pm, name):
    p, m = pm
    seconds = makespan(schedule(name, chain(p), m), p)
    assert 1 - 3 * m / seconds == pytest.approx((p - 1) / (m + p - 1))


@given(st.integers(1, 6), st.integers(0, 12))
def test_zero_bubble_wastes_a_third_of_1f1b(p, more):
    m = 2 * p - 1 + more
    assert makespan(schedule("zero_bubble", chain(p), m), p) == 3 * m + p - 1
    assert makespan(schedule("1f1b", chain(p), m), p) == 3 * m + 3 * (p - 1)


@given(st.integers(1, 6), st.integers(1, 4))
def test_zero_bubble_in_a_v_has_half_the_bubble_at_the_same_peak(p, turns):
    """Steps half as long, two stages a device: 6m + p - 1 of them, where a chain has 6m + 2(p - 1)."""
    m = p * turns
    there_and_back = (*chain(p), *reversed(chain(p)))
    orders = schedule("zero_bubble", there_and_back, m)
    assert makespan(orders, 2 * p) == 6 * m + p - 1
    for steps in orders.values():
        held = list(itertools.accumulate({"F": 1, "B": 0, "W": -1}[step.kind] for step in steps))
        assert max(held) <= 2 * p


@given(CHAINS)
def test_zero_bubble_is_never_slower_than_1f1b(pm):
    p, m = pm
    assert makespan(schedule("zero_bubble", chain(p), m), p) <= makespan(schedule("1f1b", chain(p), m), p)


@given(CHAINS)
def test_in_flight_is_m_in_gpipe_depth_to_the_end_in_1f1b_and_at_most_p_in_zero_bubble(pm):
    p, m = pm
    for s in range(p):
        key = (chr(97 + s), s)
        assert max_in_flight(schedule("gpipe", chain(p), m))[key] == m
        assert max_in_flight(schedule("1f1b", chain(p), m))[key] == min(m, p - s)
        assert max_in_flight(schedule("zero_bubble", chain(p), m))[key] <= p


@given(st.integers(2, 4), st.integers(2, 3), st.integers(1, 4))
def test_interleaving_divides_the_bubble_by_the_stages_a_device_hosts(p, v, turns):
    m = p * turns
    placement = tuple((chr(97 + s % p),) for s in range(p * v))
    assert makespan(schedule("interleaved", placement, m), p * v) == 3 * v * m + 3 * (p - 1)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 8))
def test_replicas_each_run_the_textbook_on_their_own_microbatches(p, r, turns):
    placement = tuple(tuple(f"{s}{i}" for i in range(r)) for s in range(p))
    orders = schedule("1f1b", placement, r * turns)
    alone = schedule("1f1b", tuple((str(s),) for s in range(p)), turns)
    for s in range(p):
        for i in range(r):
            mine = [(x.kind, x.microbatch // r) for x in orders[f"{s}{i}"]]
            assert mine == [(x.kind, x.microbatch) for x in alone[str(s)]]


def test_a_deadlock_is_told_by_name():
    a, b = (Step("F", 0, 0), Step("B", 0, 0)), (Step("B", 1, 0), Step("F", 1, 0))
    assert stuck({"a": a, "b": b}, 2) == ("a waits with B0.0 for B1.0", "b waits with B1.0 for F1.0")
    with pytest.raises(ValueError, match="a waits with B0.0"):
        makespan({"a": a, "b": b}, 2)


def test_a_limit_keeps_memory_where_greed_would_not():
    rule = type(one_f_one_b.RULE)(prefer="FB", limited=False)
    assert max(max_in_flight(play(rule, chain(3), 9)).values()) > max(
        max_in_flight(schedule("1f1b", chain(3), 9)).values()
    )


@pytest.mark.parametrize(("name", "m", "text"), [("1f2b", 2, "1f2b.*gpipe, 1f1b"), ("1f1b", 0, "at least 1 micro")])
def test_what_cannot_be_scheduled_is_refused_with_the_reason(name, m, text):
    with pytest.raises(PlanError, match=text):
        schedule(name, chain(2), m)


def test_order_gives_one_rank_of_a_deal():
    assert order("1f1b", num_stages=3, num_microbatches=4, rank=2) == schedule("1f1b", chain(3), 4)["c"]
    placement = (("0",), ("1",), ("0",), ("1",))
    assert (
        order("interleaved", num_stages=4, num_microbatches=2, rank=1, num_ranks=2)
        == schedule("interleaved", placement, 2)["1"]
    )
