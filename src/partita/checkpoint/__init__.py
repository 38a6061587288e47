"""Checkpoint: save a model and its training under one plan, load it under any other; see docs/decisions/0018.

``save`` and ``load`` keep everything that training needs; ``export_safetensors`` and ``load_safetensors`` the weights
alone, whole, in one file under the model's own names.
"""

from partita.checkpoint.dcp import Reader
from partita.checkpoint.folder import latest
from partita.checkpoint.loading import Restored, check, load
from partita.checkpoint.saving import save
from partita.checkpoint.whole import export_safetensors, load_safetensors

__all__ = ["Reader", "Restored", "check", "export_safetensors", "latest", "load", "load_safetensors", "save"]
