"""Exchange: what the devices of a stage hold of weights and state, and what replicas and stages send each other."""

from __future__ import annotations

from dataclasses import dataclass

from partita.cost.communication import Team, all_gather, all_reduce, reduce_scatter
from partita.cost.memory import optimizer_factor
from partita.cost.roofline import Assumptions
from partita.planners.large.degrees import Group
from partita.planners.large.prices import Pool


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes a parameter: of its ``weight``, ``gradient``, and ``optimizer`` (state and master copy)."""

    weight: float
    gradient: float
    optimizer: float

    @staticmethod
    def of(assume: Assumptions, optimizer: str, *, train: bool = True) -> StateBytes:
        """Mixed precision with Adam: 2 + 2 + 12 (master copy, two moments); full: 4 + 4 + 8."""
        if not train:
            return StateBytes(2.0 if assume.precision == "mixed" else 4.0, 0.0, 0.0)
        state = 4.0 * optimizer_factor(optimizer)
        if assume.precision == "mixed":
            return StateBytes(2.0, 2.0, state + 4.0)
        return StateBytes(4.0, 4.0, state)

    def held(self, weights: float, trained: float, replicas: int, zero: int) -> float:
        """Bytes on one of ``replicas`` devices."""
        w = self.weight * weights / (replicas if zero >= 3 else 1)
        g = self.gradient * trained / (replicas if zero >= 2 else 1)
        return w + g + self.optimizer * trained / (replicas if zero >= 1 else 1)


def replica_team(pool: Pool, group: Group) -> Team:
    """The replicas of one shard: neighbours in the node where the degree leaves room."""
    near = max(1, min(group.replicas, pool.per_node // max(group.degree, 1)))
    while group.replicas % near:
        near -= 1
    return Team(near, group.replicas // near, pool.inside, pool.across)


def tail_seconds(
    pool: Pool, group: Group, weights: float, trained: float, state: StateBytes, zero: int, assume: Assumptions
) -> float:
    """After the last microbatch: gradients reduced over the replicas, the optimizer's step, weights gathered."""
    team = replica_team(pool, group)
    nbytes = state.gradient * trained
    reduced = all_reduce(nbytes, team) if zero == 0 else reduce_scatter(nbytes, team) if zero < 3 else 0.0
    gathered = all_gather(state.weight * trained, team) if zero in (1, 2) else 0.0
    share = trained / (group.replicas if zero else 1)
    moved = share * (2.0 * state.optimizer + state.gradient + state.weight)
    return (reduced + gathered) * (1.0 - assume.hidden) + moved / (pool.device.memory_bandwidth * assume.memory)


@dataclass(frozen=True, slots=True)
class Gathers:
    """ZeRO level 3, one unit in one microbatch: seconds to ``gather`` its weights and to ``scatter`` its gradients."""

    gather: float
    scatter: float

    @staticmethod
    def of(pool: Pool, group: Group, weights: float, state: StateBytes) -> Gathers:
        team = replica_team(pool, group)
        return Gathers(all_gather(state.weight * weights, team), reduce_scatter(state.gradient * weights, team))


def send_seconds(pool: Pool, group: Group, nbytes: float, sequence: bool) -> float:
    """One way to the next stage: each device of a shard sends its part and the parts are joined over the node's links
    (Narayanan et al., 2021, section 4.1)."""
    near = group.degree * group.replicas < pool.per_node
    link = pool.inside if near else pool.across
    part = nbytes if sequence else nbytes / group.degree
    joined = 0.0
    if group.degree > 1 and not sequence:
        joined = all_gather(nbytes, Team(min(group.degree, pool.per_node), 1, pool.inside, pool.across))
    return link.seconds(part) + joined


def together(compute: float, collective: float, lost: float) -> float:
    """Seconds of work and a collective side by side: the longer one, and the ``lost`` share of their common time."""
    return max(compute, collective) + lost * min(compute, collective)
