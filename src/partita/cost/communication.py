"""Communication: seconds of collectives over alpha-beta links, in rings, trees and over nodes.

    a message          latency + bytes / bandwidth                                   (Hockney, 1994)
    ring all_reduce    2 (n-1) latency + 2 (n-1)/n bytes / bandwidth                 (Patarasuk and Yuan, 2009)
    tree all_reduce    2 ceil(log2 n) latency + 2 bytes / bandwidth                  (Sanders et al., 2009: two trees)
    over nodes         reduce_scatter inside, all_reduce of a share across, all_gather inside

The faster algorithm is taken, as NCCL does. Exact for uncontended rings; every device has its own share of its node's
network, so groups that run side by side do not slow each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf, log2

from partita.cluster import Cluster

BUCKET_BYTES = 1 << 21
LARGE_BYTES = 1 << 18
MOST_BYTES, FEWEST_PARTS = 1 << 23, 8
IN_FLIGHT = 2
"""Gradients of at least ``LARGE_BYTES`` are sent alone, smaller ones together up to a bucket; over a link with a long
delay larger ones too, up to ``MOST_BYTES`` and to one of ``FEWEST_PARTS`` of all, so that most is on its way before the
last is there. A process group of Gloo has so many sums in flight at a time."""

FIRST_WINDOW_BYTES = 10 * 1448
REST_SECONDS = 0.2
"""What a TCP connection that rested so long sends in its first round trip, and doubles in each (RFC 6928; RFC 5681,
section 4.1; RFC 6298 with Linux's least timeout)."""


@dataclass(frozen=True, slots=True)
class Channel:
    """One device's link in one direction: bytes per second that collectives reach, seconds a hop; ``host``: bytes per
    second that its own cores hand over or take, where they do; ``word``: seconds until a sender that must not send
    before knows that the other is ready to take."""

    bandwidth: float
    latency: float = 0.0
    host: float = inf
    word: float = 0.0

    @property
    def hop(self) -> float:
        """Seconds of a hop without the bytes."""
        return self.word + self.latency

    def seconds(self, nbytes: float) -> float:
        """One message."""
        return self.latency + nbytes / self.bandwidth if nbytes else 0.0


def ring(cluster: Cluster, members: Sequence[str]) -> Channel:
    """The slowest link of the ring in this order: in time every hop waits for it. Over sockets (Gloo) each begins with
    a word that the other is ready, which messages of a pipeline, whose receives are posted ahead, do not wait for."""
    links = [cluster.link(a, b) for a, b in zip(members, (*members[1:], members[0]), strict=True)]
    return Channel(
        min((k.bandwidth for k in links), default=inf),
        max((k.message_seconds for k in links), default=0.0),
        min((k.host_bandwidth for k in links), default=inf),
        max((k.latency_seconds for k in links if k.host_bandwidth < inf), default=0.0),
    )


def large_bytes(channel: Channel, total: float) -> int:
    """From which size on a gradient, of ``total`` bytes of them, is worth a message of its own: as much as the link
    carries while a word goes there and back."""
    return int(max(LARGE_BYTES, min(_there_and_back(channel), MOST_BYTES, total / FEWEST_PARTS)))


def _there_and_back(channel: Channel) -> float:
    """Bytes that the link carries while a word goes there and back."""
    return 2 * channel.latency * channel.bandwidth if channel.latency else 0.0


def opening_seconds(channel: Channel) -> float:
    """What the first message after a rest takes longer, where sockets carry it: their window opens from round trip to
    round trip, and what went meanwhile would have taken one at full speed."""
    full = _there_and_back(channel)
    if channel.host == inf or full <= 2 * FIRST_WINDOW_BYTES:
        return 0.0
    return 2 * channel.latency * (log2(full / FIRST_WINDOW_BYTES) - 1)


def buckets(sizes: Iterable[int], large: int = LARGE_BYTES) -> tuple[int, ...]:
    """Bytes of each message that carries gradients of these sizes, in order; the last also says which there are.
    ``large``: what goes alone."""
    found: list[int] = []
    small = 0
    for size in sizes:
        if size >= large:
            found.append(size)
        elif small + size > max(BUCKET_BYTES, large):
            found.append(small)
            small = size
        else:
            small += size
    return (*found, small)


@dataclass(frozen=True, slots=True)
class Team:
    """Devices of one collective: ``nodes`` nodes with ``per_node`` of them each; ``inside`` and ``across`` nodes."""

    per_node: int
    nodes: int
    inside: Channel
    across: Channel

    @property
    def size(self) -> int:
        return self.per_node * self.nodes


def ring_all_reduce(nbytes: float, n: int, channel: Channel) -> float:
    return 2 * (n - 1) * (channel.hop + nbytes / n / channel.bandwidth) if n > 1 else 0.0


def ring_host_seconds(nbytes: float, n: int, channel: Channel) -> float:
    """What an all_reduce in a ring takes of each member's own cores, which send and take 2 (n-1)/n of it."""
    return 4 * (n - 1) / n * nbytes / channel.host


def tree_all_reduce(nbytes: float, n: int, channel: Channel) -> float:
    return 2 * (ceil(log2(n)) * channel.hop + nbytes / channel.bandwidth) if n > 1 else 0.0


def ring_all_gather(nbytes: float, n: int, channel: Channel) -> float:
    """``nbytes``: of the whole result. A reduce_scatter of as many bytes takes as long."""
    return (n - 1) * (channel.hop + nbytes / n / channel.bandwidth) if n > 1 else 0.0


def pairwise_all_to_all(nbytes: float, n: int, channel: Channel) -> float:
    """``nbytes``: of the whole tensor over all devices; each sends its n-th, less what it keeps."""
    return (n - 1) * (channel.hop + nbytes / n / n / channel.bandwidth) if n > 1 else 0.0


def all_reduce(nbytes: float, team: Team) -> float:
    """Seconds until every device holds the sum of ``nbytes`` from each."""
    if not nbytes or team.size < 2:
        return 0.0
    if team.nodes == 1:
        n = team.per_node
        return min(ring_all_reduce(nbytes, n, team.inside), tree_all_reduce(nbytes, n, team.inside))
    inside = 2 * ring_all_gather(nbytes, team.per_node, team.inside)
    share = nbytes / team.per_node
    n = team.nodes
    return inside + min(ring_all_reduce(share, n, team.across), tree_all_reduce(share, n, team.across))


def all_gather(nbytes: float, team: Team) -> float:
    """``nbytes``: of the whole result."""
    if not nbytes or team.size < 2:
        return 0.0
    share = nbytes / team.per_node
    across = ring_all_gather(share, team.nodes, team.across)
    return across + ring_all_gather(nbytes, team.per_node, team.inside)


def reduce_scatter(nbytes: float, team: Team) -> float:
    """``nbytes``: of the whole summand on each device."""
    return all_gather(nbytes, team)


def all_to_all(nbytes: float, team: Team) -> float:
    """``nbytes``: of the whole tensor over all devices. Every pair exchanges directly; nodes' shares go across."""
    if not nbytes or team.size < 2:
        return 0.0
    if team.nodes == 1:
        return pairwise_all_to_all(nbytes, team.per_node, team.inside)
    mine = nbytes / team.size
    apart = mine * (team.nodes - 1) / team.nodes
    near = mine * (team.per_node - 1) / team.size
    return max(
        (team.size - team.per_node) * team.across.hop + apart / team.across.bandwidth,
        (team.per_node - 1) * team.inside.hop + near / team.inside.bandwidth,
    )


COLLECTIVES = {
    "all_reduce": all_reduce,
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
    "all_to_all": all_to_all,
}
