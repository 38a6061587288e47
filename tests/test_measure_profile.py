"""Profiling: what is measured, what is left as it was, what is kept on disk, and that planning uses it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import partita
from partita.capture import Captured, capture
from partita.cluster import Cluster
from partita.cost.affine import Affine
from partita.cost.blocks import profile_units
from partita.cost.measured import Measured, Timing
from partita.cost.table import cost_table
from partita.measure import kept_timings, local_cluster, measure_call
from partita.measure import profile as module
from partita.measure.profile import profile
from partita.measure.rehearsal import Rehearsal
from partita.measure.timings import LEAST_ALONE, MOST_HELD_UP, Sample, ease, held_up, lines, numbers
from partita.sharding.batch import layouts


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Deep(nn.Module):
    def __init__(self, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.batch_norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.embedding(x))
        for layer in self.layers:
            y = layer(y)
        return self.batch_norm(y)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    monkeypatch.setattr("partita.measure.calls.LEAST_SECONDS", 0.0)
    return tmp_path


def measured(model: nn.Module, x: torch.Tensor, cluster: Cluster) -> tuple[Captured, Measured]:
    captured = capture(model, (x,), {})
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    given = dict(zip(captured.inputs, [x], strict=True))
    given |= {t.name: buffers[t.path] for t in captured.graph.of_role("buffer")}
    weights = {t.name: parameters[t.path] for t in captured.graph.of_role("parameter")}
    found = profile(
        captured, layouts(captured.graph), cluster, given=given, parameters=weights, progress=False, budget_seconds=0.1
    )
    return captured, found


def test_every_unit_has_a_timing_and_equal_layers_share_one(place: Path) -> None:
    cluster = local_cluster(["cpu", "cpu"])
    captured, found = measured(Deep(), torch.randint(50, (8,)), cluster)
    parts = profile_units(captured.graph)
    kinds = {d.kind for d in cluster.devices}
    assert all(found.get(p.signature, kind) is not None for p in parts for kind in kinds)
    assert len({p.signature for p in parts}) < len(parts)
    batch = captured.graph.batch
    assert sum(t.forward.at(batch) for t in found.timings.values()) > 0
    assert sum(t.backward.at(batch) for t in found.timings.values()) > 0


def test_saved_bytes_are_those_autograd_keeps(place: Path) -> None:
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Sigmoid()), torch.randn(8, 16)
    captured, found = measured(model, x, local_cluster(["cpu", "cpu"]))
    kind = local_cluster(["cpu", "cpu"]).devices[0].kind
    total = 0.0
    for part in profile_units(captured.graph):
        timing = found.get(part.signature, kind)
        assert timing is not None and timing.saved is not None
        total += timing.saved.at(8)
    # x counts with the first layer, the other layers' inputs and the sigmoid's result with who made them
    assert 3 * 8 * 16 * 4 <= total <= 5 * 8 * 16 * 4


def test_profiling_leaves_model_inputs_and_random_state_as_they_were(place: Path) -> None:
    model, x = Deep().train(), torch.randint(50, (8,))
    kept = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    inputs, state, threads = x.clone(), torch.get_rng_state(), torch.get_num_threads()
    measured(model, x, local_cluster(["cpu", "cpu"]))
    assert all(torch.equal(kept[n], t) for n, t in (*model.named_parameters(), *model.named_buffers()))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(inputs, x) and torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_a_second_profile_is_read_from_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, cluster = Deep(), torch.randint(50, (8,)), local_cluster(["cpu", "cpu"])
    captured, first = measured(model, x, cluster)
    monkeypatch.setattr(module, "_rounds", lambda *_: pytest.fail("measured again"))
    _, second = measured(model, x, cluster)
    assert dict(second.timings) == dict(first.timings)
    assert kept_timings(captured, cluster) is not None
    assert kept_timings(captured, local_cluster(["cpu", "cpu", "cpu"])) is None


def test_a_damaged_cache_is_measured_again(place: Path) -> None:
    model, x, cluster = Deep(), torch.randint(50, (8,)), local_cluster(["cpu", "cpu"])
    measured(model, x, cluster)
    (place / "timings.json").write_text('{"1|x": [1, 2')
    _, again = measured(model, x, cluster)
    assert again.timings


def test_what_is_not_here_or_too_small_is_not_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Deep(), torch.randint(50, (8,))
    captured = capture(model, (x,), {})
    assert measure_call(captured, Cluster.parse("2x8xH100"), model, (x,)) is None
    monkeypatch.setattr("partita.measure.calls.LEAST_SECONDS", 1e9)
    assert measure_call(captured, local_cluster(["cpu", "cpu"]), model, (x,)) is None


def test_a_measured_unit_costs_what_was_measured(place: Path) -> None:
    model, x, cluster = Deep(), torch.randint(50, (8,)), local_cluster(["cpu", "cpu"])
    graph = capture(model, (x,), {}).graph
    parts, kind = profile_units(graph), cluster.devices[0].kind
    line = Affine(1.0, 0.5)
    timings = {(p.signature, kind): Timing(line, line, line, first=line) for p in parts}
    table = cost_table(graph, cluster, measured=Measured(timings))
    part = parts[len(parts) // 2]
    for rows in (table.forward, table.backward, table.weight, table.first):
        assert rows[kind][part.start : part.stop].sum(axis=0) == pytest.approx([1.0, 0.5])


def test_parallelize_plans_with_what_it_measured(place: Path) -> None:
    model, x = Deep(), torch.randint(50, (8,))
    pm = partita.parallelize(model, (x,), devices=["cpu", "cpu"])
    found = kept_timings(capture(model, (x,), {}), pm.cluster)
    assert found is not None and (place / "timings.json").exists()
    assert partita.find_plan(model, (x,), devices=["cpu", "cpu"]).predicted is not None
    assert partita.verify(model, (x,), plan=pm.plan).ok
    pm.close()


def test_profile_false_measures_nothing(place: Path) -> None:
    model, x = Deep(), torch.randint(50, (8,))
    partita.parallelize(model, (x,), devices=["cpu", "cpu"], profile=False).close()
    assert not (place / "timings.json").exists()


def _samples(turns: list[tuple[float, float]], *, alone: bool = False) -> list[Sample]:
    """Two units a turn: (own seconds, wall clock) of each."""
    return [
        Sample("forward", unit, False, own, wall, turn, alone)
        for turn, (own, wall) in enumerate(turns)
        for unit in (0, 1)
    ]


def test_what_the_system_takes_is_told_by_the_quietest_round() -> None:
    assert held_up(_samples([(1.0, 1.03), (1.0, 1.9), (1.0, 1.04)])) == pytest.approx(1.03)
    assert held_up(_samples([(1.0, 0.99)])) == 1.0
    assert held_up(_samples([(1.0, 2.0), (1.0, 1.8)])) == MOST_HELD_UP  # a neighbour all the time
    assert held_up([]) == 1.0


def test_ease_is_what_is_left_of_the_seconds_alone() -> None:
    together = _samples([(1.0, 1.0)] * 4)
    assert ease([[*together, *_samples([(0.9, 0.9)], alone=True)]]) == pytest.approx(0.9)
    assert ease([[*together, *_samples([(1.2, 1.2)], alone=True)]]) == 1.0
    assert ease([[*together, *_samples([(0.1, 0.1)], alone=True)]]) == LEAST_ALONE
    assert ease([together]) == 1.0  # nobody ran alone


def test_what_a_first_gradient_takes_is_told_by_the_smallest_size() -> None:
    """Only it is timed adding to gradients. At the largest, a step of one microbatch is what was timed there."""
    units = [(0, "layer", False, 8.0)]

    def timed(seconds: float, fresh: bool) -> Sample:
        return Sample("weight", 0, fresh, seconds, seconds, 1, False)

    small = numbers([[timed(1.5, True), timed(1.0, False)]], units)
    large = numbers([[timed(8.5, True)]], units, small)
    timing = lines([small, large], (2, 16), ["layer"], 1.0)["layer"]
    assert timing.first == Affine(0.5, 0.0)
    assert timing.weight == Affine(0.0, 0.5)  # 1.0 at two samples, 8.0 at sixteen


def test_equal_layers_beyond_the_timed_ones_are_not_run_and_change_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, ran = Deep(depth=9), torch.randint(50, (8,)), list[int]()
    captured = capture(model, (x,), {})
    graph, forward = captured.graph, Rehearsal.forward
    buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())
    given = {captured.inputs[0]: x} | {t.name: buffers[t.path] for t in graph.of_role("buffer")}
    weights = {t.name: parameters[t.path] for t in graph.of_role("parameter")}

    def noted(self: Rehearsal, index: int, microbatch: int | None = None, *, keep: bool = False) -> None:
        ran.append(index)
        forward(self, index, microbatch, keep=keep)

    def opened() -> tuple[int, dict[int, float | None]]:
        ran.clear()
        group, parts = local_cluster(["cpu"]).devices, profile_units(graph)
        script = module._script(captured, layouts(graph), group, parts, 4, given, weights, True)
        return len(ran), {i: script.saved.get(i) for i in script.chosen}

    monkeypatch.setattr(Rehearsal, "forward", noted)
    few, saved = opened()
    monkeypatch.setattr(module, "_stand_ins", lambda *_: {})
    every, expected = opened()
    assert few < every and saved == expected
