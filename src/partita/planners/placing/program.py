"""Program: the placement as a mixed-integer program, solved by HiGHS: better placements and a bound.

A binary per unit and device, a number between 0 and 1 per net and device that pays for it (Tarnawski et al., NeurIPS
2020, section 5, with one variable where theirs has one for each direction, since a device pays once for a net either
way). HiGHS finds by itself that devices of a kind are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np

from partita.planners.highs import Highs
from partita.planners.placing.problem import Placement, fits, loads


@dataclass(slots=True)
class _Rows:
    """A sparse matrix by rows."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    start: list[int] = field(default_factory=lambda: [0])
    index: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)

    def add(self, lower: float, upper: float, entries: Sequence[tuple[int, float]]) -> None:
        for index, value in entries:
            self.index.append(index)
            self.value.append(value)
        self.lower.append(lower)
        self.upper.append(upper)
        self.start.append(len(self.index))


def solve_program(
    problem: Placement, start: Sequence[int] | None, *, cap: float, seconds: float
) -> tuple[tuple[int, ...] | None, float]:
    """(devices, bound): the best placement found in so many seconds, and what none with a load up to ``cap`` is below.

    The bound is infinite where there is none up to ``cap``. ``start``: a placement to better.
    """
    program = _Program(problem, cap)
    program.solver.setOptionValue("time_limit", max(seconds, 0.0))
    if start is not None:
        program.offer(start)
    program.solver.run()
    status = program.solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None, float("inf")
    info = program.solver.getInfo()
    bound = float(info.mip_dual_bound) * program.scale
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible.value:
        return None, bound
    devices = program.devices()
    return (devices if fits(problem, devices) else None), bound


class _Program:
    """Columns: the load (in units of ``scale``), then unit by device, then net by device."""

    def __init__(self, problem: Placement, cap: float) -> None:
        self.problem = problem
        self.kinds = problem.device_kinds
        self.scale = cap if np.isfinite(cap) and cap > 0 else 1.0
        self.count = 1 + (problem.num_units + len(problem.nets)) * len(self.kinds)
        self.solver = Highs()
        for name, value in {"threads": 1, "mip_rel_gap": 1e-9, "mip_abs_gap": 1e-9}.items():
            self.solver.setOptionValue(name, value)
        self.solver.passModel(self._model(cap / self.scale))

    def _unit(self, unit: int, device: int) -> int:
        return 1 + unit * len(self.kinds) + device

    def _net(self, net: int, device: int) -> int:
        return 1 + (self.problem.num_units + net) * len(self.kinds) + device

    def _model(self, cap: float) -> highspy.HighsLp:
        rows = self._rows()
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = self.count, len(rows.lower)
        cost, upper = np.zeros(self.count), np.ones(self.count)
        cost[0], upper[0] = 1.0, cap
        for column in self._forbidden(cap):
            upper[column] = 0.0
        model.col_cost_, model.col_lower_, model.col_upper_ = cost, np.zeros(self.count), upper
        model.row_lower_, model.row_upper_ = np.array(rows.lower), np.array(rows.upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.array(rows.start)
        model.a_matrix_.index_ = np.array(rows.index)
        model.a_matrix_.value_ = np.array(rows.value)
        whole, part = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
        units = self.problem.num_units * len(self.kinds)
        model.integrality_ = [part] + [whole] * units + [part] * (self.count - 1 - units)
        return model

    def _rows(self) -> _Rows:
        problem, kinds = self.problem, self.kinds
        rows, devices = _Rows(), range(len(self.kinds))
        for unit in range(problem.num_units):
            rows.add(1.0, 1.0, [(self._unit(unit, d), 1.0) for d in devices])
        for d, kind in enumerate(kinds):
            busy = [
                (self._unit(u, d), -float(s) / self.scale) for u, s in enumerate(kind.seconds) if np.isfinite(s) and s
            ]
            paid = [
                (self._net(i, d), -kind.transfer * net.seconds / self.scale)
                for i, net in enumerate(problem.nets)
                if kind.transfer * net.seconds > 0
            ]
            rows.add(0.0, np.inf, [(0, 1.0), *busy, *paid])
            if kind.memory_bytes < problem.nbytes.sum():
                room = max(kind.memory_bytes, 1e-300)
                rows.add(-np.inf, 1.0, [(self._unit(u, d), float(b) / room) for u, b in enumerate(problem.nbytes) if b])
            for i, net in enumerate(problem.nets):
                if kind.transfer * net.seconds > 0:
                    for a, b in zip(net.units, (*net.units[1:], net.units[0]), strict=True):
                        cut = [(self._unit(a, d), 1.0), (self._unit(b, d), -1.0), (self._net(i, d), -1.0)]
                        rows.add(-np.inf, 0.0, cut)
        return rows

    def _forbidden(self, cap: float) -> list[int]:
        """Columns of units that would be on a device for longer than the cap."""
        return [
            self._unit(unit, d)
            for d, kind in enumerate(self.kinds)
            for unit, seconds in enumerate(kind.seconds)
            if seconds > cap * self.scale * (1 + 1e-9) or not np.isfinite(seconds)
        ]

    def offer(self, start: Sequence[int]) -> None:
        values = np.zeros(self.count)
        values[0] = float(loads(self.problem, start).max()) / self.scale
        for unit, device in enumerate(start):
            values[self._unit(unit, device)] = 1.0
        for i, net in enumerate(self.problem.nets):
            touched = {start[unit] for unit in net.units}
            if len(touched) > 1:
                for device in touched:
                    values[self._net(i, device)] = 1.0
        solution = highspy.HighsSolution()
        solution.col_value = values.tolist()
        self.solver.setSolution(solution)

    def devices(self) -> tuple[int, ...]:
        count = self.problem.num_units
        values = np.array(self.solver.getSolution().col_value[1 : 1 + count * len(self.kinds)])
        return tuple(int(d) for d in values.reshape(count, len(self.kinds)).argmax(axis=1))
