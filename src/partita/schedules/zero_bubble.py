"""ZB-H1 (Qi et al., 2023): backward in two steps, B (to the inputs, others wait for it) and W (weights, nobody waits).

W is put off to where the device would idle, while no device holds more than 1F1B's first stage does. With F, B and W
alike the bubble is (p-1) steps of 3m+p-1, a third of 1F1B's.

    a: F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3
    b: F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
    c: F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3
"""

from __future__ import annotations

from partita.schedules.greedy import Rule

RULE = Rule(prefer="FBW", split_backward=True)
