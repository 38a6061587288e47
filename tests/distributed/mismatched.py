"""Ranks that make different calls: one sums through shared memory, the other gathers words. Run on two ranks."""

from __future__ import annotations

import torch

from partita.runtime.distributed import join_world
from partita.runtime.distributed.collective import Members
from partita.runtime.distributed.messages import Sent

world = join_world()
members = Members(world, (0, 1), Sent(), "test")
members.sum(torch.ones(4), "a sum of both").land()
if world.rank == 0:
    members.sum(torch.ones(4), "a sum of one").land()
else:
    world.gather("", "words of one")
