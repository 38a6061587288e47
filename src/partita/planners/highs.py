"""HiGHS (Huangfu and Hall, 2018) without a word on the terminal."""

from __future__ import annotations

import highspy


class Highs(highspy.Highs):
    """A solver that is silent from its first breath: its constructor prints a banner when callbacks are enabled."""

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]
