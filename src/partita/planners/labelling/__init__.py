"""Labelling a graph at least cost under memory over time: the problem that sharding every operation of a model is."""

from partita.planners.labelling.problem import Edge, Labelling, Problem
from partita.planners.labelling.solve import solve

__all__ = ["Edge", "Labelling", "Problem", "solve"]
