"""The core as a mixed-integer program (the local polytope's), with memory rows for the moments that turn out to bind.

A binary per label, a weight between 0 and 1 per pair of labels of an edge, pairs' weights that sum to the labels' on
both sides (Schlesinger 1976; Werner, *A linear programming approach to max-sum problem*, PAMI 2007). Moments enter as
rows only when a solution exceeds them: few do. The bound of such a program holds for the whole problem.
"""

from __future__ import annotations

import highspy
import numpy as np

from partita.planners.highs import Highs
from partita.planners.labelling.flat import Flat
from partita.planners.labelling.problem import Floats, Ints
from partita.planners.labelling.record import Record

ROWS_AT_ONCE = 15


def solve_exactly(flat: Flat, record: Record) -> None:
    """Optimum or proof that there is none, into ``record``, unless its time ends before."""
    program = _Program(flat, record)
    integral = False
    while not record.stopped:
        values = program.run()
        if values is None:
            return
        excess = _load(flat, values) - flat.room
        over = _peaks(excess, program.moments, 0.0 if integral else 1e-9 * program.largest)
        if len(over):
            for moment in over:
                program.limit(int(moment))
        elif integral:
            return
        else:
            program.make_integral()
            integral = True


class _Program:
    def __init__(self, flat: Flat, record: Record) -> None:
        self.flat, self.record = flat, record
        self.moments: set[int] = set()
        self.largest = max(float(flat.room.max(initial=0.0)), float(flat.usage.max(initial=0.0)), 1e-300)
        finite = flat.matrix < flat.forbidden
        dearest = max(float(c[c < flat.forbidden].max(initial=0.0)) for c in (flat.cost, flat.matrix))
        self.scale = 1e6 / (record.cost if 0 < record.cost < np.inf else max(dearest, 1e-300))
        self.owner = np.repeat(np.arange(len(flat.label_at) - 1), np.diff(flat.label_at))
        self.integral = False
        self.solver = Highs()
        for name, value in {
            "threads": 1,
            "mip_rel_gap": 1e-9,
            "mip_abs_gap": 1e-9,
            "mip_feasibility_tolerance": 1e-9,
            "primal_feasibility_tolerance": 1e-9,
        }.items():
            self.solver.setOptionValue(name, value)
        self.solver.passModel(self._model(finite))

    def _model(self, finite: np.ndarray) -> highspy.HighsLp:
        flat = self.flat
        num_labels, num_nodes = len(flat.cost), len(flat.label_at) - 1
        sizes = np.diff(flat.label_at)
        entry = np.flatnonzero(finite)
        edge = np.searchsorted(flat.matrix_at, entry, side="right") - 1
        a, b = flat.edge_a[edge], flat.edge_b[edge]
        row, column = np.divmod(entry - flat.matrix_at[edge], sizes[b])
        starts = np.concatenate([[0], np.cumsum(sizes[flat.edge_a] + sizes[flat.edge_b])])
        row_of_a = num_nodes + starts[edge] + row
        row_of_b = num_nodes + starts[edge] + sizes[a] + column
        pair = num_labels + np.arange(len(entry))
        edges = range(len(flat.edge_a))
        of_label = [
            flat.label_at[end] + np.arange(sizes[end])
            for e in edges
            for end in (int(flat.edge_a[e]), int(flat.edge_b[e]))
        ]
        label = np.concatenate([np.zeros(0, np.int64), *of_label])
        rows = np.concatenate([self.owner, row_of_a, row_of_b, num_nodes + np.arange(len(label))])
        columns = np.concatenate([np.arange(num_labels), pair, pair, label])
        values = np.concatenate([np.ones(num_labels + 2 * len(pair)), -np.ones(len(label))])
        order = np.argsort(rows, kind="stable")
        num_rows = num_nodes + int(starts[-1])
        right = np.concatenate([np.ones(num_nodes), np.zeros(num_rows - num_nodes)])
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = num_labels + len(pair), num_rows
        possible = flat.cost < flat.forbidden
        model.col_cost_ = np.concatenate([np.where(possible, flat.cost, 0.0), flat.matrix[entry]]) * self.scale
        model.col_lower_ = np.zeros(model.num_col_)
        model.col_upper_ = np.concatenate([possible, np.ones(len(pair))]).astype(np.float64)
        model.row_lower_ = model.row_upper_ = right
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))])
        model.a_matrix_.index_, model.a_matrix_.value_ = columns[order], values[order]
        return model

    def limit(self, moment: int) -> None:
        """The memory row of ``moment``."""
        flat = self.flat
        self.moments.add(moment)
        columns: list[int] = []
        values: list[float] = []
        live = np.flatnonzero((flat.span_begin <= moment) & (moment < flat.span_end))
        for at in live:
            i = int(np.searchsorted(flat.span_at, at, side="right")) - 1
            spans = int(flat.span_at[i + 1] - flat.span_at[i])
            size = int(flat.label_at[i + 1] - flat.label_at[i])
            used = flat.usage[flat.usage_at[i] + int(at - flat.span_at[i]) + spans * np.arange(size)]
            for label in np.flatnonzero(used):
                columns.append(int(flat.label_at[i] + label))
                values.append(float(used[label]) / self.largest)
        room = float(flat.room[moment]) / self.largest
        self.solver.addRow(-highspy.kHighsInf, room, len(columns), np.array(columns, np.int32), np.array(values))

    def make_integral(self) -> None:
        self.integral = True
        count = len(self.flat.cost)
        kinds = np.full(count, highspy.HighsVarType.kInteger.value, dtype=np.uint8)
        self.solver.changeColsIntegrality(count, np.arange(count, dtype=np.int32), kinds)

    def run(self) -> Floats | None:
        """Weights of the labels; None without a solution or where time ends. Bounds and labels go on record."""
        record = self.record
        if self.integral and record.labels is not None:
            chosen = self.flat.label_at[:-1] + record.labels
            start = np.zeros(len(self.flat.cost))
            start[chosen] = 1.0
            self.solver.setSolution(len(start), np.arange(len(start), dtype=np.int32), start)
        self.solver.setOptionValue("time_limit", self.solver.getRunTime() + record.seconds_left)
        self.solver.run()
        status = self.solver.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            record.refute()
            return None
        info = self.solver.getInfo()
        finished = status == highspy.HighsModelStatus.kOptimal
        if self.integral:
            record.raise_bound(float(info.mip_dual_bound) / self.scale)
        elif finished:
            record.raise_bound(float(info.objective_function_value) / self.scale)
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible.value:
            return None
        weights = np.array(self.solver.getSolution().col_value[: len(self.flat.cost)])
        if self.integral:
            labels = np.array([
                int(weights[self.flat.label_at[i] : self.flat.label_at[i + 1]].argmax())
                for i in range(len(self.flat.label_at) - 1)
            ])  # fmt: skip
            record.offer(labels)
            weights = np.zeros(len(weights))
            weights[self.flat.label_at[:-1] + labels] = 1.0
        return weights if finished else None


