"""This machine as numbers: its devices, their speed, what a model's parts take on them; kept on disk between runs."""

from partita.measure.calls import kept_timings, measure_call
from partita.measure.detect import local_cluster
from partita.measure.store import forget as forget_timings

__all__ = ["forget_timings", "kept_timings", "local_cluster", "measure_call"]
