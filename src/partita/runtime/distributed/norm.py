"""Batch-norm statistics met over ranks: what ``sync_norm.Meeting`` is to threads."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from partita.runtime.distributed.world import Group, World


class GroupMeeting:
    """``groups``: op name -> the group of its replicas, in order of their microbatches."""

    keeps_own = True  # every rank has running averages of its own, and updates them alike

    def __init__(self, world: World, groups: Mapping[str, tuple[tuple[int, ...], Group]]) -> None:
        self.world, self.groups = world, groups

    def gather(self, key: Hashable, rank: int, value: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Everybody's tensors (and numbers) for ``key``, in order of microbatches."""
        assert isinstance(key, tuple)
        ranks, group = self.groups[key[0]]
        tensors = [v if isinstance(v, torch.Tensor) else torch.tensor(float(v)) for v in value]
        flat = torch.cat([t.detach().reshape(-1).to(self.world.device, torch.float64) for t in tensors])
        found = [torch.empty_like(flat) for _ in ranks]
        with self.world.watch.waiting(f"the batch statistics of {key[0]}"):
            dist.all_gather(found, flat, group=group)
        by_rank = dict(zip(sorted(ranks), found, strict=True))
        return [_apart(by_rank[r], value) for r in ranks]


def _apart(flat: torch.Tensor, like: tuple[Any, ...]) -> tuple[Any, ...]:
    result: list[Any] = []
    start = 0
    for item in like:
        if isinstance(item, torch.Tensor):
            result.append(flat[start : start + item.numel()].view(item.shape).to(item.dtype))
            start += item.numel()
        else:
            result.append(type(item)(flat[start].item()))
            start += 1
    return tuple(result)
