"""ZB-H1 (Qi et al., 2023): backward in two steps, B (to the inputs, others wait for it) and W (weights, nobody waits).

W is put off to where the device would idle, while no device holds more than 1F1B's first stage does. With F, B and W
alike the bubble is (p-1) steps of 3m+p-1, a third of 1F1B's.

    a: F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3
    b: F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
    c: F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3

With two stages a device, placed in a V (a b b a), it is ZBV (Qi et al., Pipeline Parallelism with Controllable Memory,
2024, section 3): a device that has done the first stage's forward soon has the last one's backward to do. The bubble is
(p-1)/2 steps of those above, half of the one above, at the same peak, where p divides the number of microbatches.

    a: F0.0 F0.1 F3.0 B3.0 F3.1 B3.1 B0.0 W3.0 B0.1 W3.1 W0.0 W0.1
    b: F1.0 F2.0 F1.1 F2.1 B2.0 B1.0 B2.1 B1.1 W2.0 W2.1 W1.0 W1.1
"""

from __future__ import annotations

from partita.schedules.greedy import Rule

RULE = Rule(prefer="FBW", split_backward=True, slack=2)
