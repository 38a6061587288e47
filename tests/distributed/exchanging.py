"""What Members hand each other, ranks in ascending and in descending order: ``python -m tests.distributed.exchanging``.

Ranks of one host share memory; of several, all goes over the process group. Rank 0 prints what is wrong.
"""

from __future__ import annotations

import json
import sys

import torch

from partita.runtime.distributed import World, join_world
from partita.runtime.distributed.collective import Members, RankGroup
from partita.runtime.distributed.messages import Sent


def rows(rank: int, count: int) -> torch.Tensor:
    """``count`` numbers that no other rank has."""
    return 100.0 * rank + torch.arange(float(count))


def check(world: World, ranks: tuple[int, ...], sizes: tuple[int, ...]) -> list[str]:
    """``sizes``: of each member's shard, in the order of ``ranks``."""
    members = Members(world, ranks, Sent(), f"test {ranks}")
    here, total = members.position, sum(sizes)
    start = sum(sizes[:here])
    apart = len(set(world.hosts)) > 1
    wrong = [] if (members.arena is None) == apart else [f"hosts {world.hosts}, and shared memory: {not apart}"]
    whole = members.sum(rows(world.rank, total), "a test").land()
    if not torch.equal(whole, sum(rows(r, total) for r in ranks)):  # type: ignore[arg-type]
        wrong.append(f"the sum over {ranks}: {whole.tolist()}")
    shard = members.scatter(rows(world.rank, total), list(sizes), "a test").land()
    if not torch.equal(shard, sum(rows(r, total) for r in ranks)[start : start + sizes[here]]):  # type: ignore[index]
        wrong.append(f"a shard of the sum over {ranks}: {shard.tolist()}")
    out = torch.empty(total)
    found = members.gather(out, rows(world.rank, sizes[here]), list(sizes), "a test").land()
    if not torch.equal(found, torch.cat([rows(r, n) for r, n in zip(ranks, sizes, strict=True)])):
        wrong.append(f"everybody's rows over {ranks}: {found.tolist()}")
    parts = [rows(world.rank, 6 * n).view(n, 6)[:, ::2] for n in sizes]
    each = RankGroup(members).all_to_all(parts, [(sizes[here], 3)] * members.size, 3 * max(sizes))
    for r, part in zip(ranks, each, strict=True):
        if not torch.equal(part, rows(r, 6 * sizes[here]).view(-1, 6)[:, ::2]):
            wrong.append(f"what rank {r} gave, over {ranks}: {part.tolist()}")
    return wrong


def main() -> int:
    world = join_world()
    ascending = tuple(range(world.size))
    cases = [(ranks, sizes) for ranks in (ascending, ascending[::-1]) for sizes in ((2, 5, 3), (4, 4, 4), (3, 0, 1))]
    wrong = [line for ranks, sizes in cases for line in check(world, ranks, sizes[: world.size])]
    every = world.gather(wrong, "what is wrong")
    if world.rank == 0:
        print(json.dumps(every), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
