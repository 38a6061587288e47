"""Auto: from a graph and a cluster to the best plan: search in closed form, then rank the winners by simulation.

task ─▶ searching: single devices ─┐
    ├─▶ searching: teams, ZeRO ────┤
    └─▶ searching: lent parameters ┴─▶ pricing: simulated, ranked together ─▶ plan, words
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from partita.cluster import Cluster
from partita.cost.measured import Measured
from partita.cost.memory import optimizer_factor
from partita.cost.table import cost_table
from partita.errors import PlanError, UsageError
from partita.graph import Graph
from partita.plan import Plan, Predicted
from partita.plan_text import explain_later
from partita.planners.build import Built
from partita.planners.conflicts import atoms, smallest_conflict
from partita.planners.constraints import Constraints
from partita.planners.objective import candidate_bytes
from partita.planners.pricing import WORTH, Ranked, best_first, finished, price, rank, slowest_op
from partita.planners.problem import Candidate, Infeasible, Optimal
from partita.planners.remedies import loosened
from partita.planners.resolved import Resolved
from partita.planners.searching import (
    QUICK_OPS,
    Searched,
    Widened,
    beside,
    closed,
    fitting,
    lending,
    search,
    variants,
    widen,
)
from partita.planners.task import Task, Variant
from partita.planners.whatif import later_reasons
from partita.planners.words import reasons, why_not
from partita.sharding.batch import BatchLayouts, layouts
from partita.units import format_seconds

ATTEMPTS = 4
WIDE_PLANS = 2  # plans with teams or ZeRO that are simulated
TOGETHER = (
    "single ops are not divided: threads of one process meet too slowly for that to pay, so it is done only where "
    "nothing else fits, or when asked for"
)


def auto(
    graph: Graph,
    batch_layouts: BatchLayouts,
    cluster: Cluster,
    *,
    optimizer: str = "adamw",
    constraints: Constraints | Mapping[str, Any] | None = None,
    objective: str = "train",
    batch: int = 0,
    measured: Measured | None = None,
    batch_norm: str = "exact",
    sync_batch_norm: bool = False,
    processes: bool = False,
) -> Plan:
    """The fastest plan that fits, with its reasons.

    ``objective``: 'train' or 'inference'. ``batch``: samples a step (0: the graph's). ``measured``: timings that
    replace the analytic model. ``sync_batch_norm``: the runtime can run as many replicas as microbatches with common
    statistics. ``processes``: each device is a process of its own, so that replicas share no parameters and ZeRO may
    divide them. Raises InfeasibleError with the nearest remedies, PlanError for
    constraints that contradict each other, UsageError for names that mean nothing.
    """
    if objective not in ("train", "inference"):
        raise UsageError(f"objective {objective!r} is not known; take 'train' or 'inference'")
    optimizer_factor(optimizer)
    if not graph.ops:
        raise PlanError("the model runs no ops for these inputs: there is nothing to divide")
    if not cluster.devices:
        raise PlanError("the cluster has no devices")
    wanted = Constraints.read(constraints)
    if wanted.for_clusters:
        raise UsageError(
            f"constraints {', '.join(wanted.for_clusters)} are for described clusters (partita plan --cluster) only"
        )
    synced = batch_layouts
    if sync_batch_norm and batch_layouts.couplings:
        synced = layouts(graph, batch_norm="per_microbatch")
    task = Task(
        graph, batch_layouts, synced, cluster, cost_table(graph, cluster, measured=measured), optimizer,
        Constraints(), Resolved(), batch or graph.batch, batch_norm,
        objective == "train" and any(t.needs_grad for t in graph.of_role("parameter", "input")), processes,
    )  # fmt: skip
    return Planner(task).constrained(wanted).plan()


@dataclass(eq=False)
class Planner:
    """A task, and what remedies and explanations ask about tasks like it."""

    task: Task
    alone: list[Built] = field(default_factory=list)
    teams: list[Variant] | None = None

    @property
    def cluster(self) -> Cluster:
        return self.task.cluster

    @property
    def batch(self) -> int:
        return self.task.batch

    @property
    def optimizer(self) -> str:
        return self.task.optimizer

    @property
    def constraints(self) -> Constraints:
        return self.task.constraints

    @property
    def train(self) -> bool:
        return self.task.train

    @property
    def processes(self) -> bool:
        return self.task.processes

    def constrained(self, wanted: Constraints) -> Planner:
        """The same request with these constraints. Raises PlanError where they contradict each other, with the smallest
        set that does and what works instead."""
        try:
            return self.again(constraints=wanted)
        except PlanError as error:
            asked = Planner(replace(self.task, constraints=wanted))
            guilty = smallest_conflict(atoms(wanted), self._resolves)
            words = ", ".join(map(str, guilty))
            line = f"smallest conflicting set: {words}" if len(guilty) > 1 else f"{words} cannot be met by itself"
            raise PlanError(
                "the constraints cannot be met", (*error.problems, line), tuple(loosened(asked, guilty))
            ) from None

    def _resolves(self, constraints: Constraints) -> bool:
        try:
            self.again(constraints=constraints)
        except PlanError:
            return False
        return True

    # -- the plan --------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The fastest plan that fits. Raises InfeasibleError."""
        task = self.task
        found: Searched | None = None
        ranked: list[Ranked] = []
        gap = 0.0
        if not self.only_divided:
            found = search(task)
            if not isinstance(found.outcome, Infeasible):
                gap = found.gap
                ranked, _ = rank(task, (*found.nearly, *((found.built, c) for c in beside(task, found))))
                if ranked and (ranked[0].built, ranked[0].candidate) in found.nearly:
                    gap = found.gap_of(ranked[0].candidate)
        as_found = bool(ranked)
        ranked = ranked or [*filter(None, [self._attempt(self._alone())])]
        ranked, words = self._widened(found, ranked)
        ranked = ranked or [*filter(None, [self._attempt([*self._teams()])])]
        if not as_found and ranked and found is not None and not isinstance(found.outcome, Infeasible):
            gap = found.gap_of(ranked[0].candidate)
        free = task.shared_seconds
        if found is not None and not isinstance(found.outcome, Infeasible):
            free = max(free, found.outcome.best.seconds / (1.0 + found.gap))
        held = bool(ranked)
        ranked, said, left = self._lent(free, ranked)
        if not ranked:
            raise self._why_not(found)
        best = ranked[0]
        if best.lends:
            gap = max(0.0, best.candidate.seconds / free - 1.0) if held else left
        proven = found is not None and isinstance(found.outcome, Optimal) and gap == 0.0 and best.built is found.built
        plan = finished(task, best)
        plan = replace(
            plan,
            status="optimal" if proven else "feasible",
            gap=gap,
            predicted=Predicted(best.seconds, best.bottleneck, best.memory, task.one_device_seconds),
            reasons=(*reasons(task, ranked, gap, [line for line in (words, said) if line]), *plan.reasons),
        )
        return explain_later(plan, lambda: later_reasons(self, best.built, best.candidate, best.seconds, gap))

    @property
    def only_divided(self) -> bool:
        """Whether plans of whole ops are not asked for."""
        return self.constraints.tensor > 1 or bool(self.constraints.shard)

    def _widened(self, found: Searched | None, ranked: list[Ranked]) -> tuple[list[Ranked], str]:
        """With plans of divided ops or state, where they may win; and what came of it in words."""
        task = self.task
        if not self.can_widen:
            return ranked, ""
        hand = float("inf")
        if ranked and task.one_memory:
            return ranked, TOGETHER
        if ranked and found is not None and not isinstance(found.outcome, Infeasible):
            hand = min(r.candidate.seconds for r in ranked)
            possible = ranked[0].seconds / task.shared_seconds - 1.0
            if ranked[0].seconds * WORTH <= task.shared_seconds:
                return ranked, f"single ops are not divided: no plan could be more than {possible:.1%} faster than this"
            hand *= WORTH
        wide = widen(task, hand)
        more, _ = rank(task, wide.found[:WIDE_PLANS])
        return best_first([*ranked, *more]), self._said(wide, more, ranked)

    def _lent(self, free: float, ranked: list[Ranked]) -> tuple[list[Ranked], str, float]:
        """With plans that keep parameters in host memory, where nothing else fits or they may win; what came of it in
        words, and how much faster the best possible may be than the first of them. ``free``: no plan is faster."""
        if not self._lends:
            return ranked, "", 0.0
        hand = WORTH * min((r.candidate.seconds for r in ranked), default=float("inf"))
        if hand <= free:
            return ranked, "", 0.0
        listed, gap = lending(self.task, hand)
        more, _ = rank(self.task, listed[:WIDE_PLANS])
        if not ranked:
            more = more or [*filter(None, [self._attempt([self.task.lending()], lends=True)])]
            if listed and more:
                gap = max(0.0, (1.0 + gap) * more[0].candidate.seconds / listed[0][1].seconds - 1.0)
            return more, "nothing fits with all parameters on the devices" if more else "", gap
        what = "plans with parameters in host memory were searched too"
        best = next((r for r in more if r.lends), None)
        if best is None:
            return (
                best_first([*ranked, *more]),
                f"{what}: with the optimizer's time there none takes {WORTH:.0%} of the time",
                0.0,
            )
        taken, left = format_seconds(best.seconds + best.update), format_seconds(ranked[0].seconds)
        ending = f"the best takes {taken} a step with the optimizer's time there, the best without {left}"
        return best_first([*ranked, *more]), f"{what}: {ending}", gap

    @property
    def can_widen(self) -> bool:
        """Whether there may be teams, or ZeRO."""
        if self.constraints.lent:
            return False
        teams = len(self.cluster.devices) > 1 and self.constraints.tensor != 1
        return teams or (self.processes and self.train and self.constraints.zero < 0)

    def _said(self, wide: Widened, more: list[Ranked], whole: list[Ranked]) -> str:
        if not wide.tried or self.only_divided:
            return ""
        what = f"plans that divide ops or state ({wide.tried} ways) were searched too"
        if not whole:
            return f"{what}, as no plan of whole ops fits"
        if not more:
            return f"{what}: none takes {WORTH:.0%} of the time"
        taken, left = (format_seconds(r[0].seconds) for r in (more, whole))
        return f"{what}: the best takes {taken} a step, the best without {left}"

    def _why_not(self, found: Searched | None) -> Exception:
        if found is None:
            parts = self._quick()
            built = next(parts, None) or self.task.coarse()
            reason = "no division of the model fits the devices' memory"
        else:
            built = found.built
            simulated = "every plan found exceeds a device's memory when simulated"
            reason = found.outcome.reason if isinstance(found.outcome, Infeasible) else simulated
        problem = self.task.lending().problem if self._lends else built.problem
        return why_not(self.task, self, problem, reason)

    # -- what explanations ask -------------------------------------------------------------------------------------

    def price(self, built: Built, candidate: Candidate) -> Ranked | None:
        """The candidate as simulated."""
        return price(self.task, built, candidate)

    def slowest_op(self, built: Built, candidate: Candidate, stage: int) -> tuple[str, float]:
        return slowest_op(self.task, built, candidate, stage)

    def elsewhere(self, cluster: Cluster) -> Plan:
        """The plan of the same request for another cluster."""
        return self.again(cluster=cluster).plan()

    def all_on_devices(self) -> Ranked | None:
        """The best plan that keeps no parameters in host memory; None where there is none."""
        return self.again(constraints=replace(self.constraints, offload_parameters=False)).attempt()

    def otherwise(self, divided: bool) -> Ranked | None:
        """The best plan that divides ops, or that does not; None where there is none."""
        if divided:
            found = widen(self.task, float("inf"), teams=True).found[:1] if self.can_widen else ()
            return next(iter(rank(self.task, found)[0]), None)
        if self.only_divided:
            return None
        return self.again(constraints=replace(self.constraints, tensor=1)).attempt()

    # -- what remedies ask -----------------------------------------------------------------------------------------

    def again(
        self, *, cluster: Cluster | None = None, batch: int = 0, optimizer: str = "",
        constraints: Constraints | None = None,
    ) -> Planner:  # fmt: skip
        """The same request with something changed."""
        task = self.task.again(cluster=cluster, batch=batch, optimizer=optimizer, constraints=constraints)
        return Planner(task, self.alone, self.teams) if self.task.alike(task) else Planner(task)

    def feasible(self) -> bool:
        """Whether the closed form knows a plan that fits."""
        if not self.task.may_fit:
            return False
        whole = bool(self.task.resolved.lent) or self.task.holds_all
        if whole and any(fitting(self.task, built) for built in self._quick()):
            return True
        return self._lends and fitting(self.task, self.task.lending(), lends=True)

    @property
    def _lends(self) -> bool:
        return self.task.may_lend and not self.only_divided

    def attempt(self) -> Ranked | None:
        """A plan as simulated, or None; for a large graph the best one of whole modules.

        Where simulation finds more memory than the closed form, plans for as much less are looked for.
        """
        if not self.task.may_fit:
            return None
        found = self._attempt(self._alone()) or self._attempt([*self._teams()])
        return found or (self._attempt([self.task.lending()], lends=True) if self._lends else None)

    def _attempt(self, parts: list[Built], *, lends: bool = False) -> Ranked | None:
        room, fits_in = 1.0, 0.0
        for _ in range(ATTEMPTS):
            answers = [(built, *closed(self.task, built, room, lends=lends)) for built in parts]
            fitting = [(b, p, o.best) for b, p, o in answers if not isinstance(o, Infeasible)]
            fitting.sort(key=lambda answer: answer[2].seconds)
            found: list[Ranked] = []
            for built, problem, best in fitting[:WIDE_PLANS]:
                ranked, overshoot = rank(self.task, [(built, best)])
                found += ranked
                need = candidate_bytes(problem, best)
                filled = [n / problem.pools[s.pool].memory_bytes for n, s in zip(need, best.stages, strict=True)]
                fits_in = max(fits_in, room * max(filled) / max(overshoot, 1.0))
            if found:
                return best_first(found)[0]
            if not fits_in:
                break
            room, fits_in = min(fits_in, 0.98 * room), 0.0
        return None

    def _quick(self) -> Iterator[Built]:
        yield from self._alone()
        yield from self._teams()

    def _alone(self) -> list[Built]:
        """What is divided first: whole modules, and the finest parts where the graph is small."""
        if not self.alone and not self.only_divided:
            fine = [self.task.build()] if len(self.task.graph.ops) <= QUICK_OPS else []
            self.alone += [*fine, self.task.coarse()]
        return self.alone

    def _teams(self) -> Iterator[Built]:
        """Then: teams and ZeRO, those that fit when all is perfectly shared."""
        if self.teams is None:
            self.teams = [*variants(self.task)] if self.can_widen else []
        for variant in self.teams:
            if fitting(self.task, variant.relaxed):
                yield variant.exact()
