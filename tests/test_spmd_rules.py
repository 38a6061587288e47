"""Every way to divide an op against the op itself: local pieces and collectives give its results and gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from batch_reference import graph_of
from hypothesis import given, settings
from hypothesis import strategies as st
from spmd_reference import check, frozen, options
from test_sharding_rules import CASES, _target

from partita.runtime.collectives import LocalGroup
from partita.runtime.waits import Stopped, Waits
from partita.sharding.eliminate import cheapest
from partita.sharding.placements import REPLICATE, Cut, apart, even, inside

torch.set_num_threads(1)
SIZE = 6
# Results that are not numbers yet (empty, new_empty), drawn anew (dropout), or changed in place in a leaf.
NO_NUMBERS = ("empty", "dropout", "rrelu", "copy_", "zero_", "fill_", "lift")


def examples() -> list[tuple[str, Callable[[int], tuple[Any, ...]], Any]]:
    return [
        (name, make, keywords)
        for name, make, keywords, phase in CASES
        if phase != "skip" and not any(word in name for word in NO_NUMBERS)
    ]


@pytest.mark.parametrize("part", range(4))
def test_every_op_divided_in_every_way_its_rule_allows_equals_the_op(part: int) -> None:
    listed = examples()[part::4]
    divided = 0
    for at, (name, make, keywords) in enumerate(listed):
        members = 3 if at % 3 == 0 else 2
        graph, leaves = graph_of(_target(name), make, keywords, batch=SIZE)
        graph = frozen(graph, SIZE)
        for option in options(graph, graph.ops[0], members):
            differentiable = all(t.dtype not in ("complex64", "complex128") for t in graph.tensors)
            try:
                check(graph, leaves, {"op": option}, members, grad=differentiable)
            except Exception as error:
                raise AssertionError(f"{name} divided along {option.label} as {option.cut}: {error}") from error
            divided += 1
    assert divided >= 2 * len(listed)


def test_an_option_that_forgets_to_sum_is_caught() -> None:
    graph, leaves = graph_of("aten.mm.default", lambda b: (torch.randn(b, 4), torch.randn(4, 3)), batch=SIZE)
    graph = frozen(graph, SIZE)
    right = next(o for o in options(graph, graph.ops[0], 2) if o.label == "k")
    check(graph, leaves, {"op": right}, 2)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(graph, leaves, {"op": replace(right, outputs=(REPLICATE,))}, 2)


def t(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


FAMILIES: dict[str, Callable[[Callable[[], int], int], tuple[Any, ...]]] = {
    "linear": lambda d, b: (t(b, d(), 6), t(d(), 6), t(d())),
    "bmm": lambda d, b: (t(b, d(), 5), t(b, 5, d())),
    "addmm": lambda d, b: (t(d()), t(b, 5), t(5, d())),
    "conv1d": lambda d, b: (t(b, 4, 6), t(d(), 4, 3), t(d()), [1], [1], [1], 1),
    "layer_norm": lambda d, b: (t(b, d(), 5), [5], t(5), t(5), 1e-5, False),
    "log_softmax.int": lambda d, b: (t(b, d(), 4), -1),
    "view": lambda d, b: (t(b, 3, 8), [b, 3, 2, 4]),
    "split_with_sizes": lambda d, b: (t(b, 12), [8, 2, 2], 1),
    "cat": lambda d, b: ([t(b, 6, d()), t(b, 4, d())], 1),
    "cross_entropy_loss": lambda d, b: (t(b, 7), torch.randint(0, 7, (b,)), None, 1, -100, 0.1),
    "embedding": lambda d, b: (t(9, d()), torch.randint(0, 9, (b, 3)), 2),
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 1000), st.integers(2, 4), st.integers(2, 7))
def test_any_size_may_be_divided_unevenly(name: str, seed: int, members: int, batch: int) -> None:
    def make(size: int) -> tuple[Any, ...]:
        drawn = torch.Generator().manual_seed(seed)
        one = int(torch.randint(2, 8, (), generator=drawn))
        return FAMILIES[name](lambda: one, size)

    graph, leaves = graph_of(_target(name), make, batch=batch)
    graph = frozen(graph, batch)
    found = options(graph, graph.ops[0], members)
    if found:
        check(graph, leaves, {"op": found[seed % len(found)]}, members)


def test_the_uneven_parts_of_a_fused_projection_are_divided_alike() -> None:
    """Grouped heads: 8 rows of queries, 2 of keys, 2 of values; each member holds its part of all three."""
    graph, _ = graph_of("aten.split_with_sizes.default", lambda b: (torch.randn(b, 12), [8, 2, 2], 1), batch=4)
    found = [o for o in options(frozen(graph, 4), graph.ops[0], 2) if o.label == "dim 1"]
    assert Cut(((4, 4), (1, 1), (1, 1))) in [o.cut for o in found]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_cut_of_a_merged_dim_is_read_back_as_the_cut_of_its_label(shape: list[int], data: Any) -> None:
    at = data.draw(st.integers(0, len(shape) - 1))
    shape[at] = data.draw(st.integers(2, 6))
    cut = even(shape[at], 2)
    assert cut is not None
    whole = inside(cut, shape, at)
    assert whole is not None and whole.total == torch.Size(shape).numel()
    back = apart(whole, shape)
    assert back is not None
    assert inside(back[1], shape, back[0]) == whole


@given(st.integers(0, 10_000), st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_elimination_finds_the_cheapest_labelling(seed: int, count: int) -> None:
    drawn = np.random.default_rng(seed)
    size = drawn.integers(1, 4, count)
    one = {v: drawn.integers(0, 9, size[v]).astype(float) for v in range(count)}
    pairs = [(u, v) for u in range(count) for v in range(u + 1, count) if drawn.random() < 0.6]
    two = {(u, v): drawn.integers(0, 9, (size[u], size[v])).astype(float) for u, v in pairs}

    def cost(labels: tuple[int, ...]) -> float:
        return sum(one[v][labels[v]] for v in one) + sum(two[u, v][labels[u], labels[v]] for u, v in two)

    found, seconds = cheapest(one, two)
    best = min(map(cost, product(*(range(n) for n in size))))
    assert cost(tuple(found[v] for v in range(count))) == seconds == best


def test_every_member_gets_the_same_bits_and_a_stop_ends_the_wait() -> None:
    def together(work: Callable[[LocalGroup], Any], groups: tuple[LocalGroup, ...]) -> list[Any]:
        found: list[Any] = [None] * len(groups)

        def run(rank: int) -> None:
            try:
                found[rank] = work(groups[rank])
            except Stopped:
                found[rank] = "stopped"

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(groups))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    given = [torch.randn(1001) * 10.0**k for k in range(3)]
    sums = together(lambda g: g.all_reduce(given[g.rank]), LocalGroup.make(3, Waits()))
    assert all(torch.equal(sums[0], other) for other in sums)
    torch.testing.assert_close(sums[0], given[0] + given[1] + given[2])
    parts = together(lambda g: g.reduce_scatter(given[g.rank], 0, (500, 500, 1)), LocalGroup.make(3, Waits()))
    torch.testing.assert_close(torch.cat(parts), sums[0])
    waits = Waits()

    def late(group: LocalGroup) -> Any:
        if group.rank == 2:
            waits.stopped = True  # never comes
            return "gone"
        return group.all_reduce(given[0])

    assert together(late, LocalGroup.make(3, waits)) == ["stopped", "stopped", "gone"]
