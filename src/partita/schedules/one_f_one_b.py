"""1F1B (PipeDream-Flush; Narayanan et al., 2021): GPipe's bubble, but stage s of p holds only p-s microbatches.

a: F0 F1 F2 B0 F3 B1 B2 B3
b: F0 F1 B0 F2 B1 F3 B2 B3
c: F0 B0 F1 B1 F2 B2 F3 B3
"""

from __future__ import annotations

from partita.schedules.greedy import Rule

RULE = Rule(prefer="BF")
