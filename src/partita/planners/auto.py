"""Auto: from a graph and a cluster to the best plan: search in closed form, then rank the winners by simulation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from partita.cluster import Cluster
from partita.cost.blocks import Block, blocks, legal_cuts
from partita.cost.measured import Measured
from partita.cost.memory import optimizer_factor
from partita.cost.table import CostTable, cost_table, segment_costs
from partita.errors import InfeasibleError, PlanError, UsageError
from partita.graph import Graph
from partita.lower import lower
from partita.manual import stage_names
from partita.plan import Batch, Plan, Predicted, Stage
from partita.plan_text import counted, explain_later
from partita.planners.build import HEADROOM, Built, build
from partita.planners.conflicts import atoms, smallest_conflict
from partita.planners.constraints import Constraints, Resolved, resolve
from partita.planners.explain import binding_reasons, cut_reasons, later_reasons, other_reasons, shortage
from partita.planners.objective import candidate_bytes, fits
from partita.planners.problem import Candidate, Infeasible, Optimal, Outcome, Pool, Problem, StageChoice
from partita.planners.remedies import conflict, loosened, remedies
from partita.planners.stages import stages
from partita.planners.tensor import with_tensor
from partita.sharding.batch import BatchLayouts, layouts
from partita.simulate import simulate
from partita.units import format_bytes, format_seconds

RANK_SECONDS = 0.45
RECOMPUTE_UNITS = (64, 32, 16, 8, 4)
IDEALS_BLOCKS = 40
QUICK_OPS = 200
ATTEMPTS = 4
EXACT_BLOCKS = 120
SLACK = 0.002
TIGHT_SLACK = 0.01


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate as a plan, with what simulation says of it."""

    plan: Plan
    candidate: Candidate
    seconds: float
    memory: tuple[tuple[str, int], ...]
    bottleneck: str
    over: tuple[str, float] = ("", 0.0)


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
) -> Plan:
    """The fastest plan that fits, with its reasons.

    ``objective``: 'train' or 'inference'. ``batch``: samples a step (0: the graph's). ``measured``: timings that
    replace the analytic model. ``sync_batch_norm``: the runtime can run as many replicas as microbatches with common
    statistics. Raises InfeasibleError with the nearest remedies, PlanError for
    constraints that contradict each other, UsageError for names that mean nothing.
    """
    wanted = Constraints.read(constraints)
    if wanted.for_clusters:
        raise UsageError(
            f"constraints {', '.join(wanted.for_clusters)} are for described clusters (partita plan --cluster) only"
        )
    if wanted.tensor > 1:

        def over(teams: Cluster) -> Plan:
            return auto(
                graph, batch_layouts, teams, optimizer=optimizer, constraints=replace(wanted, tensor=0),
                objective=objective, batch=batch, batch_norm=batch_norm, sync_batch_norm=sync_batch_norm,
            )  # fmt: skip

        return with_tensor(graph, batch_layouts, cluster, wanted.tensor, over, optimizer=optimizer)
    free = _Planner(
        graph, batch_layouts, cluster, optimizer, objective, batch or graph.batch, measured, batch_norm,
        sync_batch_norm,
    )  # fmt: skip
    return free.constrained(wanted).plan()


