"""Master: the linear program of a cover by sets, over the sets met so far (Gilmore and Gomory, 1961)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from partita.planners.highs import Highs
from partita.planners.placing.problem import Placement
from partita.planners.placing.subsets import Flags
from partita.planners.problem import Array

BARS = 2.0  # of all devices' time, for a unit left out


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """A set of units that a device of a kind runs in ``load`` seconds."""

    kind: int
    load: float
    units: Flags


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """``share``: the least part of every device's time that covers all units once, by parts of sets. ``prices``: of the
    units, then what a device of each kind earns (``worth``). ``missed``: what no set covers.
    """

    share: float
    prices: Array
    worth: Array
    missed: float


class Master:
    """Rows: units, then kinds. Columns: the share; what is not covered of each unit and what is covered too often, both
    dear; then the sets.
    """

    def __init__(self, problem: Placement, kinds: Sequence[int], columns: Iterable[Column], cap: float) -> None:
        self.units, self.kinds = problem.num_units, tuple(kinds)
        self.solver = Highs()
        for name, value in {"threads": 1, "output_flag": False}.items():
            self.solver.setOptionValue(name, value)
        n, none = self.units, (np.zeros(0, dtype=np.int32), np.zeros(0))
        for _ in range(n):
            self.solver.addRow(1.0, 1.0, 0, *none)
        for _ in self.kinds:
            self.solver.addRow(-np.inf, 0.0, 0, *none)
        rows = np.arange(n, n + len(self.kinds), dtype=np.int32)
        self.solver.addCol(1.0, 0.0, np.inf, len(rows), rows, np.array([-float(problem.kinds[k].count) for k in kinds]))
        for unit in range(n):
            for sign in (1.0, -1.0):
                self.solver.addCol(BARS, 0.0, np.inf, 1, np.array([unit], dtype=np.int32), np.array([sign]))
        self.bars = BARS
        self.known: set[tuple[int, bytes]] = set()
        for column in columns:
            if column.load <= cap:
                self.add(column)

    def add(self, column: Column) -> bool:
        """Whether it is a new one."""
        key = column.kind, column.units.tobytes()
        if key in self.known:
            return False
        self.known.add(key)
        rows = np.append(np.nonzero(column.units)[0], self.units + self.kinds.index(column.kind)).astype(np.int32)
        self.solver.addCol(0.0, 0.0, np.inf, len(rows), rows, np.ones(len(rows)))
        return True

    def bar(self) -> None:
        """Makes it dearer still not to cover a unit once."""
        self.bars *= 4.0
        n = self.units
        self.solver.changeColsCost(2 * n, np.arange(1, 2 * n + 1, dtype=np.int32), np.full(2 * n, self.bars))

    def solve(self) -> Shares:
        self.solver.run()
        solution, n = self.solver.getSolution(), self.units
        duals = np.array(solution.row_dual)
        share = float(self.solver.getInfo().objective_function_value)
        return Shares(share, duals[:n], -duals[n:], float(np.sum(solution.col_value[1 : 2 * n + 1])))
