"""Request: what is asked of the planner, to be changed and asked again: for conflicts, remedies and what-ifs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from partita.cluster import Cluster
from partita.cost.roofline import Assumptions
from partita.errors import PartitaError, PlanError
from partita.graph import Graph
from partita.planners.conflicts import Atom, atoms, smallest_conflict
from partita.planners.constraints import Constraints
from partita.planners.large.asked import asked
from partita.planners.large.pools import pools
from partita.planners.large.search import QUICK, Limits, Search
from partita.planners.remedies import loosened

HEADROOM = 0.95


@dataclass(frozen=True, slots=True)
class Fit:
    """A layout that works: seconds a step, bytes on the first device of each stage."""

    seconds: float
    memory: tuple[tuple[str, int], ...]


class Request:
    """A model, a described cluster and what a person fixed. Raises PlanError for names that mean nothing."""

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        batch: int,
        optimizer: str,
        constraints: Constraints,
        *,
        train: bool,
        assume: Assumptions,
        limits: Limits | None = None,
        like: Request | None = None,
    ) -> None:
        """``limits``: instead of the numbers among the constraints. ``like``: its looked-up counts serve here too."""
        self.graph, self.cluster, self.batch, self.optimizer = graph, cluster, batch, optimizer
        self.constraints, self.train, self.assume, self.limits = constraints, train, assume, limits
        self.processes = True
        there = pools(cluster, assume)
        made = asked(graph, there, constraints)
        self.search: Search = Search(
            graph, made.units, there, batch=batch, assume=assume, optimizer=optimizer, headroom=HEADROOM, train=train,
            limits=limits or made.limits, like=like.search if like is not None else None, marks=made.marks,
            wanted=made.wanted,
        )  # fmt: skip

    def again(
        self,
        *,
        cluster: Cluster | None = None,
        batch: int = 0,
        optimizer: str = "",
        constraints: Constraints | None = None,
    ) -> Request:
        """The same with something changed."""
        return Request(
            self.graph, cluster or self.cluster, batch or self.batch, optimizer or self.optimizer,
            self.constraints if constraints is None else constraints, train=self.train, assume=self.assume,
            limits=self.limits, like=self,
        )  # fmt: skip

    def feasible(self) -> bool:
        """Whether a layout is found to fit."""
        return self.search.fits()

    def attempt(self) -> Fit | None:
        """A good layout, or None."""
        found = self.search.run(QUICK)
        if not found.layouts:
            return None
        best = found.layouts[0]
        names = [self.search.pools[best.degrees.groups[s.group].pool].names[0] for s in best.stages]
        return Fit(best.seconds, tuple((n, round(s.memory)) for n, s in zip(names, best.stages, strict=True)))

    def conflict(self) -> tuple[Atom, ...]:
        """The smallest set of constraints that cannot be met here; () where they are not what is wrong."""
        parts = atoms(self.constraints)
        return smallest_conflict(parts, self._works) if parts else ()

    def _works(self, constraints: Constraints) -> bool:
        return _feasible(self, constraints=constraints)

    def loosened(self, guilty: tuple[Atom, ...]) -> Any:
        """Remedies: one constraint of the conflict changed or dropped, each planned."""
        return loosened(self, guilty)

    def ever(self) -> bool:
        """Whether it could be met, were memory ample."""
        ample = tuple(replace(d, memory_bytes=d.memory_bytes << 24) for d in self.cluster.devices)
        return _feasible(self, cluster=replace(self.cluster, devices=ample))


def requested(
    graph: Graph, cluster: Cluster, batch: int, optimizer: str, constraints: Constraints, **options: Any
) -> Request:
    """The request; where names are wrong or contradict, with the smallest conflicting set."""
    try:
        return Request(graph, cluster, batch, optimizer, constraints, **options)
    except PlanError as error:
        free = Request(graph, cluster, batch, optimizer, Constraints(), **options)
        guilty = smallest_conflict(atoms(constraints), lambda c: _named(free, c))
        words = ", ".join(map(str, guilty))
        line = f"smallest conflicting set: {words}" if len(guilty) > 1 else f"{words} cannot be met by itself"
        raise PlanError("the constraints cannot be met", (*error.problems, line)) from None


def _feasible(request: Request, **changed: Any) -> bool:
    try:
        return request.again(**changed).feasible()
    except PartitaError:
        return False


def _named(request: Request, constraints: Constraints) -> bool:
    """Whether the names mean something."""
    try:
        request.again(constraints=constraints)
    except PartitaError:
        return False
    return True
