"""This machine as numbers: its devices and their speed, kept on disk between runs."""

from partita.measure.detect import local_cluster

__all__ = ["local_cluster"]
