"""Prices: what it costs a group to hold a tensor otherwise than it came, and to run an op divided.

    from \\ to     Replicate       Copied (its backward)              Shard
    Replicate     -               - (all_reduce)                     own rows (all_gather)
    Partial       all_reduce      all_reduce (all_reduce)            reduce_scatter (all_gather)
    Shard         all_gather      all_gather (reduce_scatter)        same: -; other rows of its dim: all_gather
                                                                     (all_gather); another dim: all_to_all (all_to_all)

Ring collectives over n members: an all_reduce moves 2 (n-1)/n of the bytes, an all_gather or reduce_scatter (n-1)/n
(Patarasuk and Yuan, 2009). Exact for uncontended rings whose latency does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from partita.graph import Graph, Op, Tensor
from partita.sharding.options import Option
from partita.sharding.placements import Copied, Partial, Placement, Replicate, Shard, local_shape

IMPOSSIBLE = float("inf")


@dataclass(frozen=True, slots=True)
class Prices:
    """Of a device and the link between members: flops, bytes of memory and of the link a second; seconds a message."""

    flops: float = 5e10
    memory: float = 1e10
    link: float = 2.5e9
    latency: float = 0.0


def conversion(prices: Prices, members: int, nbytes: int, held: Placement, wanted: Placement, *, grad: bool) -> float:
    """Seconds, forward and backward. ``nbytes``: of the whole tensor."""
    part = (members - 1) / members * nbytes / prices.link
    gather, reduce = prices.latency + part, 2 * (prices.latency + part)
    if held == wanted or isinstance(held, Replicate) and isinstance(wanted, Copied) and not grad:
        return 0.0
    if isinstance(wanted, Partial):
        return IMPOSSIBLE
    back = 1.0 if grad else 0.0
    if isinstance(held, Replicate):
        return back * (reduce if isinstance(wanted, Copied) else gather)
    if isinstance(held, Partial):
        if isinstance(wanted, Shard):
            return gather + back * gather
        return reduce * (1 + back * isinstance(wanted, Copied))
    if isinstance(wanted, Shard):
        apart = isinstance(held, Shard) and wanted.dim != held.dim
        move = prices.latency + part / members if apart else gather
        return move + back * move
    return gather * (1 + back * isinstance(wanted, Copied))


def work(prices: Prices, members: int, graph: Graph, op: Op, option: Option) -> float:
    """Seconds of the slowest member, forward and backward, and of what the op itself sends."""
    share = max(option.share(rank) for rank in range(members))
    batch = max(graph.batch, 1)
    results = [graph.tensor(name) for name in op.outputs if name]
    moved = sum(_held(t, p, batch, members) for t, p in zip(results, option.outputs, strict=False))
    passes = 3.0 if op.grad and any(t.needs_grad for t in results) else 1.0
    seconds = passes * (share * op.flops / prices.flops + moved / prices.memory)
    if option.way == "summed":
        whole = sum(t.nbytes(batch) for t in results)
        seconds += passes * whole / prices.memory  # the product, before it is added up
        scattered = isinstance(option.outputs[0], Shard)  # half of an all_reduce, and the other half in backward
        halves = 1 if scattered and passes == 1 else 2
        seconds += halves * (prices.latency + (members - 1) / members * whole / prices.link)
    return seconds


def keeping(prices: Prices, tensor: Tensor, placement: Placement, members: int) -> float:
    """Seconds a step to hold a parameter: its gradient is written, and read with its state by the optimizer."""
    return 4 * _held(tensor, placement, 1, members) / prices.memory if tensor.needs_grad else 0.0


def _held(tensor: Tensor, placement: Placement, batch: int, members: int) -> float:
    """Bytes of what the first member holds, who has most."""
    if not isinstance(placement, Shard):
        return float(tensor.nbytes(batch))
    whole = tensor.shape_at(batch)[placement.dim]
    cut = local_shape(tensor.shape, placement, 0)[placement.dim]
    mine = cut if isinstance(cut, int) else cut.at(batch)
    return tensor.nbytes(batch) * mine / max(whole, 1)
