"""The comparison itself: what it must call different, and what it may put down to float32 rounding."""

from __future__ import annotations

import torch
from torch import nn

from partita.runtime.compare import Observed, allow_rounding, compare, observe, observe64


def _observed(value: torch.Tensor) -> Observed:
    return Observed({"output": value}, {}, {})


def test_one_wrong_row_is_different() -> None:
    right = torch.randn(8, 4)
    wrong = right.clone()
    wrong[3] = right[4]
    assert compare(_observed(right), _observed(right.clone())).ok
    assert not compare(_observed(right), _observed(wrong)).ok


def test_a_missing_gradient_is_different_unless_it_is_zero() -> None:
    some = Observed({}, {"w": torch.ones(3)}, {})
    none = Observed({}, {}, {})
    assert not compare(some, none).ok
    assert compare(Observed({}, {"w": torch.zeros(3)}, {}), none).ok


def test_rounding_as_large_as_the_unsplit_models_own_is_allowed_and_reported() -> None:
    true = torch.randn(100, dtype=torch.float64)
    plain, divided = (true + 1e-3 * torch.randn(100, dtype=torch.float64) for _ in range(2))
    seen = [_observed(t.float()) for t in (plain, divided)]
    found = compare(*seen)
    assert not found.ok
    allowed = allow_rounding(found, *seen, _observed(true))
    assert allowed.ok and "float64" in str(allowed)


def test_an_error_larger_than_rounding_is_not_allowed() -> None:
    true = torch.randn(100, dtype=torch.float64)
    plain = true + 1e-6 * torch.randn(100, dtype=torch.float64)
    wrong = true.clone()
    wrong[7] += 1e-2
    seen = [_observed(t.float()) for t in (plain, wrong)]
    assert not allow_rounding(compare(*seen), *seen, _observed(true)).ok


def test_other_random_draws_in_float64_excuse_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    x = torch.randn(16, 8)
    expected = observe(model, model, (x,), {}, seed=1)
    wrong = observe(model, model, (x,), {}, seed=2)
    found = compare(expected, wrong)
    assert not found.ok
    assert not allow_rounding(found, expected, wrong, observe64(model, (x,), {}, seed=3)).ok
