"""Where the repository and the zoo are."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def zoo_dir() -> Path:
    """PARTITA_ZOO, or ``../shared/zoo`` beside the checkout."""
    return Path(os.environ.get("PARTITA_ZOO") or ROOT.parent / "shared" / "zoo")
