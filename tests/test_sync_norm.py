"""Channel statistics taken with vectorised sums are those that PyTorch takes value by value."""

from __future__ import annotations

import pytest
import torch

from partita.runtime.sync_norm import statistics


@pytest.mark.parametrize("shape", [(4, 5, 9, 7), (3, 8, 40), (2, 3, 4, 5, 6), (16, 6)])
@pytest.mark.parametrize("offset", [0.0, 1.0, 3.9, 50.0, 1e4])
def test_statistics_are_right_to_float32_rounding_however_far_the_mean_is_from_zero(
    shape: tuple[int, ...], offset: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) + offset
    dims = [d for d in range(x.dim()) if d != 1]
    mean, var = statistics(x)
    variance, middle = torch.var_mean(x.double(), dims, correction=0)
    torch.testing.assert_close(mean.double(), middle, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), variance, rtol=1e-5, atol=0.0)


def test_a_constant_channel_has_no_variance() -> None:
    mean, var = statistics(torch.full((4, 2, 8, 8), 3.0))
    assert mean.tolist() == [3.0, 3.0]
    assert var.tolist() == [0.0, 0.0]


def test_other_layouts_and_types_give_the_same_statistics() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8, 8)
    for other in (x.contiguous(memory_format=torch.channels_last), x.double(), x.transpose(2, 3)):
        for mine, plain in zip(statistics(other), statistics(x), strict=True):
            torch.testing.assert_close(mine.float(), plain, rtol=1e-5, atol=1e-6)
