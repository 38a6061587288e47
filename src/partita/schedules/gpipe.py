"""GPipe (Huang et al., 2019): all forwards, then all backwards; bubble (p-1)/(m+p-1), m microbatches in flight.

a: F0 F1 F2 B0 B1 B2
b: F0 F1 F2 B0 B1 B2
"""

from __future__ import annotations

from partita.schedules.greedy import Rule

RULE = Rule(prefer="FB", all_forwards_first=True, limited=False)