def _load(flat: Flat, weights: Floats) -> Floats:
    """Usage per moment where each label counts with its weight."""
    load = np.zeros(len(flat.room) + 1)
    if not len(flat.room):
        return load[:-1]
    sizes = np.diff(flat.label_at)
    for i in range(len(sizes)):
        begin, end = flat.span_at[i], flat.span_at[i + 1]
        if end > begin:
            usage = flat.usage[flat.usage_at[i] : flat.usage_at[i + 1]].reshape(sizes[i], end - begin)
            used = weights[flat.label_at[i] : flat.label_at[i + 1]] @ usage
            np.add.at(load, flat.span_begin[begin:end], used)
            np.add.at(load, flat.span_end[begin:end], -used)
    return np.cumsum(load)[:-1]


def _peaks(excess: Floats, present: set[int], tolerance: float) -> Ints:
    """The worst moments above the limit, apart from each other in time, that have no row yet."""
    chosen: list[int] = []
    apart = len(excess) / 300
    for t in np.argsort(-excess)[:1000]:
        if excess[t] <= tolerance or len(chosen) == ROWS_AT_ONCE:
            break
        if int(t) not in present and all(abs(int(t) - other) > apart for other in chosen):
            chosen.append(int(t))
    return np.array(chosen, dtype=np.int64)
