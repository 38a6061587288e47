"""Task: one request to the planner (graph, cluster, limits) and the numeric problems that it comes to.

Requests that differ in one thing share what does not depend on it: ``again`` is how remedies and explanations ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from partita.cluster import Cluster
from partita.cost.blocks import Block, blocks, legal_cuts
from partita.cost.communication import Channel, ring
from partita.cost.memory import optimizer_factor, shares_memory
from partita.cost.table import CostTable
from partita.errors import PlanError
from partita.graph import Graph
from partita.planners.build import Built, Counted, build, count, regrouped, usable_bytes
from partita.planners.constraints import Constraints
from partita.planners.divided import Divider
from partita.planners.objective import copies_bytes, lent_gains
from partita.planners.problem import Problem
from partita.planners.resolved import Resolved, resolve
from partita.planners.teams import Teaming, teams_of
from partita.sharding.batch import BatchLayouts

RECOMPUTE_UNITS = (64, 32, 16, 8, 4)
MODULES = 600  # ops: larger graphs get their units of recomputation in one size
EVERY_TEAMING = 4  # devices up to which teams of different sizes are tried beside each other


@dataclass(slots=True, eq=False)
class Variant:
    """A problem with teams or ZeRO, priced when it is asked for. ``relaxed``: the same with work and memory perfectly
    shared, so that every plan is as fast there, or faster, and holds as much, or less.
    """

    relaxed: Built
    price: Callable[[], Built] | None = None
    known: Built | None = None

    def exact(self) -> Built:
        if self.known is None:
            self.known = self.price() if self.price is not None else self.relaxed
        return self.known

    def problem(self) -> Problem:
        """Of ``exact``."""
        return self.exact().problem

    def levelled(self, level: int) -> Variant:
        """Under this level of ZeRO."""
        relaxed = _levelled(self.relaxed, level)
        return Variant(relaxed, None if self.price is None else lambda: _levelled(self.exact(), level))


def _levelled(built: Built, level: int) -> Built:
    return replace(built, problem=replace(built.problem, zero=level))


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """``synced``: the layouts where replicas take batch statistics together. ``processes``: one a device, which share
    no parameters. ``parts``, ``counts``, ``dividers``: what was worked out before, for all tasks that came from one;
    ``made``: for this one.
    """

    graph: Graph
    layouts: BatchLayouts
    synced: BatchLayouts
    cluster: Cluster
    table: CostTable
    optimizer: str
    constraints: Constraints
    resolved: Resolved
    batch: int
    batch_norm: str
    train: bool
    processes: bool
    parts: dict[tuple[int, ...], tuple[Block, ...]] = field(default_factory=dict)
    counts: dict[tuple[Block, ...], Counted] = field(default_factory=dict)
    dividers: dict[tuple[object, ...], Divider] = field(default_factory=dict)
    made: dict[int, Built] = field(default_factory=dict)

    @property
    def sync(self) -> bool:
        return bool(self.layouts.couplings) and not self.synced.couplings

    @property
    def one_memory(self) -> bool:
        """Whether the devices are groups of cores of one process."""
        return not self.processes and all(shares_memory(d.name) for d in self.cluster.devices)

    @property
    def name(self) -> str:
        return self.graph.name or "the model"

    def again(
        self, *, cluster: Cluster | None = None, batch: int = 0, optimizer: str = "",
        constraints: Constraints | None = None,
    ) -> Task:  # fmt: skip
        """The same with something changed. Raises PlanError where the constraints then contradict each other."""
        other = replace(
            self, cluster=cluster or self.cluster, batch=batch or self.batch, optimizer=optimizer or self.optimizer,
            constraints=self.constraints if constraints is None else constraints, made={},
        )  # fmt: skip
        if other.constraints.zero > 0:
            other = replace(other, processes=True, made={})
        return replace(other, resolved=other.resolve(), made={}) if not self.alike(other) else other

    def alike(self, other: Task) -> bool:
        """Whether the two have the same problems but for memory limits and the optimizer's state."""
        names = [(d.name, d.host_bandwidth) for d in self.cluster.devices]
        same = (
            names == [(d.name, d.host_bandwidth) for d in other.cluster.devices]
            and self.cluster.links == other.cluster.links
        )
        same = same and self.constraints == other.constraints and self.processes == other.processes
        return same and self.batch == other.batch

    def resolve(self) -> Resolved:
        """The constraints as ops and devices. Raises PlanError naming every contradiction."""
        resolved = resolve(self.graph, self.cluster, self.constraints)
        legal = legal_cuts(self.graph) if resolved.starts else ()
        problems = [
            f"split_before {name!r}: an op after it changes in place what an op before it made; split before or after "
            "both"
            for name, start in resolved.starts
            if not legal[start]
        ]
        if resolved.lent and self.processes:
            problems.append(
                "offload_parameters is for devices of one process: a rank keeps what it holds; zero 3 divides it"
            )
        asked = max(self.constraints.microbatches, self.constraints.num_replicas)
        if asked > max(self.batch, 1):
            problems.append(f"{asked} microbatches or replicas need as many samples; the batch has {self.batch}")
        elif asked > 1 and not self.layouts.microbatchable:
            problems.append("the model's batch cannot be cut, so there is one microbatch and no replica")
        if problems:
            raise PlanError("the constraints cannot be met", tuple(problems))
        return resolved

    # -- problems --------------------------------------------------------------------------------------------------

    def build(self, *, coarse: int = 0) -> Built:
        """The problem of single devices, in the finest parts there are or in ``coarse`` parts that are modules."""
        if coarse not in self.made:
            parts = self._parts(coarse)
            if parts not in self.counts:
                self.counts[parts] = count(self.graph, self.layouts, self.table, parts)
            self.made[coarse] = build(
                self.graph, self.layouts, self.cluster, self.table, parts, batch=self.batch,
                optimizer=self.optimizer, train=self.train, constraints=self.constraints, resolved=self.resolved,
                sync=self.sync, processes=self.processes, lends=self.may_lend, counted=self.counts[parts],
            )  # fmt: skip
        return self.made[coarse]

    def coarse(self) -> Built:
        """Parts that are modules, as large as serves recomputation best: least kept together with the largest alive."""
        return self._of_modules(least_alive)

    def lending(self) -> Built:
        """Parts that are modules, as large as serves lending their parameters best."""
        return self._of_modules(least_lent)

    def _of_modules(self, least: Callable[[Problem], float]) -> Built:
        """Parts that are modules, of the size at which ``least`` bytes are needed."""
        sizes = RECOMPUTE_UNITS if len(self.graph.ops) <= MODULES else RECOMPUTE_UNITS[:1]
        return min((self.build(coarse=n) for n in sizes), key=lambda built: least(built.problem))

    def divided(self, *, coarse: int = 0) -> Iterator[Variant]:
        """The problem for each way to make teams that divide their ops.

        Left open, there are none where a person said how many devices a stage has, and none with a device that modules
        were placed on.
        """
        wanted = self.constraints
        if wanted.tensor == 1 or (not wanted.tensor and not wanted.shard and wanted.num_replicas):
            return
        every = len(self.cluster.devices) <= EVERY_TEAMING
        alone = {device for _, device in wanted.place} if not wanted.tensor else set()
        found = teams_of(
            self.cluster, degree=wanted.tensor, within_node=bool(wanted.tp_within_node), every=every, alone=alone
        )
        for teaming in found:
            place = tuple((glob, teaming.leader(device)) for glob, device in wanted.place)
            inner = replace(wanted, place=place, tensor=0, shard=(), tp_within_node=None)
            try:
                resolved = resolve(self.graph, teaming.cluster, inner)
            except PlanError:
                continue  # so few teams cannot meet the constraints
            alone_built = self.build(coarse=coarse)
            grouped = regrouped(
                alone_built, self.cluster, teaming.cluster, constraints=inner, resolved=resolved,
                processes=self.processes,
            )  # fmt: skip
            yield self._teamed(grouped, teaming)

    def _teamed(self, built: Built, teaming: Teaming) -> Variant:
        sizes = {leader: len(team) for leader, team in teaming.teams.items()}
        pools = tuple(replace(p, members=sizes.get(p.devices[0], 1)) for p in built.problem.pools)
        built = replace(built, problem=replace(built.problem, pools=pools), teams=teaming.teams)
        channel, divider = self._channel(teaming), self.divider
        least = tuple(divider.least(built, degree) for degree in teaming.degrees)

        def exact() -> Built:
            shares = tuple(divider.shares(built, degree, channel) for degree in teaming.degrees)
            return replace(built, problem=replace(built.problem, shares=shares))

        return Variant(replace(built, problem=replace(built.problem, shares=least)), exact)

    def _channel(self, teaming: Teaming) -> Channel:
        """The slowest ring of all teams."""
        rings = [ring(self.cluster, team) for team in teaming.teams.values()]
        return Channel(min(r.bandwidth for r in rings), max(r.latency for r in rings), word=max(r.word for r in rings))

    @property
    def divider(self) -> Divider:
        """What divides blocks for this task."""
        kinds = tuple((d.name, d.kind, d.flops) for d in self.cluster.devices)
        key = (self.batch, self.constraints.shard, self.train, kinds)
        if key not in self.dividers:
            self.dividers[key] = Divider(
                self.graph, self.layouts, self.table, self.cluster, self.batch, self.optimizer, self.train,
                self.constraints.shard,
            )  # fmt: skip
        return self.dividers[key]

    def _parts(self, coarse: int) -> tuple[Block, ...]:
        resolved = self.resolved
        also = [start for _, start in resolved.starts]
        also += [
            i
            for _, ops in (*resolved.together, *resolved.recompute, *resolved.offload, *resolved.lent)
            for i in (min(ops), max(ops) + 1)
        ]
        marks = dict(resolved.place)
        also += [i for i in range(1, len(self.graph.ops)) if marks.get(i) != marks.get(i - 1)]
        key = (coarse, *sorted(set(also)))
        if key not in self.parts:
            how: dict[str, Any] = {"limit": coarse, "exact": 0, "chunks": False} if coarse else {}
            self.parts[key] = tuple(blocks(self.graph, also=also, **how))
        return self.parts[key]

    # -- bytes and seconds -----------------------------------------------------------------------------------------

    @property
    def may_lend(self) -> bool:
        """Whether the planner may choose that parameters live in host memory: of devices of one process, each with all
        of its stage's parameters."""
        wanted = self.constraints
        open_ = wanted.offload_parameters is not False and wanted.zero <= 0 and wanted.tensor < 2 and not wanted.shard
        return open_ and not self.processes and any(d.host_bandwidth for d in self.cluster.devices)

    @property
    def may_fit(self) -> bool:
        """Whether the devices together hold every parameter, gradient and optimizer state once, or hosts may."""
        return self.may_lend or bool(self.resolved.lent) or self.holds_all

    @property
    def holds_all(self) -> bool:
        """Whether the devices together hold every parameter, gradient and optimizer state once."""
        limit = sum(usable_bytes(d, processes=self.processes) for d in self.cluster.devices)
        factor = 1 + optimizer_factor(self.optimizer) if self.train else 0
        least = 0.0
        for tensor in self.graph.of_role("parameter"):
            if tensor.name in self.table.users:
                least += tensor.nbytes(1) * (1 + (factor if tensor.needs_grad else 0))
        return least <= limit

    def seconds_of(self, kind: str) -> tuple[float, float]:
        """Of all ops on one device of the kind: fixed, and for each sample."""
        rows = self.table.forward[kind] + (self.table.backward[kind] + self.table.weight[kind] if self.train else 0.0)
        return float(rows[:, 0].sum()), float(rows[:, 1].sum())

    @property
    def one_device_seconds(self) -> float:
        fixed, per_sample = self.seconds_of(self.cluster.devices[0].kind)
        return fixed + per_sample * self.batch

    @property
    def shared_seconds(self) -> float:
        """No plan is faster, by the counts: all work perfectly shared by all devices."""
        lines = [self.seconds_of(d.kind) for d in self.cluster.devices]
        return 1.0 / sum(1.0 / max(fixed + per_sample * self.batch, 1e-30) for fixed, per_sample in lines)


def least_lent(problem: Problem) -> float:
    """Bytes of everything that stays and of activations of one sample, were all lent, and recomputed, that may be."""
    may = list(problem.may_lend)
    total = sum(w.nbytes + (1.0 + problem.optimizer_factor) * w.trained for w in problem.weights if not w.given)
    sizes = problem.lendable[may, 0]
    copies = float(copies_bytes(sizes.sum(), sizes.max())) if may else 0.0
    return total - float(lent_gains(problem)[may].sum()) + copies + least_alive(problem)


def least_alive(problem: Problem) -> float:
    """Bytes of activations of one microbatch of one sample, were everything recomputed that may be, or offloaded."""
    saved, kept = problem.single.saved.sum(axis=1), problem.single.kept.sum(axis=1)
    may = list(problem.may_recompute)
    largest = float(saved[may].max()) if may else 0.0
    least = float(saved.sum() - (saved - kept)[may].sum()) + largest
    if not problem.may_offload:
        return least
    gone = problem.single.gone_at(1)[list(problem.may_offload)]
    return min(least, float(saved.sum() - gone.sum() + 2.0 * gone.max()))