class _Planner:
    def __init__(
        self,
        graph: Graph,
        batch_layouts: BatchLayouts,
        cluster: Cluster,
        optimizer: str,
        objective: str,
        batch: int,
        measured: Measured | None,
        batch_norm: str,
        sync_batch_norm: bool,
    ) -> None:
        if objective not in ("train", "inference"):
            raise UsageError(f"objective {objective!r} is not known; take 'train' or 'inference'")
        optimizer_factor(optimizer)
        if not graph.ops:
            raise PlanError("the model runs no ops for these inputs: there is nothing to divide")
        if not cluster.devices:
            raise PlanError("the cluster has no devices")
        self.graph, self.layouts, self.cluster = graph, batch_layouts, cluster
        self.optimizer, self.constraints, self.batch, self.batch_norm = optimizer, Constraints(), batch, batch_norm
        self.train = objective == "train" and any(t.needs_grad for t in graph.of_role("parameter", "input"))
        self.resolved = Resolved()
        self.quick: tuple[Built, ...] = ()
        self.parts: dict[tuple[int, ...], tuple[Block, ...]] = {}
        self.overshoot = float("inf")
        self.table: CostTable = cost_table(graph, cluster, measured=measured)
        self.synced = batch_layouts
        if sync_batch_norm and batch_layouts.couplings:
            self.synced = layouts(graph, batch_norm="per_microbatch")
        self.sync = bool(batch_layouts.couplings) and not self.synced.couplings

    def _resolve(self) -> Resolved:
        resolved = resolve(self.graph, self.cluster, self.constraints)
        legal = legal_cuts(self.graph) if resolved.starts else ()
        problems = [
            f"split_before {name!r}: an op after it changes in place what an op before it made; split before or after "
            "both"
            for name, start in resolved.starts
            if not legal[start]
        ]
        asked = max(self.constraints.microbatches, self.constraints.num_replicas)
        if asked > max(self.batch, 1):
            problems.append(f"{asked} microbatches or replicas need as many samples; the batch has {self.batch}")
        elif asked > 1 and not self.layouts.microbatchable:
            problems.append("the model's batch cannot be cut, so there is one microbatch and no replica")
        if problems:
            raise PlanError("the constraints cannot be met", tuple(problems))
        return resolved

    def constrained(self, wanted: Constraints) -> _Planner:
        """The same request with these constraints. Raises PlanError where they contradict each other, with the smallest
        set that does and what works instead."""
        try:
            return self.again(constraints=wanted)
        except PlanError as error:
            asked = self.again()
            asked.constraints = wanted
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

    def _coarse(self, cluster: Cluster) -> Built:
        """Parts that are modules, as large as serves recomputation best: least kept together with the largest alive."""
        sizes = RECOMPUTE_UNITS if len(self.graph.ops) <= 600 else RECOMPUTE_UNITS[:1]
        return min((self._build(cluster, coarse=n) for n in sizes), key=lambda built: _floor(built.problem))

    def _build(self, cluster: Cluster, *, coarse: int = 0) -> Built:
        also = [start for _, start in self.resolved.starts]
        also += [i for _, ops in (*self.resolved.together, *self.resolved.recompute) for i in (min(ops), max(ops) + 1)]
        marks = dict(self.resolved.place)
        also += [i for i in range(1, len(self.graph.ops)) if marks.get(i) != marks.get(i - 1)]
        key = (coarse, *sorted(set(also)))
        if key not in self.parts:
            how: dict[str, Any] = {"limit": coarse, "exact": 0, "chunks": False} if coarse else {}
            self.parts[key] = tuple(blocks(self.graph, also=also, **how))
        return build(
            self.graph, self.layouts, cluster, self.table, self.parts[key], batch=self.batch, optimizer=self.optimizer,
            train=self.train, constraints=self.constraints, resolved=self.resolved, sync=self.sync,
        )  # fmt: skip

    def plan(self) -> Plan:
        built, outcome, gap = self.search(self.cluster)
        if isinstance(outcome, Infeasible):
            raise self._why_not(built, outcome)
        listed = [outcome.best, *self._pipeline(built, outcome.best), *outcome.others]
        listed += [*self._mixed(built), *self._interleaved(built)]
        ranked = self._rank(built, listed)
        if not ranked:
            rescued = self._attempt()
            if rescued is None:
                raise self._why_not(built, Infeasible("every plan found exceeds a device's memory when simulated"))
            gap = (1.0 + gap) * rescued[1].candidate.seconds / outcome.best.seconds - 1.0
            built, ranked = rescued[0], [rescued[1]]
        best = ranked[0]
        status = "optimal" if isinstance(outcome, Optimal) and gap == 0.0 else "feasible"
        one = self._one_device()
        plan = replace(
            self._to_plan(built, best.candidate),
            status=status,
            gap=gap,
            predicted=Predicted(best.seconds, best.bottleneck, best.memory, one),
            reasons=self._reasons(built, best, ranked[1:], one, gap),
        )
        return explain_later(plan, lambda: later_reasons(self, built, best.candidate, best.seconds, gap))

    # -- search

    def search(self, cluster: Cluster) -> tuple[Built, Outcome, float]:
        """The problem solved, its outcome and how far it may be from the best possible."""
        fine = self._build(cluster)
        anywhere = fine.problem.num_blocks <= IDEALS_BLOCKS
        unlimited = replace(
            fine.problem,
            may_recompute=(),
            pools=tuple(replace(p, memory_bytes=float("inf")) for p in fine.problem.pools),
        )
        free = stages(unlimited, anywhere=anywhere, slack=SLACK if fine.problem.num_blocks > EXACT_BLOCKS else 0.0)
        if isinstance(free, Infeasible):
            return fine, free, 0.0
        if fits(fine.problem, free.best):
            others = tuple(c for c in free.others if fits(fine.problem, c))
            gap = 0.0 if isinstance(free, Optimal) else free.gap
            return fine, replace(free, others=others), gap
        coarse = self._coarse(cluster)
        self.quick = (fine, coarse) if len(self.graph.ops) <= QUICK_OPS else (coarse,)
        rough = stages(coarse.problem, anywhere=coarse.problem.num_blocks <= IDEALS_BLOCKS, slack=TIGHT_SLACK)
        near = fine.problem
        in_hand = float("inf")
        if not isinstance(rough, Infeasible):
            tops = (rough.best, *rough.others[:1])
            in_hand = rough.best.seconds
            near = replace(
                near,
                microbatches=tuple(sorted({c.microbatches for c in tops})),
                schedules=tuple(dict.fromkeys(c.schedule for c in tops)),
            )
        tight: Outcome = Infeasible("")
        if coarse.blocks != fine.blocks:
            tight = stages(near, anywhere=anywhere, slack=TIGHT_SLACK, best=in_hand)
        pairs = [(b, o) for b, o in ((fine, tight), (coarse, rough)) if not isinstance(o, Infeasible)]
        if not pairs:
            return coarse, Infeasible("no division of the model fits the devices' memory"), 0.0
        built, outcome = min(pairs, key=lambda pair: pair[1].best.seconds)
        assert not isinstance(outcome, Infeasible)
        return built, outcome, max(0.0, outcome.best.seconds / free.best.seconds - 1.0)

    def _pipeline(self, built: Built, best: Candidate) -> list[Candidate]:
        """Where replicas of the whole model win: the best pipeline of single devices, to compare."""
        problem = built.problem
        if len(best.stages) > 1 or best.stages[0].replicas < 2 or problem.max_stages == 1:
            return []
        if problem.num_replicas or problem.num_stages:
            return []
        counts = tuple(m for m in problem.microbatches if m > 1)[-3:]
        alone = replace(problem, replicas=False, microbatches=counts, may_recompute=())
        found = stages(alone, slack=0.02, keep=1)
        return [] if isinstance(found, Infeasible) or len(found.best.stages) < 2 else [found.best]

    def _mixed(self, built: Built) -> list[Candidate]:
        """Whole-model replicas on devices of unequal speed; ``_to_plan`` sizes the microbatches by speed."""
        problem = built.problem
        count = problem.num_devices
        ok = problem.replicas and (not problem.joined or problem.sync) and count <= problem.batch
        ok = ok and len(problem.pools) > 1 and not problem.pools_of and not problem.breaks
        if not ok or self.constraints.microbatches not in (0, count):
            return []
        if problem.num_replicas not in (0, count) or problem.num_stages > 1:
            return []
        stage = StageChoice(tuple(range(problem.num_blocks)), -1, count)
        return [Candidate((stage,), count, "1f1b")]

    def _interleaved(self, built: Built) -> list[Candidate]:
        """Twice as many stages as devices, dealt round, where devices are equal and it was not forbidden."""
        problem = built.problem
        count = problem.num_devices
        wanted = self.constraints.schedule in ("", "interleaved") and not problem.joined and problem.train
        fits_count = not problem.max_stages or problem.max_stages >= 2 * count
        fits_count = fits_count and not problem.num_stages and problem.num_replicas < 2
        if not wanted or not fits_count or count < 2 or len(problem.pools) > 1 or problem.num_blocks < 2 * count:
            return []
        options = [m for m in problem.microbatches if m % count == 0 and m >= count]
        if not options:
            return []
        doubled = replace(
            problem,
            pools=(Pool("dealt", tuple(map(str, range(2 * count))), float("inf")),),
            microbatches=tuple(options[-2:]), schedules=("1f1b",), replicas=False, may_recompute=(),
        )  # fmt: skip
        found = stages(doubled, slack=0.02, keep=1)
        if isinstance(found, Infeasible) or len(found.best.stages) != 2 * count:
            return []
        return [replace(found.best, schedule="interleaved")]

    # -- to plans, ranked

    def _to_plan(self, built: Built, candidate: Candidate, *, named: bool = True) -> Plan:
        problem, graph = built.problem, self.graph
        stage_of = {
            graph.ops[i].name: s for s, c in enumerate(candidate.stages) for b in c.blocks for i in built.blocks[b].ops
        }
        count = len(candidate.stages)
        if named:
            names = stage_names(graph, stage_of, count)
        else:
            ops_of: list[list[str]] = [[] for _ in range(count)]
            for name, s in stage_of.items():
                ops_of[s].append(name)
            names = tuple(((), tuple(ops)) for ops in ops_of)
        taken = [0] * len(problem.pools)
        made = []
        sizes: tuple[int, ...] = ()
        dealt = candidate.schedule == "interleaved" and len(candidate.stages) > problem.num_devices
        for s, choice in enumerate(candidate.stages):
            if choice.pool < 0:
                devices = tuple(d.name for d in self.cluster.devices)
                sizes = self._by_speed(devices)
            elif dealt:
                devices = (problem.pools[0].devices[s % problem.num_devices],)
            else:
                start = taken[choice.pool]
                devices = problem.pools[choice.pool].devices[start : start + choice.replicas]
                taken[choice.pool] += choice.replicas
            again = tuple(name for b in choice.recompute for name in built.units[b])
            asked = tuple(
                name for name, ops in self.resolved.recompute if any(stage_of[graph.ops[i].name] == s for i in ops)
            )
            made.append(Stage(devices, names[s][0], names[s][1], tuple(dict.fromkeys((*asked, *again)))))
        return Plan(
            stages=tuple(made),
            model=graph.name,
            fingerprint=graph.fingerprint,
            devices=tuple(d.name for d in self.cluster.devices),
            batch=Batch(self.batch, candidate.microbatches, sizes),
            schedule=candidate.schedule if len(candidate.stages) > 1 else self.constraints.schedule or "1f1b",
            batch_norm=self.batch_norm,
        )

    def _by_speed(self, devices: Sequence[str]) -> tuple[int, ...]:
        """Samples for each device so that all end together."""
        lines = []
        for name in devices:
            kind = self.cluster.device(name).kind
            rows = self.table.forward[kind] + (
                self.table.backward[kind] + self.table.weight[kind] if self.train else 0.0
            )
            lines.append((float(rows[:, 0].sum()), max(float(rows[:, 1].sum()), 1e-12)))
        sizes = [1] * len(devices)
        for _ in range(self.batch - len(devices)):
            k = min(range(len(devices)), key=lambda i: lines[i][0] + lines[i][1] * (sizes[i] + 1))
            sizes[k] += 1
        return tuple(sizes)

    def _rank(self, built: Built, listed: Sequence[Candidate]) -> list[Ranked]:
        limits = {d.name: HEADROOM * d.memory_bytes for d in self.cluster.devices}
        began = time.perf_counter()
        ranked: list[Ranked] = []
        self.overshoot = float("inf")
        for candidate in listed:
            if ranked and time.perf_counter() - began > RANK_SECONDS:
                break
            found = self.price(built, candidate)
            if found is None:
                continue
            over = max((need / limits[device] for device, need in found.memory), default=0.0)
            self.overshoot = min(self.overshoot, over)
            if over <= 1.0:
                ranked.append(found)
        return sorted(
            ranked,
            key=lambda r: (
                float(f"{r.seconds:.6g}"),
                sum(n for _, n in r.memory),
                len(r.plan.stages),
                r.plan.batch.microbatches,
            ),
        )

    def price(self, built: Built, candidate: Candidate) -> Ranked | None:
        """The candidate as simulated, whether or not it fits; None where its stages wait for each other."""
        plan = self._to_plan(built, candidate, named=False)
        synced = self.sync and len(plan.stages) == 1 and len(plan.stages[0].devices) == plan.batch.microbatches
        how = self.synced if synced else self.layouts
        program = lower(self.graph, how, plan, batch=self.batch or 1, train=self.train)
        costs = segment_costs(program, self.table, self.cluster)
        try:
            trace = simulate(program, costs, self.cluster, optimizer=self.optimizer if self.train else "none")
        except PlanError:
            return None
        busy = {device: trace.busy_seconds(device) for device, _ in trace.memory}
        slowest = max(busy, key=busy.__getitem__) if busy else ""
        missing = [(d, need - HEADROOM * self.cluster.device(d).memory_bytes) for d, need in trace.memory]
        worst = max(missing, key=lambda pair: pair[1], default=("", 0.0))
        over = worst if worst[1] > 0 else ("", 0.0)
        return Ranked(plan, candidate, trace.step_seconds or candidate.seconds, trace.memory, slowest, over)

    def slowest_op(self, built: Built, candidate: Candidate, stage: int) -> tuple[str, float]:
        """The op that takes most of the stage's computing on its device, and its share."""
        choice, n = candidate.stages[stage], built.problem.samples(candidate.microbatches)
        kind = self.cluster.device(built.problem.pools[choice.pool].devices[0]).kind
        rows = self.table.forward[kind] + (self.table.backward[kind] + self.table.weight[kind] if self.train else 0.0)
        ops = [i for b in choice.blocks for i in built.blocks[b].ops]
        seconds = [float(rows[i, 0] + rows[i, 1] * n) for i in ops]
        most = max(range(len(ops)), key=seconds.__getitem__)
        return self.graph.ops[ops[most]].name, seconds[most] / max(sum(seconds), 1e-30)

    def elsewhere(self, cluster: Cluster) -> Plan:
        """The plan of the same request for another cluster."""
        return self.again(cluster=cluster).plan()

    def _one_device(self) -> float:
        kind = self.cluster.devices[0].kind
        rows = self.table.forward[kind] + (self.table.backward[kind] + self.table.weight[kind] if self.train else 0.0)
        return float(rows[:, 0].sum() + rows[:, 1].sum() * self.batch)

    # -- words

    def _reasons(self, built: Built, best: Ranked, others: Sequence[Ranked], one: float, gap: float) -> tuple[str, ...]:
        problem = built.problem
        lines = [
            f"searched {problem.num_blocks} parts of {len(self.graph.ops)} ops on {problem.num_devices} devices, "
            f"{', '.join(map(str, problem.microbatches))} microbatches, {', '.join(problem.schedules)}; "
            f"the fastest few were simulated: {format_seconds(best.seconds)} a step"
        ]
        if best.seconds:
            lines.append(f"{one / best.seconds:.2f}x one device alone ({format_seconds(one)})")
        mixed = any(c.pool < 0 for c in best.candidate.stages)
        dealt = best.candidate.schedule == "interleaved" and len(best.candidate.stages) > problem.num_devices
        if mixed:
            lines.append(f"devices of unequal speed get {', '.join(map(str, best.plan.batch.sizes))} samples each")
        elif not dealt:
            lines += cut_reasons(built, best.candidate)
            lines += binding_reasons(built, best.candidate, self.optimizer)
        couplings = getattr(self.layouts, "couplings", ())
        if problem.joined and couplings:
            what = "; ".join(f"{c.op}: {c.reason}" for c in couplings[:2])
            lines.append(f"what follows an op that needs the whole batch runs once a step, unsplit ({what})")
        elif not self.layouts.microbatchable:
            lines.append("the batch cannot be cut into microbatches, so one device works at a time")
        if any(c.recompute for c in best.candidate.stages):
            parts = sum(len(c.recompute) for c in best.candidate.stages)
            lines.append(f"{parts} parts are recomputed in backward, because their activations do not fit")
        if gap > SLACK:
            lines.append(f"memory limits cost at most {gap:.1%} of the step time")
        elif gap > 0:
            lines.append(f"no plan is more than {gap:.2%} faster in the closed form; the search stopped there")
        lines += other_reasons(problem, best.seconds, [(r.candidate, r.seconds) for r in others])
        return tuple(lines)

    def _why_not(self, built: Built, outcome: Infeasible) -> InfeasibleError:
        guilty = conflict(self)
        limits = counted([format_bytes(d.memory_bytes) for d in self.cluster.devices])
        if len(self.cluster.devices) <= 8:
            limits = ", ".join(f"{d.name} {format_bytes(d.memory_bytes)}" for d in self.cluster.devices)
        reason = outcome.reason
        if guilty:
            reason = f"these cannot be met together: {', '.join(map(str, guilty))}"
            reason = reason if len(guilty) > 1 else f"within the devices' memory {guilty[0]} cannot be met"
        elif built.problem.num_blocks:
            reason = f"{reason}: {shortage(built.problem)}"
        text = f"{self.graph.name or 'the model'}: {reason} ({limits}; batch {self.batch}, {self.optimizer})"
        return InfeasibleError(text, remedies(self, guilty))

    # -- what remedies ask

    def again(
        self,
        *,
        cluster: Cluster | None = None,
        batch: int = 0,
        optimizer: str = "",
        constraints: Constraints | None = None,
    ) -> _Planner:
        """The same request with something changed."""
        other = object.__new__(_Planner)
        other.__dict__.update(self.__dict__)
        other.cluster = cluster or self.cluster
        other.batch = batch or self.batch
        other.optimizer = optimizer or self.optimizer
        other.constraints = self.constraints if constraints is None else constraints
        names = [d.name for d in self.cluster.devices]
        same = names == [d.name for d in other.cluster.devices] and other.batch == self.batch
        if constraints is not None or not same:
            other.quick = ()
            other.resolved = other._resolve()
        elif cluster is not None or optimizer:
            other.quick = self._quick()
        return other

    def feasible(self) -> bool:
        """Whether the closed form knows a plan that fits."""
        return any(not isinstance(self._closed(built, 1.0)[1], Infeasible) for built in self._quick())

    def attempt(self) -> Ranked | None:
        """A plan as simulated, or None; for a large graph the best one of whole modules."""
        found = self._attempt()
        return found[1] if found is not None else None

    def _attempt(self) -> tuple[Built, Ranked] | None:
        """Where simulation finds more memory than the closed form, plans for as much less are looked for."""
        room, fits_in = 1.0, 0.0
        for _ in range(ATTEMPTS):
            found = []
            for built in self._quick():
                problem, outcome = self._closed(built, room)
                if isinstance(outcome, Infeasible):
                    continue
                found += [(built, r) for r in self._rank(built, [outcome.best])]
                need = candidate_bytes(problem, outcome.best)
                filled = [
                    n / problem.pools[s.pool].memory_bytes for n, s in zip(need, outcome.best.stages, strict=True)
                ]
                fits_in = max(fits_in, room * max(filled) / max(self.overshoot, 1.0))
            if found:
                return min(found, key=lambda pair: pair[1].seconds)
            if not fits_in:
                break
            room, fits_in = min(fits_in, 0.98 * room), 0.0
        return None

    def _closed(self, built: Built, room: float) -> tuple[Problem, Outcome]:
        """The best plan under the schedule that holds least, with ``room`` of the memory; for the problem it solves."""
        pools = tuple(
            replace(p, memory_bytes=room * HEADROOM * self.cluster.device(p.devices[0]).memory_bytes)
            for p in built.problem.pools
        )
        problem = replace(
            built.problem,
            pools=pools,
            schedules=built.problem.schedules[:1],
            optimizer_factor=float(optimizer_factor(self.optimizer)) if self.train else 0.0,
        )
        return problem, stages(problem, anywhere=problem.num_blocks <= IDEALS_BLOCKS, keep=1, slack=0.02)

    def _quick(self) -> tuple[Built, ...]:
        """What ``attempt`` divides: whole modules, and the finest parts where the graph is small."""
        if not self.quick:
            fine = (self._build(self.cluster),) if len(self.graph.ops) <= QUICK_OPS else ()
            self.quick = (*fine, self._coarse(self.cluster))
        return self.quick


def _floor(problem: Problem) -> float:
    """Bytes of activations of one microbatch of one sample, were everything recomputed that may be."""
    saved, kept = problem.single.saved.sum(axis=1), problem.single.kept.sum(axis=1)
    may = list(problem.may_recompute)
    largest = float(saved[may].max()) if may else 0.0
    return float(saved.sum() - (saved - kept)[may].sum()) + largest
