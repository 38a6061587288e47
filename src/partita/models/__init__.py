"""Models by published sizes on meta tensors, to plan for: ``partita plan llama-405b --cluster 128x8xH100``."""

from partita.models.catalog import ALIASES, NAMES, describe, make
from partita.models.gpt import GPT, GPTSize
from partita.models.llama import Llama, LlamaSize

__all__ = ["ALIASES", "GPT", "NAMES", "GPTSize", "Llama", "LlamaSize", "describe", "make"]
