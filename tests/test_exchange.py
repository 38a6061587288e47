"""An exchange gives what a gathering and taking own rows gives, both ways, and moves an n-th of the bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from partita.runtime.collectives import LocalGroup
from partita.runtime.spmd_ops import exchange, gathered, own_rows
from partita.runtime.waits import Waits
from partita.sharding.placements import Cut, Shard
from partita.sharding.prices import Prices, conversion

EVEN = ((2, 2, 2),)
UNEVEN = ((3, 2, 1),)
ROUNDS = ((1, 1, 1), (2, 0, 1))
Rounds = tuple[tuple[int, ...], ...]


def together(work: Callable[[LocalGroup], Any]) -> list[Any]:
    groups = LocalGroup.make(3, Waits())
    found: list[Any] = [None] * 3

    def run(rank: int) -> None:
        found[rank] = work(groups[rank])

    threads = [threading.Thread(target=run, args=(r,)) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


@pytest.mark.parametrize(("held", "dim"), [(0, 1), (1, 2), (2, 0)])
@pytest.mark.parametrize(("before", "after"), [(EVEN, UNEVEN), (UNEVEN, ROUNDS), (ROUNDS, EVEN)])
def test_an_exchange_is_a_gathering_and_own_rows(held: int, dim: int, before: Rounds, after: Rounds) -> None:
    whole, slope = torch.randn(6, 6, 12), torch.randn(6, 6, 12)
    if held == 2 or dim == 2:
        whole, slope = whole[..., :6], slope[..., :6]

    def work(group: LocalGroup) -> tuple[torch.Tensor, torch.Tensor]:
        x = own_rows(whole, held, before, group.rank).clone().requires_grad_()
        y = exchange(x, held, before, dim, after, group=group)
        (grad,) = torch.autograd.grad(y, x, own_rows(slope, dim, after, group.rank))
        assert torch.equal(y, own_rows(gathered(group, x.detach(), held, before), dim, after, group.rank))
        return y.detach(), grad

    for rank, (y, grad) in enumerate(together(work)):
        assert torch.equal(y, own_rows(whole, dim, after, rank))
        assert torch.equal(grad, own_rows(slope, held, before, rank))


def test_rows_of_another_dim_cost_an_nth_of_a_gathering() -> None:
    prices, cut = Prices(), Cut(((1, 1, 1, 1),))
    other = conversion(prices, 4, 1 << 20, Shard(0, cut), Shard(1, cut), grad=True)
    same = conversion(prices, 4, 1 << 20, Shard(0, cut), Shard(0, Cut(((2, 2, 0, 0),))), grad=True)
    assert other == pytest.approx(same / 4)
