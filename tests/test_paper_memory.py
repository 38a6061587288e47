"""Memory and time of a layout against closed forms that were published."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from partita.capture import capture
from partita.cluster import Cluster
from partita.cost.roofline import Assumptions
from partita.graph import Graph
from partita.models.catalog import build
from partita.models.gpt import GPTSize
from partita.planners.large.degrees import Degrees, Group
from partita.planners.large.exchange import StateBytes
from partita.planners.large.layout import Pricer
from partita.planners.large.loads import Row
from partita.planners.large.pools import pools
from partita.planners.large.prices import Prices
from partita.planners.large.units import Units, units

HIDDEN, HEADS, LENGTH, LAYERS = 512, 8, 256, 8
ASSUME = Assumptions(reserve_bytes=0.0)


@pytest.fixture(scope="module")
def graph() -> Graph:
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64, device="meta")
    size = GPTSize(LAYERS, HIDDEN, HEADS, 1024, LENGTH, dropout=0.1, fused=False)
    return capture(build(size), (tokens, tokens)).graph


def layer_bytes(graph: Graph, degree: int, sequence: bool, samples: int) -> float:
    """Saved bytes of one layer, whatever units it is cut into."""
    row = units(graph)
    prices = Prices(graph, row, ASSUME)
    (pool,) = pools(Cluster.parse("8xA100"), ASSUME)
    found = prices.of(pool, degree, sequence, samples)
    assert found is not None
    return sum(
        found[u.kind].saved for u in row.row if graph.ops[u.start].module.startswith("layers.3") or u.name == "layers.3"
    )


@pytest.mark.parametrize("samples", [1, 4])
def test_a_layer_keeps_the_bytes_korthikanti_counts(graph: Graph, samples: int) -> None:
    """34 s b h + 5 a s^2 b (2022, equation 1), here with the causal mask, once, and two norms' statistics."""
    s, b, h, a = LENGTH, samples, HIDDEN, HEADS
    assert layer_bytes(graph, 1, False, samples) == 34 * s * b * h + 5 * a * s * s * b + s * s + 16 * s * b


def test_tensor_degrees_leave_ten_parts_whole_and_sequence_division_none(graph: Graph) -> None:
    """s b h (10 + 24/t) + 5 a s^2 b / t (equation 2); all of it over t with the sequence divided (equation 4)."""
    s, h, a, t = LENGTH, HIDDEN, HEADS, 4
    scores = 5 * a * s * s / t + s * s
    assert layer_bytes(graph, t, False, 1) == s * h * (10 + 24 / t) + scores + 16 * s
    assert layer_bytes(graph, t, True, 1) == 34 * s * h / t + scores + 16 * s


def test_zero_divides_as_published() -> None:
    """Rajbhandari et al. (2020), figure 1: 7.5 billion parameters on 64 devices: 120, 31.4, 16.6 and 1.9 GB."""
    state = StateBytes.of(Assumptions(), "adamw")
    found = [state.held(7.5e9, 7.5e9, 64, zero) / 1e9 for zero in range(4)]
    assert found == pytest.approx([120.0, 31.4, 16.6, 1.88], abs=0.05)


def test_adam_takes_sixteen_bytes_a_parameter_in_either_precision() -> None:
    for precision in ("mixed", "full"):
        state = StateBytes.of(Assumptions(precision=precision), "adamw")
        assert state.weight + state.gradient + state.optimizer == 16


def pricer(graph: Graph, memory: float, batch: int = 8) -> tuple[Pricer, tuple[Row, ...], Units]:
    (pool,) = pools(Cluster.parse("8xA100"), ASSUME)
    pool = replace(pool, device=replace(pool.device, memory_bytes=int(memory)))
    row = units(graph)
    prices = Prices(graph, row, ASSUME).of(pool, 1, False, 1)
    assert prices is not None
    made = Row.of(np.array([u.kind for u in row.row]), prices, np.zeros(len(row.row), dtype=bool))
    return Pricer((pool,), batch, ASSUME, optimizer="adamw", headroom=1.0), (made,), row


def test_the_first_stage_holds_as_many_microbatches_as_there_are_stages(graph: Graph) -> None:
    price, rows, _ = pricer(graph, 80e9)
    degrees = Degrees((Group(0, 4, 1, 1),), 1)
    layout = price.price(degrees, rows)
    assert layout is not None
    row = rows[0]
    for s, stage in enumerate(layout.stages):
        ((start, stop),) = stage.spans
        k = row.kinds[start:stop]
        held = 16 * row.trained[k].sum() + (4 - s) * row.saved[k].sum()
        held += row.working[k].max() + 4 * row.sent[k].max()
        assert stage.memory == pytest.approx(held, rel=1e-9)


def test_recomputation_is_bought_only_as_far_as_memory_is_short(graph: Graph) -> None:
    counts, seconds = [], []
    full = pricer(graph, 80e9)[0].price(Degrees((Group(0, 4, 1, 1),), 1), pricer(graph, 80e9)[1])
    assert full is not None
    peak = max(s.memory for s in full.stages)
    for share in (1.0, 0.95, 0.9, 0.85, 0.75):
        price, rows, _ = pricer(graph, share * peak)
        layout = price.price(Degrees((Group(0, 4, 1, 1),), 1), rows)
        assert layout is not None
        assert all(s.memory <= share * peak * (1 + 1e-9) for s in layout.stages)
        counts.append(sum(sum(s.recomputed) for s in layout.stages))
        seconds.append(layout.seconds)
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] > 0
    assert seconds == sorted(seconds)


def test_the_bubble_is_p_minus_1_over_chunks(graph: Graph) -> None:
    """Narayanan et al. (2021), section 2.2: (p - 1) / v of a microbatch's time on one device."""
    price, _, row = pricer(graph, 80e9)
    (pool,) = price.pools
    prices = Prices(graph, row, ASSUME).of(pool, 1, False, 1)
    assert prices is not None
    one = max(prices, key=lambda p: p.forward)
    even = Row.of(
        np.zeros(16, dtype=np.int64), (replace(one, sent=0.0, entry=0.0, trained=0.0),), np.zeros(16, dtype=bool)
    )
    busy = 16 / 4 * (one.forward + one.backward)
    for chunks in (1, 2, 4):
        layout = price.price(Degrees((Group(0, 4, 1, 1),), 1, chunks), (even,))
        assert layout is not None
        assert layout.seconds == pytest.approx(8 * busy + 3 * busy / chunks, rel=1e-3)
