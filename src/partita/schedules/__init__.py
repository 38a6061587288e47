"""Schedules: (stages, microbatches) to the order of steps on each device; pure functions, drawn in their docstrings."""

from partita.schedules.choose import NAMES, order, schedule
from partita.schedules.steps import Orders, Placement, Step, draw, makespan, max_in_flight, stuck

__all__ = ["NAMES", "Orders", "Placement", "Step", "draw", "makespan", "max_in_flight", "order", "schedule", "stuck"]
