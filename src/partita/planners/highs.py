"""HiGHS (Huangfu and Hall, 2018) without a word on the terminal."""

from __future__ import annotations

import highspy


class Highs(highspy.Highs):
    """A solver that is silent from its first breath: highspy's own prints a banner as it enables callbacks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]
